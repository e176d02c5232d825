"""The split of a case, if the data do not state it: drawn by patient, so that all scans of a patient are in one split.

Patients are ordered by a digest of the seed and their name. So the draw depends on nothing else, and a new patient
changes the split of few others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from data_shards.ingest.cases import Case
from data_shards.problems import Problem
from data_shards.records import SPLITS

_DEFAULT_SHARES = (0.7, 0.1, 0.2)
# Names of several scans of a patient: p7_1, 0012-venous, s3_2019-04-01. The last group is there for a date.
_ALIKE = re.compile(r"(.+?)[_-](?:[^_-]+|([0-9]{4})-[0-9]{2}-[0-9]{2})")
_BEFORE_LAST, _BEFORE_DATE = "(.+)[_-]", "(.+?)[_-][0-9]{4}-"
# More files than this are not the scans of one patient.
MOST_SCANS = 12


def with_splits(
    cases: Sequence[Case], shares: tuple[float, float, float] | None, seed: int, *, by_tool: bool = False
) -> tuple[Case, ...]:
    """The cases, each in a split. `shares` of patients for train, val and test apply to all cases. None: default shares
    apply only to cases without a stated split, and not to splits that are stated for other cases with labels: test
    cases without any leave nothing to sample from. `by_tool`: a tool labels all cases. If the split of one case of a
    patient is stated, it holds for all cases of the patient."""
    stated = {} if shares else {_patient(case): case.split for case in cases if case.split}
    drawn = list(dict.fromkeys(_patient(case) for case in cases if _patient(case) not in stated))
    labelled = (case for case in cases if by_tool or case.is_labelled)
    filled = {case.split for case in labelled if _patient(case) in stated} - {"train", ""}
    weights = [
        0.0 if split in filled else share for split, share in zip(SPLITS, shares or _DEFAULT_SHARES, strict=True)
    ]
    split_of = stated | _drawn(drawn, weights, seed)
    return tuple(replace(case, split=split_of[_patient(case)]) if shares or not case.split else case for case in cases)


def drawn_notes(listed: Sequence[Case], cases: Sequence[Case]) -> list[str]:
    """What to say if the data state the split of some cases, for training or validation, and others were drawn.
    `listed`: the cases before the draw."""
    drawn = [case.case_id for case in listed if not case.split]
    if not drawn or not any(case.split in ("train", "val") for case in listed):
        return []
    split_of = {case.case_id: case.split for case in cases}
    where = f"the data state no split of {len(drawn)} of {len(listed)} cases, as {drawn[0]}, which is put into"
    return [f"{where} {split_of[drawn[0]]}; --prepare.split draws all of them"]


def capital_notes(cases: Sequence[Case]) -> list[str]:
    """What to say of patients, or cases that count as patients, whose names differ in capitals alone."""
    of_name: dict[str, list[str]] = {}
    for name in dict.fromkeys(_patient(case) for case in cases):
        of_name.setdefault(name.casefold(), []).append(name)
    twins = [names for names in of_name.values() if len(names) > 1]
    if not twins:
        return []
    more = f" ({len(twins) - 1} more such names)" if len(twins) > 1 else ""
    where = f"{twins[0][0]} and {twins[0][1]} count as two patients{more}"
    return [f"{where}: if they are one, write one name, in a manifest's column `patient` or for the files"]


def patient_problems(cases: Sequence[Case]) -> list[Problem]:
    """Problems of patients that the data put into two splits."""
    splits_of: dict[str, set[str]] = {}
    for case in cases:
        splits_of.setdefault(_patient(case), set()).add(case.split)
    remedy = "put all cases of a patient into one split, or let --prepare.split do it"
    return [
        Problem("splits", f"patient {patient}", " and ".join(sorted(splits)), remedy)
        for patient, splits in sorted(splits_of.items())
        if len(splits) > 1
    ]


def untrained_notes(cases: Sequence[Case]) -> list[str]:
    """What to say if the data put no case into split train, as an export of the images of test masks."""
    splits = sorted({case.split for case in cases})
    if not cases or "train" in splits:
        return []
    return [f"no case is in split train, all are in {' and '.join(splits)}: --prepare.split 0.7 0.1 0.2 draws others"]


def patient_notes(cases: Sequence[Case]) -> list[str]:
    """What to say of cases in two splits whose names are alike but for their last part, as p7_1 and p7_2, if nothing
    says which patient they are of. A name that many cases begin with is that of the data set. Channels of a case are of
    a patient with its name."""
    of_name: dict[str, list[Case]] = {}
    for case in cases:
        if named := _ALIKE.fullmatch(_own_name(case)):
            of_name.setdefault(named[1], []).append(case)
    parted = [
        found
        for _, found in sorted(of_name.items())
        if len(of_name) > 1
        and len(set(map(_own_name, found))) <= MOST_SCANS
        and len({case.split for case in found}) > 1
    ]
    if not parted:
        return []
    one = parted[0][0]
    other = next(case for case in parted[0] if case.split != one.split)
    more = f" ({len(parted) - 1} more such names)" if len(parted) > 1 else ""
    named = _ALIKE.fullmatch(_own_name(one))
    pattern = _BEFORE_DATE if named and named[2] else _BEFORE_LAST
    where = f"{one.case_id} is in {one.split} and {other.case_id} in {other.split}{more}"
    return [f"{where}: if they are scans of one patient, --prepare.patient '{pattern}' keeps them in one split"]


def _own_name(case: Case) -> str:
    """The name of a case that counts as a patient, without its channel; empty if something says the patient."""
    if case.patient is None:
        return case.case_id
    return case.patient if case.case_id == f"{case.patient}-{case.modality}" else ""


def pattern_problems(cases: Sequence[Case], pattern: str | None) -> list[Problem]:
    """A problem if the pattern for patients fits no case: each would count as a patient."""
    if pattern is None or not cases or any(case.patient is not None for case in cases):
        return []
    remedy = "the first group is the patient: '(.+)_' finds p7 in p7_1"
    return [Problem("prepare", "patient", f"{pattern!r} fits no case id, as {cases[0].case_id}", remedy)]


def _patient(case: Case) -> str:
    return case.patient or case.case_id


def _drawn(patients: Sequence[str], weights: Sequence[float], seed: int) -> dict[str, str]:
    """Each patient's split. Shares are rounded to whole patients; val and test get one each as soon as there are
    enough."""
    total = sum(weights) or 1.0
    ordered = sorted(patients, key=lambda one: hashlib.sha256(f"{seed} {one}".encode()).hexdigest())
    counts = [round(len(ordered) * weight / total) for weight in weights]
    for at, least in ((1, 2), (2, 3)):
        if weights[at] > 0 and counts[at] == 0 and len(ordered) >= least:
            counts[at] = 1
    last = len(ordered) - counts[2]
    return {
        patient: "test" if at >= last else "val" if at >= last - counts[1] else "train"
        for at, patient in enumerate(ordered)
    }
