"""Full disks: a stage runs on a disk that has less room than it needs, which it must say in words; with more room the
same command continues, and what it has made is compared with what an undisturbed run made, byte by byte."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from campaign import record
from campaign.kills import MOST_S, Kills, differences, restarted
from campaign.stage_runs import STAGES, StageRun

_PAGE = 4096
_SAID = ("no space left", "are free", "No space left", "Disk quota")


def fill_disks(names: list[str], number: int, seed: int, end: float, out: Path) -> bool:
    """Up to `number` full disks, the stages in turn, until `end`. Whether one was a fault. Needs to be root, since each
    disk is a tmpfs."""
    chosen = [stage for stage in STAGES if not names or stage.title in names]
    file, is_bad = out / "disks.jsonl", False
    there = {(line["number"], line["stage"]) for line in record.lines(file) if line["seed"] == seed}
    kills = Kills(Path(out).resolve() / "kills")  # the same undisturbed runs; not at the same time
    try:
        kills.undisturbed(max(chosen, key=STAGES.index))
        for at in range(number):
            stage = chosen[at % len(chosen)]
            if (at, stage.title) in there:
                continue
            if time.monotonic() > end:
                break
            found = fill_once(kills, stage, random.Random(f"{stage.title}/{seed}/{at}"))
            line = {"stage": stage.title, "seed": seed, "number": at} | found
            is_bad |= record.append_comparison(file, line)
    finally:
        kills.end()
    return is_bad


def fill_once(kills: Kills, stage: StageRun, rng: random.Random) -> dict[str, Any]:
    """One full disk, the same command with more room, and the comparison."""
    before, after = (_room(folder) for folder in (kills.before(stage), kills.after(stage)))
    size = before + int(rng.uniform(0.0, 0.9) * (after - before)) // _PAGE * _PAGE + _PAGE
    shutil.rmtree(kills.work, ignore_errors=True)
    kills.work.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(kills.work))
    begun = time.monotonic()
    try:
        shutil.copytree(kills.before(stage), kills.work, dirs_exist_ok=True)
        command = kills.start(stage)
        code, said = command.wait(MOST_S), command.said()
        found: dict[str, Any] = {"room": size - before, "exit_code": code, "what": "", "outcome": "the same bytes"}
        if code is None:
            found |= {"outcome": "hung", "what": said[-800:]}
        elif code == 0:
            found |= {"outcome": "the same bytes", "what": "the room was enough"}
        elif "Traceback" in said or code not in (1, 2) or not any(words in said for words in _SAID):
            found |= {"outcome": "unclean", "what": f"exit code {code}: {said[-1200:]}"}
        _mount("-o", "remount,size=1g", str(kills.work))
        if code != 0 and found["outcome"] == "the same bytes":
            found |= restarted(kills.start(stage))
        if found["outcome"] == "the same bytes" and (differing := differences(kills.after(stage), kills.work)):
            found |= {"outcome": "other bytes", "what": ", ".join(differing[:8])}
    finally:
        subprocess.run(["umount", "--lazy", str(kills.work)], check=True)
    return found | {"seconds": round(time.monotonic() - begun, 1)}


def _room(folder: Path) -> int:
    """What the files take on a tmpfs: whole pages."""
    return sum(-(-file.stat().st_size // _PAGE) * _PAGE for file in folder.rglob("*") if file.is_file())


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """A row a stage."""
    outcomes = record.KILL_OUTCOMES
    found = [["stage", "full disks", "said, before or during the work", "the room was enough", *outcomes]]
    titles = list(dict.fromkeys(row["stage"] for row in rows))
    for title in [*titles, "all"]:
        own = [row for row in rows if title in (row["stage"], "all")]
        said = sum(row["exit_code"] in (1, 2) for row in own)
        enough = sum(row["exit_code"] == 0 for row in own)
        counts = [f"{sum(row['outcome'] == outcome for row in own)}" for outcome in outcomes]
        found.append([title, f"{len(own)}", f"{said}", f"{enough}", *counts])
    return record.as_table(found)
