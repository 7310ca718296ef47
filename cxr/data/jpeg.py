"""What must be known of a JPEG before it is decoded: its frame, and what decoding costs.

A progressive one has a pass over all its pixels for each scan, and a scan may take no more than ten bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

MAX_SCANNED = 2_000_000_000  # pixels times scans, 1.3 s of decoding; 60 million pixels in 10 scans are 600 million
_SCAN = b"\xff\xda"  # the marker SOS, which data within a scan cannot contain
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # the markers SOF, and that of JPEG-LS


@dataclass(frozen=True, slots=True)
class Frame:
    """What the frame header of a JPEG or JPEG-LS tells (ITU-T T.81, B.2.2): width and height in pixels, bits a sample,
    and how many components there are."""

    width: int
    height: int
    bits: int
    components: int

    @classmethod
    def of(cls, data: bytes) -> Self | None:
        """The first frame header; None if there is none before the first scan, or more than one."""
        place, found = 2, []
        while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
            marker = data[place + 1]
            if marker in _FRAMES and len(body := data[place + 4 : place + 10]) == 6:
                found.append(cls(int.from_bytes(body[3:5]), int.from_bytes(body[1:3]), body[0], body[5]))
            if marker == _SCAN[1]:
                break
            place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4])  # 0xFF may fill up
        return found[0] if len(found) == 1 else None


def has_too_many_scans(data: bytes, pixels: int) -> bool:
    """Whether decoding a JPEG of that many pixels would take far longer than any real one does."""
    return pixels * data.count(_SCAN) > MAX_SCANNED
