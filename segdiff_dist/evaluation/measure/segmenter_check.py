"""Where the auxiliary segmenter fails on real images: the numbers that mean nothing then, marks and messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_shards.labels import shown_name

# The least Dice (mask, pred. real). With less, the segmenter's labels on generated images mean nothing.
FEWEST_DICE = 0.1
# Below it, an organ's numbers on generated images may show the segmenter's failure rather than the denoiser's.
WEAK_DICE = 0.5
MARK = "\u2021"
# Beginnings of the names of all metrics that need the segmenter.
SEGMENTER_METRICS = (
    *("dice_", "surface_dice_", "area_error_", "volume_error_", "false_positive_", "legacy_dice_", "segmenter_"),
    *("sensitivity_", "precision_"),
)
_ON_REAL = "dice_mask_real"
_MARKED = "unreliable"

Entries = dict[str, Any]


def fails(entries: Entries) -> bool:
    """Whether the segmenter's Dice on real images, in these entries by metric, is near 0; False if not known."""
    return _ON_REAL in entries and entries[_ON_REAL]["value"] < FEWEST_DICE


def weakness(entries: Entries) -> str:
    """Why the numbers of an organ on generated images may show the segmenter's failure rather than the denoiser's.

    `entries` of the organ by metric. Empty where its Dice on real images and the interval of that are above WEAK_DICE,
    and where no mask holds the organ.
    """
    if _ON_REAL not in entries:
        return ""
    value, interval = entries[_ON_REAL]["value"], entries[_ON_REAL].get("ci95")
    if value < WEAK_DICE:
        return f"Dice on real images is {value:.2f}, below {WEAK_DICE}"
    if interval is not None and interval[0] < WEAK_DICE:
        low, high = interval
        return f"Dice on real images is {value:.2f}, its interval {low:.2f} to {high:.2f} includes {WEAK_DICE}"
    return ""


def rests_on_segmenter(metric: str) -> bool:
    """Whether a metric of generated images needs the segmenter's labels."""
    return metric.startswith(SEGMENTER_METRICS) and not metric.endswith("_mask_real")


def is_unreliable(entry: dict[str, Any] | None) -> bool:
    """Whether an entry of summary.json was marked."""
    return entry is not None and bool(entry.get(_MARKED))


def mark_unreliable(summary: dict[str, Any]) -> dict[str, Any]:
    """Set `unreliable` on every entry of summary.json that means nothing because the segmenter fails; returns it.

    Metrics of real images alone (pair mask_real) show the failure and are not marked. For an organ its own Dice counts,
    or that of its group where no mask holds the organ. For images of another modality, and for several images of a
    mask, the Dice on real images of the generated images' modality counts.
    """
    by_modality, diversity = summary.get("by_modality", {}), summary.get("diversity", {})
    groups = [(summary["metrics"], summary.get("by_organ", {}))]
    for of_group, of_organs in (("by_modality", "by_modality_organ"), ("by_axis", "by_axis_organ")):
        groups += [
            (entries, summary.get(of_organs, {}).get(name, {})) for name, entries in summary.get(of_group, {}).items()
        ]
    groups += [(entries, {}) for entries in summary.get("by_modality_axis", {}).values()]
    for entries, organs in groups:
        _mark(entries, fails(entries))
        for of_organ in organs.values():
            _mark(of_organ, fails(of_organ if _ON_REAL in of_organ else entries))
    _mark(summary.get("body", {}), fails(summary.get("body", {})))
    for direction, entries in summary.get("cross_modality", {}).items():
        _mark(entries, fails(by_modality.get(direction.split("_to_")[-1], {})))
    _mark(diversity.get("metrics", {}), fails(summary["metrics"]))
    for modality, entries in diversity.get("by_modality", {}).items():
        _mark(entries, fails(by_modality.get(modality, {})))
    return summary


def segmenter_messages(summary: dict[str, Any]) -> list[str]:
    """Sentences that say where the segmenter fails on real images, and which numbers mean nothing then."""
    by_modality = summary.get("by_modality", {})
    groups = {"all real images": summary["metrics"]} | {f"real {m} images": e for m, e in by_modality.items()}
    if len(groups) == 2:  # one modality
        del groups["all real images"]
    failed = {group: entries for group, entries in groups.items() if fails(entries)}
    if len(failed) == len(groups):  # on all: a sentence for each modality would repeat it
        failed = dict([next(iter(failed.items()))])
    messages = [
        f"The segmenter fails on {group}: Dice of mask and prediction is {entries[_ON_REAL]['value']:.3f}. Its "
        "numbers on generated images (Dice, areas, false organs, distances of its features) mean nothing."
        for group, entries in failed.items()
    ]
    for modality, organs in summary.get("by_modality_organ", {}).items():
        lost = [(shown_name(o), e[_ON_REAL]["value"]) for o, e in organs.items() if fails(e)]
        # Where it fails on the modality, there is a sentence already.
        if lost and not fails(by_modality.get(modality, {})):
            names = ", ".join(f"{organ} ({value:.3f})" for organ, value in lost)
            messages.append(
                f"On real {modality} images the segmenter does not find {names}: the numbers of "
                f"{'this organ' if len(lost) == 1 else 'these organs'} on generated {modality} images mean nothing."
            )
    return messages


def _mark(entries: Entries, means_nothing: bool) -> None:
    for name in _of_generated(entries):
        if means_nothing:
            entries[name][_MARKED] = True
        else:
            entries[name].pop(_MARKED, None)


def _of_generated(entries: Entries) -> Iterator[str]:
    return (name for name in entries if rests_on_segmenter(name))
