"""The contents of a shard set: counts by split, modality, axis and class, patients, leakage, checksums, and
pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.labels import UNUSED, LabelTable
from data_shards.records import AXES, LABEL_NOTE, MASK_SOURCES, SPLITS
from data_shards.store.byte_store import local_path
from data_shards.store.contact_sheet import NotSaved, draw_class_histogram, draw_contact_sheet
from data_shards.store.samples_table import numbers
from data_shards.store.shards import ShardSet
from data_shards.wording import in_words

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class InspectReport:
    """Counts of a set. A group is a (split, modality) with samples.

    slices: samples by (split, modality, axis). patients: (labelled, unlabelled) by group. pixels, class_slices: int64
    [num_classes] by group, over labelled samples. masks: slices by mask source. leaking: patients in more than one
    split, with those splits; a patient is recognised by case id and by the image file's sha256. failed: volumes that
    prepare could not use, from index.json. notes: on the folder of volumes. recognised: by case id, texts about what
    prepare converted, left out or guessed. source: the files of each case.
    """

    path: str
    label_table: LabelTable
    size: int
    bits: int
    store: str
    codec: str
    num_bytes: int
    verified: bool
    slices: dict[tuple[str, str, str], int]
    patients: dict[tuple[str, str], tuple[int, int]]
    pixels: dict[tuple[str, str], np.ndarray]
    class_slices: dict[tuple[str, str], np.ndarray]
    masks: dict[str, int]
    leaking: tuple[tuple[str, tuple[str, ...]], ...]
    failed: tuple[dict[str, str], ...]
    notes: list[str]
    recognised: dict[str, list[str]]
    source: dict[str, Any]
    contact_sheet: Path
    histogram: Path
    not_drawn: str | None = None
    """Why there are no pictures."""

    @property
    def num_samples(self) -> int:
        """Slices in the set."""
        return sum(self.slices.values())

    @property
    def ok(self) -> bool:
        """Whether no patient is in two splits, and no volume was left out."""
        return not self.leaking and not self.failed


def inspect_shards(path: str | Path, pictures: Path | None = None, *, verify: bool = True) -> InspectReport:
    """Count the contents of the set at `path` (a folder or a URL), and draw contact_sheet.png and class_histogram.png
    into `pictures`. Default: the set's own folder, or the current folder if the set is behind a URL. If the folder
    cannot be written, the report says so.

    Reads every mask and, with `verify`, every byte. Raises InputProblems if the set is incomplete, and DamagedSample.
    """
    folder = local_path(path)
    shard_set = ShardSet.open(path, verify=verify and folder is not None)
    groups = [(split, modality) for split in SPLITS for modality in shard_set.modalities]
    chosen = {g: shard_set.select(split=g[0], modalities=[g[1]], labelled_only=False) for g in groups}
    rows_of = {group: rows for group, rows in chosen.items() if len(rows)}
    labelled_N = numbers(shard_set.samples, "labelled")
    pixels, class_slices = _count_classes(shard_set, {group: rows[labelled_N[rows]] for group, rows in rows_of.items()})
    pictures = pictures or folder or Path()
    contact_sheet, histogram = pictures / "contact_sheet.png", pictures / "class_histogram.png"
    return InspectReport(
        path=shard_set.root,
        label_table=shard_set.label_table,
        size=shard_set.size,
        bits=shard_set.bits,
        store=shard_set.index["store"],
        codec=shard_set.codec,
        num_bytes=sum(shard["bytes"] for shard in shard_set.index["shards"]),
        verified=verify,
        slices=_count_slices(shard_set, rows_of),
        patients=_count_patients(shard_set, rows_of),
        pixels=pixels,
        class_slices=class_slices,
        masks=_mask_sources(shard_set),
        leaking=tuple(_leaks(shard_set.samples, shard_set.index.get("source") or {})),
        failed=tuple(shard_set.index.get("failed", ())),
        notes=_texts(shard_set.index.get("notes")) or [],
        recognised=_recognised(shard_set.index),
        source=shard_set.index.get("source") or {},
        contact_sheet=contact_sheet,
        histogram=histogram,
        not_drawn=_draw(shard_set, pixels, contact_sheet, histogram),
    )


def format_report(report: InspectReport) -> str:
    """The report as tables for a terminal."""
    return "\n".join(_lines(report))


def recognised_lines(recognised: dict[str, list[str]], source: dict[str, Any] | None = None) -> Iterator[str]:
    """The notes on volumes, a line for each kind of note with its files, which are those of index.json's `source`; a
    case that is not in it is named by its id."""
    files_of: dict[str, list[str]] = {}
    for case_id, notes in sorted(recognised.items()):
        for note in notes:
            files_of.setdefault(note, []).append(_file_of(case_id, note, source or {}))
    for note, files in files_of.items():
        names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        yield f"{note}: {len(files)} volume{'s' if len(files) > 1 else ''} ({names})"


def _file_of(case_id: str, note: str, source: dict[str, Any]) -> str:
    """The image, or the label if the note is on it and it is one file."""
    entry = source.get(case_id)
    files = entry if isinstance(entry, dict) else {}
    found = (note.startswith(LABEL_NOTE) and files.get("label")) or files.get("image")
    return str(found[0]) if isinstance(found, list) and found else case_id


def _recognised(index: dict[str, Any]) -> dict[str, list[str]]:
    """An entry of index.json: any writer may add fields, so only entries of this form are shown."""
    content = index.get("recognised")
    notes_of = content.items() if isinstance(content, dict) else ()
    return {case_id: texts for case_id, notes in notes_of if (texts := _texts(notes)) is not None}


def _texts(content: Any) -> list[str] | None:
    return content if isinstance(content, list) and all(isinstance(one, str) for one in content) else None


def _leaks(samples: pa.Table, source: dict[str, dict[str, Any]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Patients that are in more than one split, under one case id or name, or with the same image under several."""
    names = ["case_id", "source_sha256", "split"]
    known = samples.select(names).group_by(names).aggregate([]).to_pydict()
    splits_of: dict[str, set[str]] = {}
    cases_of: dict[str, set[str]] = {}
    for case_id, sha256, split in zip(*known.values(), strict=True):
        cases_of.setdefault(sha256, set()).add(case_id)
        for patient in (case_id, sha256, source.get(case_id, {}).get("patient") or case_id):
            splits_of.setdefault(patient, set()).add(split)
    for patient, splits in sorted(splits_of.items()):
        cases = cases_of.get(patient)
        # Only images with several names: the others are covered by their case id.
        if len(splits) > 1 and (cases is None or len(cases) > 1):
            yield patient if cases is None else " = ".join(sorted(cases)), tuple(sorted(splits))


def _count_slices(shard_set: ShardSet, rows_of: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str, str], int]:
    """Slices by split, modality and axis, where there are any."""
    counts_of = {group: np.bincount(shard_set.axis_N[rows], minlength=len(AXES)) for group, rows in rows_of.items()}
    return {
        (*group, axis): count
        for group, counts in counts_of.items()
        for axis, count in zip(AXES, counts.tolist(), strict=True)
        if count
    }


def _count_patients(
    shard_set: ShardSet, rows_of: dict[tuple[str, str], np.ndarray]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Patients with and without labels, by group."""
    labelled_N, case_N = (numbers(shard_set.samples, name) for name in ("labelled", "case_id"))

    def num_cases(rows: np.ndarray) -> int:
        return len(np.unique(case_N[rows]))

    return {
        group: (num_cases(rows[labelled_N[rows]]), num_cases(rows[~labelled_N[rows]]))
        for group, rows in rows_of.items()
    }


def _mask_sources(shard_set: ShardSet) -> dict[str, int]:
    """Slices by the source of their mask, where there are any."""
    counts = np.bincount(numbers(shard_set.samples, "mask_source"), minlength=len(MASK_SOURCES)).tolist()
    return {source: count for source, count in zip(MASK_SOURCES, counts, strict=True) if count}


def _draw(
    shard_set: ShardSet, pixels: dict[tuple[str, str], np.ndarray], contact_sheet: Path, histogram: Path
) -> str | None:
    """Draw both pictures; returns why they could not be saved. The counts are worth printing without them."""
    try:
        draw_contact_sheet(shard_set, contact_sheet)
        draw_class_histogram(shard_set.label_table, pixels, histogram)
    except NotSaved as error:
        return str(error)
    return None


def _count_classes(
    shard_set: ShardSet, rows_of: dict[tuple[str, str], np.ndarray]
) -> tuple[dict[tuple[str, str], np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Pixels of each class, and slices with the class, by group."""
    from data_shards.progress import progress_bar

    num_classes = shard_set.label_table.num_classes
    pixels = {group: np.zeros(num_classes, dtype=np.int64) for group in rows_of}
    slices = {group: np.zeros(num_classes, dtype=np.int64) for group in rows_of}
    with progress_bar(total=sum(map(len, rows_of.values())), desc="inspect", unit="slice") as bar:
        for group, rows in rows_of.items():
            for row in rows.tolist():
                counts = np.bincount(shard_set.read_mask(row).ravel(), minlength=num_classes)
                pixels[group] += counts
                slices[group] += counts > 0
                bar.update()
    return pixels, slices


def _lines(report: InspectReport) -> Iterator[str]:
    gib = report.num_bytes / 1024**3
    shape = f"{in_words(report.num_samples, 'slice')} of {report.size}x{report.size}, {report.bits} bits"
    yield f"{report.path}: {shape}, {report.store}, {report.codec}, {gib:.2f} GiB"
    masks = ", ".join(f"{count} by {source}" for source, count in report.masks.items() if source != "none")
    yield f"label set {report.label_table.name}; masks: {masks or 'none'}; " + (
        "every checksum holds" if report.verified else "checksums not compared"
    )
    yield ""
    yield from _patients_table(report)
    if groups := [group for group in report.pixels if report.pixels[group].any()]:
        yield ""
        yield from _classes_table(report, groups)
    yield ""
    yield from _notes(report)


def _patients_table(report: InspectReport) -> Iterator[str]:
    """Patients and slices of each split and modality."""
    rows = [
        [split, modality, str(labelled), str(unlabelled)]
        + [str(report.slices.get((split, modality, axis), 0)) for axis in AXES]
        for (split, modality), (labelled, unlabelled) in report.patients.items()
    ]
    yield from _table(["split", "modality", "patients", "unlabelled", *(f"{axis} slices" for axis in AXES)], rows, 2)


def _classes_table(report: InspectReport, groups: Sequence[tuple[str, str]]) -> Iterator[str]:
    """How often each class occurs in these groups."""
    yield "labelled slices that hold each class, and its share of their pixels"
    # For a large table only classes that occur; for a small one all, so that a missing organ is noticed.
    shows_all = report.label_table.num_classes <= 20
    rows = []
    for class_id, name in enumerate(report.label_table.names):
        if name == UNUSED or not (shows_all or any(report.pixels[g][class_id] for g in groups)):
            continue
        cells = [
            f"{report.class_slices[g][class_id]} {_percent(report.pixels[g][class_id], report.pixels[g].sum())}"
            for g in groups
        ]
        rows.append([str(class_id), name, *cells])
    yield from _table(["id", "class", *(" ".join(group) for group in groups)], rows, 2)


def _notes(report: InspectReport) -> Iterator[str]:
    """Leaks, what prepare recognised and left out, and where the pictures are."""
    for case_id, splits in report.leaking:
        yield f"LEAK: patient {case_id} is in {' and '.join(splits)}"
    if not report.leaking:
        yield "no patient is in more than one split"
    yield from report.notes
    yield from recognised_lines(report.recognised, report.source)
    for entry in report.failed:
        yield f"not in the set: {entry['case_id']}: {entry['file']}: {entry['reason']}"
    if report.not_drawn is None:
        yield f"pictures: {report.contact_sheet}, {report.histogram}"
    else:
        yield f"no pictures: cannot write to {report.contact_sheet.absolute().parent} ({report.not_drawn})"


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / max(whole, 1):6.2f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> Iterator[str]:
    """Aligned columns: the first `num_left` to the left, the others, which are numbers, to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, *rows):
        cells = (c.ljust(w) if i < num_left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        yield "  ".join(cells).rstrip()
