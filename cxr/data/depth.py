"""How many bits of grey files of 16 bits really hold: detectors of 10 to 14 bits are stored in 16."""

from __future__ import annotations

DEPTHS = (8, 10, 12, 14, 16)
FULL = 16


def fewest_bits(largest: int) -> int:
    """The smallest of 8, 10, 12, 14 and 16 bits that holds a value from 0 to 65535."""
    return next(bits for bits in DEPTHS if largest < 1 << bits)
