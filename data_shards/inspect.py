"""What is in a shard set: counts by split, modality, axis and class, patients, leakage, checksums, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.contact_sheet import draw_contact_sheet
from data_shards.labels import LabelTable
from data_shards.records import AXES, MODALITIES, SPLITS
from data_shards.shards import ShardSet


@dataclass(frozen=True)
class InspectReport:
    """Counts of a set. A group is a (split, modality) that holds samples.

    slices: samples by (split, modality, axis). patients: (labelled, unlabelled) by group. pixels, class_slices: int64
    [num_classes] by group, over labelled samples. leaking: patients in more than one split, with those splits.
    failed: volumes that prepare could not use, as index.json names them.
    """

    path: Path
    label_table: LabelTable
    size: int
    codec: str
    num_bytes: int
    slices: dict[tuple[str, str, str], int]
    patients: dict[tuple[str, str], tuple[int, int]]
    pixels: dict[tuple[str, str], np.ndarray]
    class_slices: dict[tuple[str, str], np.ndarray]
    leaking: tuple[tuple[str, tuple[str, ...]], ...]
    failed: tuple[dict[str, str], ...]
    contact_sheet: Path

    @property
    def num_samples(self) -> int:
        """Slices in the set."""
        return sum(self.slices.values())

    @property
    def ok(self) -> bool:
        """No patient in two splits, and no volume left out."""
        return not self.leaking and not self.failed


def inspect_shards(path: Path, contact_sheet: Path | None = None, *, verify: bool = True) -> InspectReport:
    """Count what the set at `path` holds, and draw `contact_sheet` (a PNG; by default contact_sheet.png in the set).

    Reads every mask and, with `verify`, every byte. Raises InputProblems where the set is not whole.
    """
    shard_set = ShardSet.open(Path(path), verify=verify)
    names = ("split", "modality", "axis", "case_id", "labelled")
    columns = {name: np.array(shard_set.samples[name].to_pylist()) for name in names}
    groups = [(split, modality) for split in SPLITS for modality in MODALITIES]
    rows_of = {g: np.flatnonzero((columns["split"] == g[0]) & (columns["modality"] == g[1])) for g in groups}
    rows_of = {group: rows for group, rows in rows_of.items() if len(rows)}
    slices, patients, labelled_rows = {}, {}, {}
    for group, rows in rows_of.items():
        labelled = columns["labelled"][rows]
        labelled_rows[group] = rows[labelled]
        patients[group] = (len(set(columns["case_id"][rows[labelled]])), len(set(columns["case_id"][rows[~labelled]])))
        for axis in AXES:
            slices[(*group, axis)] = int(np.count_nonzero(columns["axis"][rows] == axis))
    pixels, class_slices = _count_classes(shard_set, labelled_rows)
    splits_of: dict[str, set[str]] = {}
    for case_id, split in zip(columns["case_id"].tolist(), columns["split"].tolist(), strict=True):
        splits_of.setdefault(case_id, set()).add(split)
    contact_sheet = contact_sheet or shard_set.path / "contact_sheet.png"
    draw_contact_sheet(shard_set, contact_sheet)
    return InspectReport(
        path=shard_set.path,
        label_table=shard_set.label_table,
        size=shard_set.size,
        codec=shard_set.codec,
        num_bytes=sum(shard["bytes"] for shard in shard_set.index["shards"]),
        slices={key: count for key, count in slices.items() if count},
        patients=patients,
        pixels=pixels,
        class_slices=class_slices,
        leaking=tuple((case, tuple(sorted(splits))) for case, splits in sorted(splits_of.items()) if len(splits) > 1),
        failed=tuple(shard_set.index.get("failed", ())),
        contact_sheet=contact_sheet,
    )


def format_report(report: InspectReport) -> str:
    """The report as tables for a terminal."""
    return "\n".join(_lines(report))


def _count_classes(
    shard_set: ShardSet, rows_of: dict[tuple[str, str], np.ndarray]
) -> tuple[dict[tuple[str, str], np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Pixels of each class, and slices that hold it, by group."""
    from tqdm import tqdm

    num_classes = shard_set.label_table.num_classes
    pixels = {group: np.zeros(num_classes, dtype=np.int64) for group in rows_of}
    slices = {group: np.zeros(num_classes, dtype=np.int64) for group in rows_of}
    with tqdm(total=sum(map(len, rows_of.values())), desc="inspect", unit="slice") as bar:
        for group, rows in rows_of.items():
            for row in rows.tolist():
                counts = np.bincount(shard_set.read_mask(row).ravel(), minlength=num_classes)
                pixels[group] += counts
                slices[group] += counts > 0
                bar.update()
    return pixels, slices


def _lines(report: InspectReport) -> Iterator[str]:
    gib = report.num_bytes / 1024**3
    yield f"{report.path}: {report.num_samples} slices of {report.size}x{report.size}, {report.codec}, {gib:.2f} GiB"
    yield ""
    rows = [
        [split, modality, str(labelled), str(unlabelled)]
        + [str(report.slices.get((split, modality, axis), 0)) for axis in AXES]
        for (split, modality), (labelled, unlabelled) in report.patients.items()
    ]
    yield from _table(["split", "modality", "patients", "unlabelled", *(f"{axis} slices" for axis in AXES)], rows, 2)
    groups = [group for group in report.pixels if report.pixels[group].any()]
    if groups:
        yield ""
        yield "labelled slices that hold each class, and its share of their pixels"
        rows = []
        for class_id, name in enumerate(report.label_table.names):
            cells = [
                f"{report.class_slices[g][class_id]} {_percent(report.pixels[g][class_id], report.pixels[g].sum())}"
                for g in groups
            ]
            rows.append([str(class_id), name, *cells])
        yield from _table(["id", "class", *(" ".join(group) for group in groups)], rows, 2)
    yield ""
    for case_id, splits in report.leaking:
        yield f"LEAK: patient {case_id} is in {' and '.join(splits)}"
    if not report.leaking:
        yield "no patient is in more than one split"
    for entry in report.failed:
        yield f"not in the set: {entry['case_id']}: {entry['file']}: {entry['reason']}"
    yield f"contact sheet: {report.contact_sheet}"


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / max(whole, 1):6.2f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> Iterator[str]:
    """Aligned columns: the first `num_left` to the left, the others, numbers, to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, *rows):
        cells = (c.ljust(w) if i < num_left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        yield "  ".join(cells).rstrip()
