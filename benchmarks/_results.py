"""A results file: what was measured, under the stamp of hardware, versions, commit and arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from _harness import commit, hardware, versions


def stamp(args: argparse.Namespace) -> dict[str, Any]:
    """When, on what, with which versions and arguments, at which commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }


def headline(told: Mapping[str, Any]) -> str:
    """The stamp in three lines."""
    machine, source = told["hardware"], told["commit"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB, GPU {machine['gpu'] or 'none'}\n"
        f"{', '.join(f'{name} {version}' for name, version in told['versions'].items())}\n"
        f"commit {source['revision']}{' with uncommitted changes' if source['dirty'] else ''}"
    )


def write(args: argparse.Namespace, told: Mapping[str, Any], *, quiet: bool = False) -> None:
    """Write `told` to args.json, where that was asked for, and unless quiet say so."""
    if args.json is None:
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {args.json}")
