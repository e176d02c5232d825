"""Shared code of all benchmarks: contenders measured in turns, ratios with their spread, a table and a JSON file.

A contender is a callable that opens what it needs, does a timed piece of work, closes again, and returns (units done,
seconds of the timed piece). So no contender's workers are alive during another's turn. Each round measures every
contender once, beginning with another one each time, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from data_shards.problems import InputProblems

Contender = Callable[[], tuple[float, float]]

_PACKAGES = (
    *("torch", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset", "zarr", "ray", "numpy", "pillow"),
    *("diffusers", "deepspeed", "accelerate"),
)


# Features that decide how fast a CPU multiplies, with their names in /proc/cpuinfo.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with their smallest and largest value."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self.rounds), "max": max(self.rounds), "rounds": list(self.rounds)}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast `name` is as `against`, round by round; `target` is what it should reach."""

    name: str
    against: str
    spread: Spread
    target: float | None = None

    def __str__(self) -> str:
        low, high = min(self.spread.rounds), max(self.spread.rounds)
        text = f"{self.name} / {self.against}: {self.spread.median:.2f}x ({low:.2f} .. {high:.2f})"
        if self.target is None:
            return text
        return f"{text}, target {self.target:g}x: {'reached' if self.spread.median >= self.target else 'NOT reached'}"


def arguments(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The flags of every benchmark; add your own to it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works: one round")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each contender is measured")
    return parser


def measure(
    contenders: Mapping[str, Contender], rounds: int, goes_on: Callable[[], bool] = lambda: True
) -> dict[str, Spread]:
    """Units a second of every contender, from `rounds` rounds in turns, or fewer if `goes_on` returns False after
    one."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            units, seconds = contenders[name]()
            rates[name].append(units / seconds)
            print(f"  round {number + 1}/{rounds}  {name:<44} {_rate(units / seconds):>12}", flush=True)
        if not goes_on():
            break
    return {name: Spread(tuple(values)) for name, values in rates.items()}


def compare(rates: Mapping[str, Spread], name: str, against: str, target: float | None = None) -> Ratio:
    """The ratio of two contenders within each round: what slows both cancels."""
    pairs = zip(rates[name].rounds, rates[against].rounds, strict=True)
    return Ratio(name, against, Spread(tuple(a / b for a, b in pairs)), target)


def time_batches(
    batches: Iterable[Any],
    num_batches: int,
    warm_up: int,
    units: Callable[[Any], int],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, float]:
    """Take `warm_up` batches, then time `num_batches`: (units in them, seconds by the clock)."""
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    done, start = 0, clock()
    for _ in range(num_batches):
        done += units(next(iterator))
    return done, clock() - start


def report(
    args: argparse.Namespace,
    rates: Mapping[str, Spread],
    ratios: Sequence[Ratio],
    *,
    unit: str,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print the table and write args.json; the record that was written. `notes`: further measurements and settings, by
    name."""
    record = stamp(args)
    print(f"\n{headline(record)}\n")
    print(f"{unit:<48} {'median':>12} {'min':>12} {'max':>12}")
    for name, spread in rates.items():
        median, low, high = (_rate(value) for value in (spread.median, min(spread.rounds), max(spread.rounds)))
        print(f"{name:<48} {median:>12} {low:>12} {high:>12}")
    print()
    for ratio in ratios:
        print(ratio)
    for name, value in (notes or {}).items():
        print(f"{name}: {value}")
    record |= {
        "unit": unit,
        "rows": [{"name": name, **spread.to_json()} for name, spread in rates.items()],
        "ratios": [{"name": r.name, "against": r.against, "target": r.target, **r.spread.to_json()} for r in ratios],
        "notes": dict(notes or {}),
    }
    write(args.json, record)
    return record


def run_script(main: Callable[[], int]) -> None:
    """Exit with a script's status; wrong input is a line for each problem, and status 2."""
    try:
        raise SystemExit(main())
    except InputProblems as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def stamp(args: argparse.Namespace, without: Sequence[str] = ()) -> dict[str, Any]:
    """The stamp of a measurement: time, machine, versions, arguments and commit. Arguments `without` belong to a
    machine and are left out."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "arguments": {k: str(value) for k, value in vars(args).items() if k != "json" and k not in without},
    }


def headline(record: Mapping[str, Any]) -> str:
    """The stamp in three lines."""
    machine, source = record["hardware"], record["commit"]
    return (
        f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), "
        f"{machine['cores']} cores, {machine['ram_gib']} GiB, GPU {machine['gpu'] or 'none'}\n"
        f"{', '.join(f'{name} {version}' for name, version in record['versions'].items())}\n"
        f"commit {source['revision']}{' with uncommitted changes' if source['dirty'] else ''}"
    )


def write(file: Path | None, record: Mapping[str, Any], *, quiet: bool = False) -> None:
    """Write `record` as JSON, if a file was given; unless quiet, print its path."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {file}")


def hardware() -> dict[str, Any]:
    """CPU model, what it has for arithmetic, the cores this process may use, memory in GiB, the GPU's name or None."""
    import torch

    info = {"model name": platform.processor() or platform.machine(), "flags": ""}
    file = Path("/proc/cpuinfo")
    if file.is_file():  # of the first core
        lines = (line.split(":", 1) for line in file.read_text().split("\n\n")[0].splitlines() if ":" in line)
        info |= {name.strip(): value.strip() for name, value in lines}
    flags = info["flags"].split()
    return {
        "cpu": info["model name"],
        "cpu_features": [flag for flag in _CPU_FEATURES if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Python's version and those of the engines that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The revision of the source tree and whether files differ from it; "unknown" outside of a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"revision": "unknown", "dirty": True}


def _rate(value: float) -> str:
    """Three digits of a small rate, whole numbers of a large one."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
