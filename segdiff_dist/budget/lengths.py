"""How long each stage works, so that all of them together take the hours there are. Only arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_HALVINGS = 60


@dataclass(frozen=True)
class Length:
    """The images of one stage, as far as they may be chosen."""

    least: int
    """Fewer are of no use."""
    most: int
    """More are of no use. `least` and `most` are equal if the number is given."""
    share: float
    """The part of the time that this stage should get."""
    seconds: float
    """Seconds of one image."""

    def at(self, level_s: float) -> int:
        """The number if all stages together had `level_s` seconds."""
        return max(self.least, min(self.most, int(self.share * level_s / self.seconds)))


def least_seconds(lengths: Mapping[str, Length]) -> float:
    """Seconds of the shortest lengths that are of use."""
    return sum(one.least * one.seconds for one in lengths.values())


def fit(seconds: float, lengths: Mapping[str, Length]) -> dict[str, int] | None:
    """The longest numbers that fit into `seconds`, by the stages' shares; None if the least does not fit.

    A stage at its least or its most leaves the difference to the others.
    """
    if least_seconds(lengths) > seconds:
        return None
    low, high = 0.0, max((one.most * one.seconds / one.share for one in lengths.values()), default=0.0)
    if _seconds_at(high, lengths) <= seconds:
        return {name: one.at(high) for name, one in lengths.items()}
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _seconds_at(middle, lengths) <= seconds else (low, middle)
    return {name: one.at(low) for name, one in lengths.items()}


def _seconds_at(level_s: float, lengths: Mapping[str, Length]) -> float:
    return sum(one.at(level_s) * one.seconds for one in lengths.values())
