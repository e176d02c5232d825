"""The campaign's record: a line of JSON for each piece of work, so that a campaign continues; and the table of all.

A record is of one version of the code. It is kept in `code.json`, and no line of another version is added.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from campaign.attempts import OUTCOMES

_CODE = "code.json"
_ROOT = Path(__file__).parents[2]
# What is tried, and what tries it.
_SOURCES = ("data_shards", "segdiff_dist", "kernels/segdiff_kernels", "tests/campaign")


class OtherCode(Exception):
    """The record is of another version of the code."""


def code() -> dict[str, str]:
    """The commit; and a digest of the sources as they are, with changes that no commit has."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in _SOURCES for file in (_ROOT / folder).rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(_ROOT)} {content}\n".encode())
    asked = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": said or "unknown", "sources": digest.hexdigest()}


def keep_to_code(out: Path) -> None:
    """Note the code of a new record in `out`. Raises OtherCode if the record there is of another one."""
    if not any(out.glob("*.jsonl")) and not (out / _CODE).is_file():
        out.mkdir(parents=True, exist_ok=True)
        (out / _CODE).write_text(json.dumps(code()) + "\n")
    _check_code(out)


def described_code(out: Path) -> str:
    """The code of a record, in words."""
    return _words(_code_of(out))


def _check_code(out: Path) -> None:
    there, now = _code_of(out), code()
    if there["sources"] != now["sources"]:
        raise OtherCode(f"{out}: its record is of {_words(there)}, and this is {_words(now)}: give another --out")


def _code_of(out: Path) -> dict[str, str]:
    file = out / _CODE
    found: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {"commit": "an unknown commit"}
    return {"sources": "unknown"} | found


def _words(one: dict[str, str]) -> str:
    return f"{one['commit']} (sources {one['sources'][:12]})"


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; the last one of a killed campaign may be cut off."""
    if file.is_file():
        for text in file.read_text().splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line. Raises OtherCode if the code has changed since `keep_to_code`."""
    if (file.parent / _CODE).is_file():
        _check_code(file.parent)
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
