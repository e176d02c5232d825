"""Odd places: a stage runs where something is missing, full, long, old or dead. It must make the bytes that an ordinary
run makes, or be refused in words before it starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaign import record
from campaign.kills import MOST_S, Kills, differences
from campaign.stage_runs import STAGES, StageRun, environment

WAITS = "says for whom it waits"
_DEAD = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Place:
    """`{place}`: a folder that is there. `shell` runs before the command, as root, in a mount namespace of its own.
    `ctrl_c_s`: after so many seconds, somebody presses Ctrl-C."""

    title: str
    variables: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    shell: str = ""
    ctrl_c_s: int = 0


PLACES = (
    Place("HOME unset", unset=("HOME",)),
    Place("HOME not there", {"HOME": "/nowhere"}),
    Place("HOME read-only", {"HOME": "{place}"}, shell="mount -t tmpfs -o ro tmpfs {place}"),
    Place("TMPDIR not there", {"TMPDIR": "/nowhere"}),
    Place("TMPDIR of 140 letters", {"TMPDIR": "{place}/" + "t" * 140}, shell="mkdir -p {place}/" + "t" * 140),
    Place(
        "TMPDIR full",
        {"TMPDIR": "{place}"},
        shell="mount -t tmpfs -o size=64k tmpfs {place}; head -c 64k /dev/zero > {place}/x || true",
    ),
    Place("no /dev/shm", shell="mount -t tmpfs -o ro tmpfs /dev/shm"),
    Place("/dev/shm of 64 KiB", shell="mount -t tmpfs -o size=64k tmpfs /dev/shm"),
    Place("RANK and WORLD_SIZE of another job", {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}),
    Place("RANK that is no number", {"RANK": "x", "WORLD_SIZE": "2"}),
    Place(
        "MASTER_ADDR of a job that has ended",
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29712"},
        ctrl_c_s=150,
    ),
    Place("Slurm's variables", {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_NTASKS_PER_NODE": "8"}),
    Place("a dead proxy", dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _DEAD)),
    Place("umask 077", shell="umask 077"),
)
# What they are tried on: local processes, Ray, DALI and DeepSpeed.
_TRIED = ("prepare", "train", "sample", "sample on Ray", "evaluate")


def try_places(names: list[str], number: int, end: float, out: Path) -> bool:
    """Up to `number` runs, each of a stage in a place, until `end`. Whether one was a fault. Needs to be root."""
    file, is_bad = out / "places.jsonl", False
    stages = [stage for stage in STAGES if stage.title in (names or _TRIED)]
    there = {(line["place"], line["stage"]) for line in record.lines(file)}
    kills = Kills(Path(out).resolve() / "kills")  # the same undisturbed runs; not at the same time
    kills.undisturbed(max(stages, key=STAGES.index))
    waiting = [(place, stage) for place in PLACES for stage in stages if (place.title, stage.title) not in there]
    for place, stage in waiting[:number]:
        if time.monotonic() > end:
            break
        line = {"place": place.title, "stage": stage.title} | run_there(kills, stage, place)
        record.append(file, line)
        if line["outcome"] not in ("the same bytes", record.REFUSED, WAITS):
            is_bad = True
            print(f"{stage.title}, {place.title}: {line['outcome']}: {line['what']}", flush=True)
    return is_bad


def run_there(kills: Kills, stage: StageRun, place: Place) -> dict[str, Any]:
    """What became of it."""
    kills.refresh(stage)
    folder = kills.work.parent / "place"
    folder.mkdir(exist_ok=True)
    filled = {name: value.replace("{place}", str(folder)) for name, value in place.variables.items()}
    variables = {name: value for name, value in environment().items() if name not in place.unset} | filled
    command = [sys.executable, "-m", "segdiff_dist", *stage.arguments(kills.work)]
    if place.shell:
        script = f"set -e; {place.shell.replace('{place}', shlex.quote(str(folder)))}; exec {shlex.join(command)}"
        command = ["unshare", "--mount", "sh", "-c", script]
    if place.ctrl_c_s:
        command = ["timeout", "--preserve-status", "--signal", "INT", str(place.ctrl_c_s), *command]
    begun = time.monotonic()
    try:
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=MOST_S, check=False)
    except subprocess.TimeoutExpired as error:
        return {"outcome": "hung", "what": str(error.stderr)[-800:], "seconds": MOST_S}
    found = {"outcome": "the same bytes", "what": ended.stderr[-800:], "exit_code": ended.returncode}
    if "Traceback" in ended.stderr:
        found["outcome"] = "unclean"
    elif ended.returncode == 2:
        found["outcome"] = record.REFUSED
    elif ended.returncode == 130 and "has waited" in ended.stderr:
        found["outcome"] = WAITS
    elif ended.returncode != 0:
        found["outcome"] = "failed"
    elif differing := differences(kills.after(stage), kills.work):
        found |= {"outcome": "other bytes", "what": ", ".join(differing[:8])}
    return found | {"seconds": round(time.monotonic() - begun, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """A row a place, a column a stage."""
    titles = list(dict.fromkeys(row["stage"] for row in rows))
    found = [["place", *titles]]
    for place in dict.fromkeys(row["place"] for row in rows):
        outcomes = {row["stage"]: row["outcome"] for row in rows if row["place"] == place}
        found.append([place, *(outcomes.get(title, "") for title in titles)])
    return record.as_table(found)
