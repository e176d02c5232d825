"""What a page says of a metric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """A metric on the page: its label, its digits after the point, which values are better, and its description.

    `better`: "higher", "lower", "one" (nearest to 1), or empty if none is better by itself.
    """

    label: str
    digits: int
    better: str
    text: str
