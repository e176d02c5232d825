"""The split of a case, if the data do not state it: drawn by patient, so that all scans of a patient are in one split.

Patients are ordered by a digest of the seed and their name. So the draw depends on nothing else, and a new patient
changes the split of few others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from data_shards.ingest.cases import Case
from data_shards.problems import Problem
from data_shards.records import SPLITS

_DEFAULT_SHARES = (0.7, 0.1, 0.2)


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
