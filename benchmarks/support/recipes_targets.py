"""The comparison of two recipes' measurements; pure functions of numbers.

A curve is a recipe's measurements with one seed, in the order of its points: metric -> values.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

HIGHER_IS_BETTER = {"dice": True, "distance": False, "psnr_db": True}
# The target: the other's final Dice and distance with a third of its compute, and a distance a quarter lower.
MOST_COMPUTE, LEAST_REDUCTION = 1 / 3, 0.25

Curve = Mapping[str, Sequence[float]]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Their mean and range."""
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "seeds": list(values)}


def reached_at(at: Sequence[float], values: Sequence[float], target: float, higher_is_better: bool) -> float | None:
    """The place where values, interpolated linearly between the points `at`, first are as good as the target; None if
    they never are.

    Before the first point nothing is known: if the first point is already good enough, it is the answer, as an upper
    bound.
    """
    sign = 1.0 if higher_is_better else -1.0
    missing = [sign * (target - value) for value in values]
    for i, now in enumerate(missing):
        if now <= 0:
            if i == 0:
                return float(at[0])
            part = missing[i - 1] / (missing[i - 1] - now)
            return float(at[i - 1] + part * (at[i] - at[i - 1]))
    return None


def choose(candidates: Mapping[Any, Mapping[str, float]]) -> Any:
    """The candidate with the best Dice and distance: the smallest sum of its ranks, then the smallest distance.

    A rank is the number of candidates that are better.
    """

    def rank(name: Any, metric: str) -> int:
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        return sum(sign * other[metric] > sign * candidates[name][metric] for other in candidates.values())

    return min(candidates, key=lambda c: (rank(c, "dice") + rank(c, "distance"), candidates[c]["distance"]))


def check_targets(
    points: Sequence[int],
    ours: Sequence[Curve],
    paper: Sequence[Curve],
    our_seconds: Sequence[Sequence[float]],
    paper_seconds: Sequence[Sequence[float]],
    a_third: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """Whether ours reaches the target. A sequence's elements are seeds; a_third holds the final values of the runs that
    were planned for a third of the images."""
    found: dict[str, Any] = {"most_compute": MOST_COMPUTE, "least_reduction": LEAST_REDUCTION}
    paper_s = statistics.fmean(seconds[-1] for seconds in paper_seconds)
    reached = []
    for metric in ("dice", "distance"):
        target = statistics.fmean(curve[metric][-1] for curve in paper)
        higher = HIGHER_IS_BETTER[metric]
        mean_curve = np.mean([curve[metric] for curve in ours], axis=0).tolist()
        images = reached_at(points, mean_curve, target, higher)
        seconds = reached_at(np.mean(our_seconds, axis=0).tolist(), mean_curve, target, higher)
        by_seed = [reached_at(points, curve[metric], target, higher) for curve in ours]
        found[metric] = {
            "papers_final": target,
            "reached_at_part_of_images": None if images is None else images / points[-1],
            "reached_at_part_of_seconds": None if seconds is None else seconds / paper_s,
            "by_seed_part_of_images": [None if n is None else n / points[-1] for n in by_seed],
            "is_upper_bound": images == points[0],
        }
        if a_third:
            values = [final[metric] for final in a_third]
            better = statistics.fmean(values) >= target if higher else statistics.fmean(values) <= target
            found[metric]["planned_for_a_third"] = over_seeds(values) | {"as_good": better}
        reached.append(images is not None and images <= MOST_COMPUTE * points[-1])
    ends = [[curve["distance"][-1] for curve in curves] for curves in (ours, paper)]
    reductions = [1.0 - a / b for a in ends[0] for b in ends[1]]
    reduction = 1.0 - statistics.fmean(ends[0]) / statistics.fmean(ends[1])
    found["distance_reduction"] = {"value": reduction, "low": min(reductions), "high": max(reductions)}
    found["reached"] = {"compute": all(reached), "reduction": reduction >= LEAST_REDUCTION}
    return found


def target_lines(found: Mapping[str, Any]) -> list[str]:
    """The checks in words, a line each."""
    lines = []
    for metric in ("dice", "distance"):
        one = found[metric]
        part, by_time = one["reached_at_part_of_images"], one["reached_at_part_of_seconds"]
        if part is None:
            at = "never reached"
        else:
            bound = "<= " if one["is_upper_bound"] else ""
            at = f"reached at {bound}{part:.0%} of its images, {by_time:.0%} of its seconds"
        line = f"the paper's final {metric} {one['papers_final']:.3f}: {at}"
        if third := one.get("planned_for_a_third"):
            line += f"; planned for a third: {third['mean']:.3f} ({third['low']:.3f} .. {third['high']:.3f})"
        lines.append(line)
    lines[-1] += f"\n  target at most {found['most_compute']:.0%}: {_reached(found['reached']['compute'])}"
    cut = found["distance_reduction"]
    lines.append(
        f"distance at equal compute: {cut['value']:.0%} lower ({cut['low']:.0%} .. {cut['high']:.0%})\n"
        f"  target at least {found['least_reduction']:.0%}: {_reached(found['reached']['reduction'])}"
    )
    return lines


def _reached(reached: bool) -> str:
    return "reached" if reached else "NOT reached"
