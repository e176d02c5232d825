"""The tour in the README, tried line by line: each must work, within ten minutes and 6 GiB of memory."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from campaign import record

ROOT = Path(__file__).parents[2]
MOST_S, MOST_BYTES = 600.0, 6 * 2**30


def lines() -> list[str]:
    """The lines of the tour that call segdiff, without their remarks."""
    text = (ROOT / "README.md").read_text().split("## A tour\n")[1].split("mlflow ui")[0]
    found = re.findall(r"^    (segdiff .*)$", text, re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in found]


def try_tour(out: Path, end: float, most_s: float = MOST_S) -> bool:
    """Every line that is not in the record yet, in OUT/tour, until `end`. Whether one failed. `most_s`: more beside
    other work; the record has the processor time too."""
    file, place, is_bad = out / "tour.jsonl", (out / "tour").resolve(), False
    done = [line["command"] for line in record.lines(file)]
    if not done:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (place / "launch").symlink_to(ROOT / "launch")
    for command in lines():
        if command in done:
            continue
        if time.monotonic() > end:
            break
        found = run_line(command, place, most_s)
        if found["outcome"] != "works":
            is_bad = True
            print(f"{command}: {found['outcome']}: {found['what']}", flush=True)
            break  # later lines need what this one makes
        record.append(file, {"command": command} | found)
    return is_bad


def run_line(command: str, place: Path, most_s: float = MOST_S, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Seconds, processor time and peak memory of all processes of the line, and whether it works."""
    arguments = [sys.executable, "-m", "segdiff_dist", *shlex.split(command)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log, before = place / "tour.log", _cpu_s()
    with log.open("w") as said:
        process = subprocess.Popen(arguments, cwd=place, env=environment, stdout=said, stderr=said)
        begun, peak, outcome = time.monotonic(), 0, ""
        while process.poll() is None and not outcome:
            time.sleep(0.5)
            peak = max(peak, _bytes_of(process.pid))
            outcome = "too long" if time.monotonic() - begun > most_s else "too large" if peak > most_bytes else ""
        seconds = time.monotonic() - begun
        if outcome:
            _end(process)
    outcome = outcome or ("works" if process.returncode == 0 else f"exit code {process.returncode}")
    what = "" if outcome == "works" else log.read_text()[-800:]
    used = {"seconds": round(seconds, 1), "cpu_seconds": round(_cpu_s() - before, 1), "peak_bytes": peak}
    return {"outcome": outcome, "what": what} | used


def _cpu_s() -> float:
    """Processor time of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _bytes_of(pid: int) -> int:
    """Memory of a process and of those that it started; pages that they share count in parts."""
    total = 0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for one in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


def _end(process: subprocess.Popen[Any]) -> None:
    with suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                one.kill()
    process.kill()
    process.wait()


def table(rows: list[dict[str, Any]]) -> str:
    """A row a line."""
    found = [["line", "outcome", "seconds", "processor s", "GiB"]]
    for row in rows:
        gib = f"{row['peak_bytes'] / 2**30:.1f}"
        found.append([f"`{row['command']}`", row["outcome"], f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", gib])
    return record.as_table(found)
