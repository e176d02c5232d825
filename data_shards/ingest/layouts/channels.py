"""Images with several channels: one is chosen, or each becomes a case of its own modality, of the same patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.ingest.cases import Case, Listing
from data_shards.ingest.layouts.base import Request
from data_shards.problems import Problem


def numbered(named: Any) -> dict[int, Any]:
    """What dataset.json says of each channel, by its number; empty if it does not number them."""
    if not isinstance(named, dict):
        return {}
    return {int(key): value for key, value in named.items() if str(key).isdecimal() and len(str(key)) < 5}


def chosen_channels(
    where: Path, field: str, named: dict[int, Any], request: Request
) -> tuple[list[int], list[Problem]]:
    """The channels that are used: the only one, or those of the settings. `field`: what names them."""
    shown = ", ".join(f"{number} {str(name)[:30]}" for number, name in named.items())
    wanted = [request.channel] if request.channel is not None else list(request.channels or ())
    if not wanted and len(named) > 1:
        remedy = "a slice has one image: choose one with --prepare.channel, or several with --prepare.channels"
        return [], [Problem(str(where), field, f"{len(named)} channels ({shown})", remedy)]
    setting = "channel" if request.channel is not None else "channels"
    if named and (unknown := [one for one in wanted if one not in named]):
        return [], [Problem("prepare", setting, str(unknown[0]), f"choose from {shown}")]
    return wanted or [next(iter(named), 0)], []


def joined(where: Path, listings: Sequence[Listing]) -> Listing:
    """One listing of the same cases in several channels, each with its modality behind the case id."""
    cases = [_of_channel(case) for one in listings for case in one.cases]
    ids = [case.case_id for case in cases]
    problems = [problem for one in listings for problem in one.problems]
    if len(set(ids)) < len(ids):
        twice = next(case for case in cases if ids.count(case.case_id) > 1)
        remedy = "name them apart there, or choose one with --prepare.channel"
        problems.append(Problem(str(where), "channels", f"several are {twice.modality}", remedy))
    problems_of: dict[str, list[Problem]] = {}
    for one in listings:
        modality_of = {case.case_id: case.modality for case in one.cases}
        for case_id, found in one.problems_of.items():
            name = f"{case_id}-{modality_of[case_id]}" if case_id in modality_of else case_id
            problems_of.setdefault(name, []).extend(found)
    first = listings[0]
    cases.sort(key=lambda case: case.case_id)
    return replace(first, cases=tuple(cases), problems=tuple(dict.fromkeys(problems)), problems_of=problems_of)


def _of_channel(case: Case) -> Case:
    patient = case.case_id if case.patient is None else case.patient
    return replace(case, case_id=f"{case.case_id}-{case.modality}", patient=patient)
