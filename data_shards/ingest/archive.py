"""The AMOS 2022 folder: its cases, and all problems that headers and file names show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_shards.ingest.cases import Case, Listing, nifti_files, problems_by_case
from data_shards.ingest.dataset_json import (
    DATASET_FILE,
    Entry,
    file_stem,
    problems_with_organs,
    read_dataset,
    read_entries,
)
from data_shards.ingest.modality import find_modalities
from data_shards.modalities import MODALITIES
from data_shards.problems import InputProblems, Problem, refuse


def read_archive(root: Path, modalities: Sequence[str] | None = None, modality: str | None = None) -> list[Case]:
    """Cases of the folder at `root` with one of `modalities` (None: any), by case id. `modality`: that of all cases, if
    the user states it. Call `find_problems` first: here a broken folder raises InputProblems for the first problem. A
    test case is labelled if labelsTs/ has a file with its name."""
    content = read_dataset(root)
    where = str(root / DATASET_FILE)
    entries, wrong = read_entries(where, content)
    refuse(wrong)
    ids = [entry.case_id for entry in entries]
    modality_of, notes_of, wrong = find_modalities(where, content, ids, modality)
    refuse(wrong)
    cases = [_case(root, entry, modality_of[entry.case_id], notes_of.get(entry.case_id, ())) for entry in entries]
    return sorted(
        (case for case in cases if modalities is None or case.modality in modalities), key=lambda case: case.case_id
    )


def find_problems(root: Path, modalities: Sequence[str] | None = None, modality: str | None = None) -> list[Problem]:
    """All problems that show before work starts, from headers alone; an empty list means that work can start."""
    return list_archive(root, modalities, modality).all_problems


def list_archive(
    root: Path,
    modalities: Sequence[str] | None = None,
    modality: str | None = None,
    names: dict[int, str] | None = None,
    channel: tuple[int, object, int] | None = None,
) -> Listing:
    """The cases as of `read_archive`, and every problem. `names`: the classes by id, if they are not AMOS'. `channel`:
    number and stated modality of the channel that is read, and how many there are, of images that have several."""
    try:
        content = read_dataset(root)
    except InputProblems as error:
        return Listing((), error.problems)
    if channel is not None:
        content = content | {"modality": {"0": channel[1]}}
    dataset_file = str(root / DATASET_FILE)
    problems = list(problems_with_organs(dataset_file, content.get("labels"))) if names is None else []
    entries, wrong = read_entries(dataset_file, content)
    problems += wrong
    ids = [entry.case_id for entry in entries]
    modality_of, notes_of, wrong = find_modalities(dataset_file, content, ids, modality)
    problems += wrong
    # Files of a case whose modality is not known are checked too.
    either = (modalities or MODALITIES)[0]
    number, num_channels = (None, None) if channel is None else (channel[0], channel[2])
    listed = [_case(root, one, modality_of.get(one.case_id, either), notes_of.get(one.case_id, ())) for one in entries]
    used = (case for case in listed if modalities is None or case.modality in modalities)
    used = (replace(case, channel=number, num_channels=num_channels) for case in used)
    cases = sorted(used, key=lambda case: case.case_id)
    problems += _problems_with_twins(dataset_file, entries)
    of_files: dict[str, list[Problem]] = {}
    for case in cases:  # a case that is listed twice has two sets of files
        for case_id, found in problems_by_case((case,)).items():
            of_files.setdefault(case_id, []).extend(found)
    if not problems and not of_files and not cases:
        value = f"no case among {', '.join(modalities or ('all',))}"
        problems.append(Problem(dataset_file, "training, validation, test", value, "list cases or widen `modalities`"))
    return Listing(tuple(cases), tuple(problems), of_files, names)


def _problems_with_twins(dataset_file: str, entries: Sequence[Entry]) -> list[Problem]:
    files_of: dict[str, list[str]] = {}
    for entry in entries:
        files_of.setdefault(entry.case_id, []).append(f"{entry.split}: {entry.image}")
    remedy = "keep one: a patient is in one split, once"
    return [
        Problem(dataset_file, f"case id {case_id}", f"{len(files)} entries ({', '.join(files)})", remedy)
        for case_id, files in files_of.items()
        if len(files) > 1
    ]


def _case(root: Path, entry: Entry, modality: str, notes: tuple[str, ...] = ()) -> Case:
    image = root / entry.image
    label = None if entry.label is None else root / entry.label
    if entry.split == "test":
        label = next((file for name in _names(entry) for file in nifti_files(root / "labelsTs", name)), None)
    return Case(entry.case_id, modality, entry.split, image, label, notes)


def _names(entry: Entry) -> list[str]:
    """The possible names of a case's file, with the channel's number or without."""
    return list(dict.fromkeys((entry.case_id, file_stem(entry.image))))
