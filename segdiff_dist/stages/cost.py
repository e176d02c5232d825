"""The cost of a stage, as far as it is known before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The cost of a stage. None: not known."""

    images: int | None = None
    """Number of slices or images."""
    seconds: float | None = None
    num_bytes: int | None = None
    """Upper bound of bytes on the disk."""
    memory_bytes: int | None = None
    """Peak memory of one process."""
    notes: tuple[str, ...] = ()
    """Further lines, for example where a figure comes from."""
    what: str = ""
    """The work in a few words, for the line before it starts."""
    sure_share: float = 1.0
    """The share of `num_bytes` that is needed in any case; the rest depends on how well the data can be compressed."""
    smaller: str = ""
    """Settings that need less room on the disk."""
    shorter: str = ""
    """Settings that take less time."""

    def lines(self) -> list[str]:
        """The known figures, then the notes, one a line."""
        known: tuple[tuple[str, float | None, Callable[[Any], str]], ...] = (
            ("images", self.images, lambda number: f"{number:,}"),
            ("time", self.seconds, duration),
            ("disk", self.num_bytes, lambda number: f"at most {size(number)}"),
            ("memory", self.memory_bytes, lambda number: f"about {size(number)}"),
        )
        found = [f"{name}: {text(value)}" for name, value, text in known if value is not None]
        return [*found, *self.notes] or ["cost: not known before it runs"]


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    for unit, length, most in (("min", 60.0, 90.0), ("h", 3600.0, 48.0)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def size(num_bytes: float) -> str:
    """`1.2 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
