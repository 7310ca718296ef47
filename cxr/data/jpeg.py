"""What a JPEG costs to decode: a progressive one has a pass over all its pixels for each scan, and a scan may take no
more than ten bytes."""

from __future__ import annotations

MAX_SCANNED = 2_000_000_000  # pixels times scans, 1.3 s of decoding; 60 million pixels in 10 scans are 600 million
_SCAN = b"\xff\xda"  # the marker SOS, which data within a scan cannot contain


def has_too_many_scans(data: bytes, pixels: int) -> bool:
    """Whether decoding a JPEG of that many pixels would take far longer than any real one does."""
    return pixels * data.count(_SCAN) > MAX_SCANNED
