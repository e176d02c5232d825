"""Random kills: a stage runs, a random process of it is killed at a random moment, the same command runs again, and
what it has made is compared with what an undisturbed run made, byte by byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import yaml

from campaign import record
from campaign.forks import Command, Forks
from campaign.stage_runs import STAGES, StageRun, config_of, environment

# Files that say when, how fast or by whom something was made; others must be the same.
UNSTABLE = (
    "mlflow.*", "mlartifacts/*", "*.mlflow*", "*/mlflow.json", "*.log", "*/log.jsonl", "*.lock", "*/report.html",
    "*/done/*", "*/annotations.json", "*/tracking*", "*.unfinished*", "*/exported.json",
)  # fmt: skip
MOST_S = 600.0
# Of victims: the command itself.
COMMAND = "command"
# Processes that outlive a killed command end by themselves within this time. Ray's agents look for their raylet five
# times, on an idle machine within 10 s.
_ENDING_S = 120.0


def kill_stages(names: list[str], number: int, seed: int, end: float, out: Path) -> bool:
    """Up to `number` kills, until `end`. Whether one was a fault. Every stage once, then all get the same time: short
    ones are killed more often. `names`: as in the table (`sample`, `sample on Ray`)."""
    chosen = [stage for stage in STAGES if stage.is_killed and (not names or stage.title in names)]
    file, is_bad = out / "kills.jsonl", False
    there = [line for line in record.lines(file) if line["seed"] == seed]
    kills = Kills(Path(out).resolve() / "kills")
    try:
        kills.undisturbed(max(chosen, key=STAGES.index))
        while sum(len(line["victims"]) for line in there) < number:
            seconds = {one: [line["seconds"] for line in there if line["stage"] == one.title] for one in chosen}
            stage = min(chosen, key=lambda one: (min(1, len(seconds[one])), sum(seconds[one])))
            at = len(seconds[stage])
            found = None
            while found is None and time.monotonic() < end:
                found = kill_once(kills, stage, random.Random(f"{stage.title}/{seed}/{at}"))
            if found is None:
                break
            there.append({"stage": stage.title, "seed": seed, "number": at} | found)
            is_bad |= record.append_comparison(file, there[-1])
    finally:
        kills.end()
    return is_bad


class Kills:
    """Kills of stages in one folder: copies of it before each stage, and a process that starts commands."""

    def __init__(self, place: Path) -> None:
        self.work, self._place, self._times = place / "work", place, place / "seconds.yaml"
        place.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = yaml.safe_load(self._times.read_text()) if self._times.is_file() else {}
        self._forks: Forks | None = None

    def end(self) -> None:
        """No process is left."""
        if self._forks is not None:
            self._forks.end()

    def before(self, stage: StageRun) -> Path:
        """The folder as the stage finds it."""
        index = STAGES.index(stage)
        return self._place / (f"after-{STAGES[index - 1].folder}" if index else "before")

    def after(self, stage: StageRun) -> Path:
        """As an undisturbed run leaves it."""
        return self._place / f"after-{stage.folder}"

    def refresh(self, stage: StageRun) -> None:
        """Make the work's folder what the stage finds."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before(stage), self.work)

    def start(self, stage: StageRun, ray: str = "local") -> Command:
        """The stage's command, in a process with the libraries of all stages. `ray`: the address of a cluster."""
        if self._forks is None:
            self._forks = Forks(sorted(self._place.glob("*.modules")), environment())
        return self._forks.start(stage.arguments(self.work, ray), self._place / "errors.log")

    def undisturbed(self, last: StageRun) -> None:
        """Every stage up to this one, once, as a command of its own."""
        if not (self._place / "before").is_dir():
            (self._place / "before").mkdir()
            (self._place / "before/config.yaml").write_text(yaml.safe_dump(config_of(self.work)))
        for stage in STAGES[: STAGES.index(last) + 1]:
            if stage.title in self.seconds:
                continue
            modules = self._place / f"{stage.folder}.modules"
            self._run_well(stage, (), modules)
            shutil.rmtree(self.after(stage), ignore_errors=True)
            shutil.copytree(self.work, self.after(stage))
            self.seconds[stage.title] = self._run_well(stage, (modules,)) if stage.is_killed else 0.0
            if differing := differences(self.after(stage), self.work):
                raise RuntimeError(f"{stage.title}, undisturbed, twice: other bytes: {', '.join(differing[:8])}")
            self._times.write_text(yaml.safe_dump(self.seconds))

    def _run_well(self, stage: StageRun, libraries: Sequence[Path], modules: Path | None = None) -> float:
        """Seconds of a stage that nothing disturbs. `modules`: where the names of its modules go."""
        self.refresh(stage)
        forks = Forks(libraries, environment())
        command = forks.start(stage.arguments(self.work), self._place / "errors.log", modules)
        begun = time.monotonic()
        code = command.wait(MOST_S)
        forks.end()
        if code != 0:
            raise RuntimeError(f"{stage.title}, undisturbed: exit code {code}: {command.said()[-800:]}")
        return time.monotonic() - begun


def kill_once(kills: Kills, stage: StageRun, rng: random.Random) -> dict[str, Any] | None:
    """One kill, or more of the restarted command; the same command until it ends well; and the comparison.
    None: the command ended before; the time that it took is then in `kills.seconds`."""
    kills.refresh(stage)
    begun, found, victims, code = time.monotonic(), {}, [], None
    for _ in range(rng.choice((1, 2, 3))):
        started, moment = time.monotonic(), drawn_share(rng) * kills.seconds[stage.title]
        command = kills.start(stage)
        code, victim, said = _run_and_kill(command, (moment, 0.9 * kills.seconds[stage.title]), rng)
        if victim is None and not victims:
            kills.seconds[stage.title] = time.monotonic() - started
            return None
        victims += [] if victim is None else [victim]
        if "Traceback" in said:
            found = {"outcome": "unclean", "what": f"after the kill: {said[-1200:]}"}
        elif code is None:
            found = {"outcome": "hung", "what": said[-800:]}
        elif victim is None:
            found = outcome_of(code, said)
        if found or code == 0:
            break
    if code != 0 and not found:
        found = restarted(kills.start(stage))
    found = compared(kills, stage, found)
    return found | {"victims": victims, "exit_code": code, "seconds": round(time.monotonic() - begun, 1)}


def compared(kills: Kills, stage: StageRun, found: dict[str, Any]) -> dict[str, Any]:
    """The outcome: that which was found, else of the files."""
    is_refused = found.get("outcome") == record.REFUSED
    if found and not is_refused:
        return found
    differing = differences(kills.after(stage), kills.work)
    if not differing:  # an export gets its name when it is complete; a complete one is refused
        return {"outcome": "the same bytes", "what": ""}
    return found if is_refused else {"outcome": "other bytes", "what": ", ".join(differing[:8])}


def drawn_share(rng: random.Random) -> float:
    """The moment of a kill, as a share of the command's time: at its start, at its end, or anywhere."""
    return rng.uniform(*rng.choice(((0.0, 0.15), (0.85, 1.0), (0.0, 1.0))))


def restarted(command: Command) -> dict[str, Any]:
    """Nothing where the command ends well; else the outcome, and what it said."""
    code = command.wait(MOST_S)
    if code is None:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        return {"outcome": "hung", "what": f"the restarted command did not end: {command.said()[-800:]}"}
    return outcome_of(code, command.said())


def outcome_of(code: int, said: str) -> dict[str, Any]:
    """Nothing of a restarted command that ended well."""
    if code == 2:
        return {"outcome": record.REFUSED, "what": said[-1200:]}
    return {} if code == 0 else {"outcome": "not restarted", "what": f"exit code {code}: {said[-1200:]}"}


def _run_and_kill(
    command: Command, moments: tuple[float, float], rng: random.Random
) -> tuple[int | None, str | None, str]:
    """Exit code, None where it hung; who was killed, if one was; and the error stream. No process is left. `moments`:
    of the kill; and until when a child that is to be killed is waited for."""
    (moment, latest), is_of_child = moments, rng.random() < 0.6
    victim, children, begun = None, [], time.monotonic()
    if command.wait(moment) is None:
        with suppress(psutil.Error, ProcessLookupError):
            there = psutil.Process(command.pid)
            children = there.children(recursive=True)
            while is_of_child and not children and time.monotonic() - begun < latest:
                if command.wait(0.05) is not None:
                    break
                children = there.children(recursive=True)
            chosen = rng.choice(children) if children and is_of_child else there
            name = COMMAND if chosen == there else _name(chosen)
            if chosen.status() != psutil.STATUS_ZOMBIE:
                chosen.kill()
                victim = name
    code = command.wait(MOST_S)
    _, alive = psutil.wait_procs(children, timeout=_ENDING_S)
    for one in alive:
        with suppress(psutil.Error):
            one.kill()
    left = f"processes left after {_ENDING_S:g} s: {[_name(one) for one in alive]}" if alive else ""
    with suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGKILL)
    return (None if alive else code), victim, command.said() + left


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[:80] or process.name()
    return "a process that has ended"


def differences(expected: Path, found: Path) -> list[str]:
    """Files that differ, are missing or are too many, but for those that are never the same."""
    names = {str(file.relative_to(root)) for root in (expected, found) for file in root.rglob("*") if file.is_file()}
    kept = sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in UNSTABLE))
    return [name for name in kept if _content(expected / name) != _content(found / name)]


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
