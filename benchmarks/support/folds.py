"""An archive in AMOS' layout as several, of the same cases, each with other ones to validate on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.files import write_atomic
from data_shards.problems import problem

# AMOS' rule: CT up to 500, MR above.
_LAST_CT = 500
_KINDS = ("image", "label")


def write_folds(archive: Path, folders: Sequence[Path]) -> list[Path]:
    """Folders with links to the labelled cases; fold k validates on every len(folders)-th case of each modality, from
    the k-th on, by id. InputProblems if a fold would have none."""
    file = archive / "dataset.json"
    table = json.loads(file.read_text())
    entries = {_case(entry): entry for entry in [*table["training"], *table["validation"]]}
    by_modality: dict[bool, list[str]] = {}
    for case in sorted(entries):
        by_modality.setdefault(int(case.rsplit("_", 1)[1]) > _LAST_CT, []).append(case)
    if fewest := [len(cases) for cases in by_modality.values() if len(cases) < len(folders)]:
        raise problem(file, "training", f"{fewest[0]} cases of a modality", f"give at most {min(fewest)} folds")
    for k, folder in enumerate(folders):
        held = {case for cases in by_modality.values() for case in cases[k :: len(folders)]}
        _write(archive, folder, table, entries, held)
    return list(folders)


def _write(archive: Path, folder: Path, table: dict[str, Any], entries: dict[str, Any], held: set[str]) -> None:
    parts: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for case, entry in entries.items():
        split, suffix = ("validation", "Va") if case in held else ("training", "Tr")
        places = {kind: f"{kind}s{suffix}/{Path(entry[kind]).name}" for kind in _KINDS}
        for kind, place in places.items():
            link = folder / place
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to((archive / entry[kind]).resolve())
        parts[split].append({kind: f"./{place}" for kind, place in places.items()})
    counts = {name: len(parts[part]) for name, part in (("numTraining", "training"), ("numTest", "test"))}
    known = {name: number for name, number in counts.items() if name in table}
    write_atomic(folder / "dataset.json", json.dumps({**table, **parts, **known}, indent=1))


def _case(entry: dict[str, str]) -> str:
    return Path(entry["image"]).name.split(".")[0]
