"""Numbers in lines that people read."""

from __future__ import annotations


def in_words(number: int, noun: str) -> str:
    """`1 volume`, `2 volumes`, `1,000 volumes`, for nouns that take an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def rounded(number: float, noun: str) -> str:
    """`850 voxels`, `12 thousand voxels`, `340 million voxels`."""
    for size, name in ((1e6, "million "), (1e3, "thousand ")):
        if number >= 10 * size:
            return f"{number / size:,.0f} {name}{noun}s"
    return in_words(round(number), noun)
