"""The campaign's record: a line of JSON for each piece of work, so that a campaign continues; and the table of all."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from campaign.attempts import OUTCOMES


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; the last one of a killed campaign may be cut off."""
    if file.is_file():
        for text in file.read_text().splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def append_comparison(file: Path, line: dict[str, Any]) -> bool:
    """Add what became of a restarted stage. Whether it is a fault, which is also printed."""
    append(file, line)
    is_fault = line["outcome"] != "the same bytes"
    if is_fault:
        print(f"{line['stage']} {line['number']}: {line['outcome']}: {line['what']}", flush=True)
    return bool(is_fault)


def done(file: Path, seed: int) -> Counter[str]:
    """Attempts of this seed so far, by kind."""
    found: Counter[str] = Counter()
    for line in lines(file):
        if line["seed"] == seed:
            found[line["kind"]] = max(found[line["kind"]], line["first"] + line["tried"])
    return found


def table_of_mutations(rows: Iterable[dict[str, Any]]) -> str:
    """A row a kind."""
    counts: dict[str, Counter[str]] = {}
    for line in rows:
        counts.setdefault(line["kind"], Counter()).update(line["counts"])
    total: Counter[str] = sum(counts.values(), Counter())
    found = [["input", "tried", *OUTCOMES]]
    for name, one in [*sorted(counts.items()), ("all", total)]:
        found.append([name, f"{one.total():,}", *(f"{one[outcome]:,}" for outcome in OUTCOMES)])
    return as_table(found)


# What became of a command with exit code 2.
REFUSED = "refused"
KILL_OUTCOMES = ("the same bytes", "other bytes", "unclean", "hung", REFUSED, "not restarted")


def table_of_kills(rows: Iterable[dict[str, Any]]) -> str:
    """A row a stage. A command that was killed, restarted and killed again is two kills and one outcome."""
    counts: dict[str, Counter[str]] = {}
    for line in rows:
        count = counts.setdefault(line["stage"], Counter())
        count.update("command killed" if victim == "command" else "child killed" for victim in line["victims"])
        count.update(["runs", line["outcome"]])
    total: Counter[str] = sum(counts.values(), Counter())
    columns = ("command killed", "child killed", "runs", *KILL_OUTCOMES)
    found = [["stage", "kills", *columns]]
    for name, one in [*counts.items(), ("all", total)]:
        killed = one["command killed"] + one["child killed"]
        found.append([name, f"{killed}", *(f"{one[column]}" for column in columns)])
    return as_table(found)


def as_table(rows: list[list[str]]) -> str:
    """Rows as a table of Markdown, the first one its head."""
    head, *rest = rows
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ruler, *rest))


def machine() -> dict[str, Any]:
    """What a figure is measured on."""
    text = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {"cpu": model, "python": platform.python_version()}
