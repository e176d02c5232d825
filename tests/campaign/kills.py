"""Random kills: a stage runs, a random process of it is killed at a random moment, the same command runs again, and
what it has made is compared with what an undisturbed run made, byte by byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import yaml

from campaign import record

# Files that say when, how fast or by whom something was made; others must be the same.
UNSTABLE = (
    "mlflow.*", "mlartifacts/*", "*.mlflow*", "*/mlflow.json", "*.log", "*/log.jsonl", "*.lock", "*/report.html",
    "*/samples/done/*", "*/tracking*", "*.unfinished*", "*/exported.json",
)  # fmt: skip
_MOST_S = 600.0
# Processes that outlive a killed command end by themselves within this time.
_ENDING_S = 30.0


@dataclass(frozen=True)
class StageRun:
    """A command on the folder of the campaign, after those before it."""

    name: str
    flags: tuple[str, ...] = ()

    def command(self, work: Path) -> list[str]:
        flags = [flag.format(work=work) for flag in self.flags]
        config = [] if self.name == "convert" else ["--config", str(work / "config.yaml")]
        return [sys.executable, "-m", "segdiff_dist", self.name, *flags, *config, "--quiet"]


STAGES = (
    StageRun("phantom"),
    StageRun("prepare"),
    StageRun("convert", ("{work}/data", "{work}/zarr", "--convert.store", "zarr")),
    StageRun("train-segmenter"),
    StageRun("train"),
    StageRun("sample"),
    StageRun("evaluate"),
    StageRun("export", ("{work}/exported", "--format", "png")),
)


def kill_stages(names: list[str], number: int, seed: int, end: float, out: Path) -> bool:
    """Up to `number` kills, the stages in turn, until `end`. Whether one was a fault."""
    chosen = [stage for stage in STAGES if not names or stage.name in names]
    file, is_bad = out / "kills.jsonl", False
    there = [line for line in record.lines(file) if line["seed"] == seed]
    place = Path(out).resolve() / "kills"
    made = _undisturbed(place, max(STAGES.index(stage) for stage in chosen))
    for at in range(number):
        stage = chosen[at % len(chosen)]
        if any(line["number"] == at and line["stage"] == stage.name for line in there):
            continue
        if time.monotonic() > end:
            break
        line = {"stage": stage.name, "seed": seed, "number": at}
        found = None
        while found is None and time.monotonic() < end:
            found = kill_once(place, stage, made, random.Random(f"{stage.name}/{seed}/{at}"))
        if found is None:
            break
        record.append(file, line | found)
        if found["outcome"] != "the same bytes":
            is_bad = True
            print(f"{stage.name} {at}: {found['outcome']}: {found['what']}", flush=True)
    return is_bad


def _undisturbed(place: Path, last: int) -> dict[str, float]:
    """Every stage once, with a copy of the folder before each; the seconds that each took, by name."""
    work, times = place / "work", place / "seconds.yaml"
    made: dict[str, float] = yaml.safe_load(times.read_text()) if times.is_file() else {}
    for index, stage in enumerate(STAGES[: last + 1]):
        if stage.name in made:
            continue
        shutil.rmtree(work, ignore_errors=True)
        if index:
            shutil.copytree(place / f"after-{STAGES[index - 1].name}", work)
        else:
            work.mkdir(parents=True)
            (work / "config.yaml").write_text(yaml.safe_dump(_config(work)))
            shutil.copytree(work, place / "before", dirs_exist_ok=True)
        begun = time.monotonic()
        ended = subprocess.run(stage.command(work), capture_output=True, text=True, env=_environment(), timeout=_MOST_S)
        if ended.returncode != 0:
            raise RuntimeError(f"{stage.name}, undisturbed: exit code {ended.returncode}: {ended.stderr[-800:]}")
        made[stage.name] = time.monotonic() - begun
        shutil.rmtree(place / f"after-{stage.name}", ignore_errors=True)
        shutil.copytree(work, place / f"after-{stage.name}")
        times.write_text(yaml.safe_dump(made))
    return made


def _config(work: Path) -> dict[str, Any]:
    from segdiff_dist.shipped import find_config

    config = yaml.safe_load(Path(find_config("smoke")).read_text())
    config |= {name: str(work / name) for name in ("amos_root", "data", "run")}
    config["train"] |= {"num_images": 64, "checkpoint_every_images": 16, "snapshot_every_images": 32}
    config["segmenter"]["train"] |= {"num_images": 128, "checkpoint_every_images": 32}
    config["prepare"] |= {"num_workers": 2}
    config["sample"] |= {"num_workers": 2, "region_size": 2}
    config["evaluate"] |= {"num_workers": 1}
    config["tracking"] = {"enabled": False}
    return config


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def kill_once(place: Path, stage: StageRun, made: dict[str, float], rng: random.Random) -> dict[str, Any] | None:
    """One kill, the same command until it ends well, and the comparison. None: the command ended before; the time that
    it took is then in `made`."""
    work, index = place / "work", STAGES.index(stage)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(place / (f"after-{STAGES[index - 1].name}" if index else "before"), work)
    begun = time.monotonic()
    moment = rng.uniform(0.2, 1.0) * made[stage.name]
    code, victim, said = _run_and_kill(stage.command(work), moment, rng)
    if victim == "nobody":
        made[stage.name] = time.monotonic() - begun
        return None
    found: dict[str, Any] = {"moment_s": round(moment, 2), "victim": victim, "what": "", "outcome": "the same bytes"}
    if "Traceback" in said:
        found |= {"outcome": "unclean", "what": f"after the kill: {said[-1200:]}"}
    elif code is None:
        found |= {"outcome": "hung", "what": f"it did not end in {_MOST_S:g} s: {said[-800:]}"}
    if code != 0 and found["outcome"] == "the same bytes":
        found |= _restarted(stage.command(work))
    if found["outcome"] == "the same bytes" and (differing := differences(place / f"after-{stage.name}", work)):
        found |= {"outcome": "other bytes", "what": ", ".join(differing[:8])}
    return found | {"exit_code": code, "seconds": round(time.monotonic() - begun, 1)}


def _restarted(command: list[str]) -> dict[str, Any]:
    try:
        again = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=_MOST_S)
    except subprocess.TimeoutExpired:
        return {"outcome": "hung", "what": "the restarted command did not end"}
    if again.returncode != 0:
        return {"outcome": "not restarted", "what": f"exit code {again.returncode}: {again.stderr[-1200:]}"}
    return {}


def _run_and_kill(command: list[str], moment: float, rng: random.Random) -> tuple[int | None, str, str]:
    """Exit code, None where it hung; who was killed; and the error stream. No process is left."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    there = psutil.Process(process.pid)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    victim, children = "nobody", []
    with suppress(psutil.Error, ProcessLookupError):
        children = there.children(recursive=True) if process.poll() is None else []
        chosen = rng.choice([there, *children])
        name = "command" if chosen == there else " ".join(chosen.cmdline())[:60] or chosen.name()
        if process.poll() is None:
            os.kill(chosen.pid, signal.SIGKILL)
            victim = name
    try:
        _, said = process.communicate(timeout=_MOST_S)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code, said = None, ""
    _, alive = psutil.wait_procs(children, timeout=_ENDING_S)
    for one in alive:
        with suppress(psutil.Error):
            one.kill()
    left = f"processes left: {[' '.join(one.cmdline())[:80] for one in alive if one.is_running()]}" if alive else ""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return (None if alive else code), victim, said + left


def differences(expected: Path, found: Path) -> list[str]:
    """Files that differ, are missing or are too many, but for those that are never the same."""
    names = {str(file.relative_to(root)) for root in (expected, found) for file in root.rglob("*") if file.is_file()}
    kept = sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in UNSTABLE))
    return [name for name in kept if _content(expected / name) != _content(found / name)]


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
