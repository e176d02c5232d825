"""Whose anatomy the masks of a folder show: what intervals and folds over patients count.

In this order: a table beside the files (items.csv of `segdiff export`, or a manifest with a column `patient`), a
pattern, and else each mask alone. The last is a guess, and a message says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_shards.documents import read_json
from data_shards.ingest.layouts.base import MANIFESTS, patient_of
from data_shards.ingest.layouts.exports import CASE, ITEMS_FILE, PATIENT, PROVENANCE_FILE, RESTORE, own_items
from data_shards.ingest.layouts.tables import read_columns, read_table
from data_shards.ingest.splits import MOST_SCANS
from data_shards.problems import Problem, refuse
from segdiff_dist.sampling.mask_files import case_id_of, without_ending

if TYPE_CHECKING:
    import pyarrow as pa

# In provenance.json of an export of a folder's masks: who names the patients.
NAMED = "patients"
# What comes before modality and number in a name of `segdiff export`, before the axis, or before the last part.
_LIKELY = (r"(.+)_[a-z][a-z0-9-]*_[0-9]+", r"(.+)-(?:axial|coronal|sagittal)-", "(.+)_", "(.+)-")
# The first of these: its names are no other program's.
_OWN = _LIKELY[:1]


@dataclass(frozen=True)
class MaskPatients:
    """`by_case`: the patient of each case that has one named otherwise. `line`: how many there are, and who says so.
    `guess`: what to say if nobody does."""

    by_case: Mapping[str, str] = field(default_factory=dict)
    line: str | None = None
    guess: str | None = None

    @property
    def messages(self) -> list[str]:
        """The line or the guess, if there is one."""
        return [text for text in (self.line, self.guess) if text is not None]


def mask_patients(
    items: pa.Table, job: Mapping[str, Any], pattern: str | None, section: str = "evaluate"
) -> MaskPatients:
    """The patients of a job of a folder's masks. `section`: of the setting `patient`, which is the pattern. Raises
    InputProblems: a pattern that fits no case, a case of two patients, a table that cannot be read."""
    table = _table(items, job)
    cases = items["case_id"].unique().to_pylist()
    stated = dict(table.names) if table.is_sure else {}
    # An export of a folder's masks knows the mask of each image.
    own = {case: case if table.is_sure else table.names.get(case, case) for case in cases}
    matched = {case: patient for case in cases if (patient := patient_of(own[case], pattern))} if pattern else {}
    if pattern is not None and not (stated or matched):
        remedy = "the first group is the patient: '(.+)_' finds p7 in p7_1"
        refuse([Problem("config", f"{section}.patient", f"{pattern!r} fits no case, as {own[cases[0]]}", remedy)])
    named = own | matched | stated
    by_case = {case: patient for case, patient in named.items() if patient != case}
    sources = [str(table.file)] * bool(stated) + [f"--{section}.patient"] * bool(matched.keys() - stated.keys())
    if sources:
        num = len(set(named.values()))
        return MaskPatients(by_case, f"patients: {num:,} in {len(cases):,} cases, by {' and '.join(sources)}")
    num_slices = Counter(case for case, _ in {*zip(*(items[n].to_pylist() for n in ("case_id", "key")), strict=True)})
    most: dict[str, int] = {}
    for case, num in sorted(num_slices.items()):
        most[own[case]] = max(num, most.get(own[case], 0))
    guesses = [text for text in (_guess(most, section), _folder_guess(items, section)) if text is not None]
    return MaskPatients(by_case, guess="; ".join(guesses) or None)


def _guess(num_slices: Mapping[str, int], section: str) -> str | None:
    """A message where cases that count as patients may be several of one; None where nothing speaks for it, by number
    or names."""
    cases = list(num_slices)
    flat = [case for case, num in num_slices.items() if num == 1]
    pattern = likely_patients(cases) if len(flat) < 2 else _likely(cases, _LIKELY)
    if pattern is None and len(flat) < 2:
        return None
    likely, num = pattern or ("(.+)_", 0)
    found = f" (here {num:,} patient{'s' if num > 1 else ''})" if num else ""
    what = f"{len(cases):,} cases, {len(flat):,} of them single slices," if flat else f"{len(cases):,} cases"
    of_export = "a fold may have a patient in both parts, and DICOM makes two patients,"
    wrong = "intervals are too narrow" if section == "evaluate" else of_export
    return (
        f"{what} count as {len(cases):,} patients, since no table or pattern names them: {wrong} if several are of one "
        f"patient. Then give --{section}.patient '{likely}'{found}: its first group is the patient"
    )


def _folder_guess(items: pa.Table, section: str) -> str | None:
    """A message where files of other systems count as one patient because they are in one folder; None elsewhere."""
    if "image_file" not in items.column_names:
        return None
    columns = (items[name].to_pylist() for name in ("image_file", "case_id"))
    files = [(PurePosixPath(file).parent, case) for file, case in dict.fromkeys(zip(*columns, strict=True))]
    num_files = Counter(case for folder, case in files if folder.name and case == case_id_of(Path(f"{folder}.png")))
    most = max(num_files, key=num_files.__getitem__, default="")
    if num_files[most] < 2:
        return None
    count = f"files of one folder count as one patient, as {num_files[most]:,} in {most} (patients: {len(num_files):,})"
    wrong = "intervals are too wide, or missing, if a folder is no patient's"
    return f"{count}: {wrong}. Then put all files into one folder, and name the patients by --{section}.patient"


def likely_patients(cases: Sequence[str]) -> tuple[str, int] | None:
    """A pattern by which names of volumes, as p7_1 and p7_2, may be of fewer patients than there are volumes, and how
    many these are. None where nothing speaks for it."""
    return _likely(cases, _LIKELY, MOST_SCANS)


def _likely(cases: Sequence[str], patterns: Sequence[str], most: float = math.inf) -> tuple[str, int] | None:
    """The first pattern by which cases are of fewer patients than there are cases. A name that all begin with, or more
    than `most`, may be that of the data set, so it is no patient's, but in names of our own exports."""
    for pattern in patterns:
        num_of = Counter(patient_of(case, pattern) or case for case in cases)
        is_own = pattern in _OWN
        if (not is_own) < len(num_of) < len(cases) and (is_own or max(num_of.values()) <= most):
            return pattern, len(num_of)
    return None


@dataclass(frozen=True)
class _Table:
    """Names by case, of patients; if that `is_sure` no more, of masks. `file`: None without a table."""

    names: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    is_sure: bool = True


def _table(items: pa.Table, job: Mapping[str, Any]) -> _Table:
    """The first table beside the masks, or the images, that has any of the cases."""
    known = set(items["case_id"].unique().to_pylist())
    is_named = "image_file" in items.column_names  # of images made elsewhere
    case_of = dict(zip(*(items[n].to_pylist() for n in ("image_file", "case_id")), strict=True)) if is_named else {}
    for folder in (Path(job[name]) for name in ("masks", "images") if name in job):
        for root in (folder, folder.parent):
            for table, named, is_sure in _tables(root, folder):
                found: dict[str, set[str]] = {}
                for name, patient in named:
                    case = case_of.get(name) if is_named else case_id_of(Path(f"{name}.png"))
                    if case is not None and case in known:
                        found.setdefault(case, set()).add(patient)
                if found:
                    _refuse_two(table, found)
                    return _Table({case: min(names) for case, names in found.items()}, table, is_sure)
    return _Table()


def _refuse_two(table: Path, found: Mapping[str, set[str]]) -> None:
    refuse(
        Problem(str(table), PATIENT, f"{case} is of {' and '.join(sorted(names))}", "give a case one patient")
        for case, names in found.items()
        if len(names) > 1
    )


def _tables(root: Path, folder: Path) -> Iterator[tuple[Path, list[tuple[str, str]], bool]]:
    """Tables in `root` that state patients, each with the names of files in `folder`, without endings, and patients;
    and whether they are patients for sure."""
    if (own := own_items(root)) is not None:
        made = read_json(root / PROVENANCE_FILE, RESTORE)
        is_sure = "masks_digest" not in made or NAMED in made
        yield root / ITEMS_FILE, [(name, row.get(PATIENT) or row[CASE]) for name, row in own.items()], is_sure
    for manifest in (root / name for name in MANIFESTS if (root / name).is_file()):
        if PATIENT in read_columns(manifest):
            rows = [row for row in read_table(manifest, ()) if row[PATIENT]]
            files = [
                (root / PurePosixPath(row[column].replace("\\", "/")), row[PATIENT])
                for row in rows
                for column in ("label", "image")
                if row.get(column)
            ]
            within = [(file.relative_to(folder), patient) for file, patient in files if file.is_relative_to(folder)]
            yield manifest, [(without_ending(file), patient) for file, patient in within], True
