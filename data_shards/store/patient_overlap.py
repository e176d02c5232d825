"""Patients of several sets: which of equal names are one, and which of them one set trains on and another one holds
out, since each set keeps its splits apart by itself only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_shards.store.shards import Member, ShardSet

_MOST_NAMED = 3


def overlap_notes(shards: ShardSet) -> list[str]:
    """A line for each pair of sets of which the first trains on patients of the second's validation or test split: the
    same name, or the same source file."""
    if len(shards.members) == 1:
        return []
    marks = [
        [(patient or case, split, sha256) for case, patient, split, sha256 in _marks(shards, member)]
        for member in shards.members
    ]
    notes = []
    for i, one in enumerate(shards.members):
        trained = {mark for patient, split, sha256 in marks[i] if split == "train" for mark in (patient, sha256)}
        for k, other in enumerate(shards.members):
            held = {} if i == k else {p: s for p, s, sha256 in marks[k] if s != "train" and {p, sha256} & trained}
            if held:
                named = ", ".join(sorted(held)[:_MOST_NAMED]) + (", ..." if len(held) > _MOST_NAMED else "")
                where = " and ".join(sorted(set(held.values()), reverse=True))
                notes.append(
                    f"{one.root} trains on {len(held)} patients of {other.root}'s {where} split ({named}), by name or "
                    f"file: measures on these are of what was trained on; if they are the same patients, prepare the "
                    f"sets with the same splits, or leave these patients out of one"
                )
    return notes


def patients_by_member(shards: ShardSet) -> list[dict[str, str]]:
    """The patient of each case, for each set. A case without a named patient is one with a case of its name in an
    earlier set only if they have a source file in common: two archives may both begin with case_001. Named patients of
    one name are one patient."""
    names: list[dict[str, str]] = []
    known: dict[str, list[tuple[str, set[str]]]] = {}
    for number, member in enumerate(shards.members, start=1):
        name_of, files = dict[str, str](), dict[str, set[str]]()
        for case, patient, _, sha256 in _marks(shards, member):
            name_of[case] = patient or case
            if not patient:
                files.setdefault(case, set()).add(sha256)
        for case, own in files.items():
            there = known.setdefault(case, [])
            same = next((name for name, theirs in there if theirs & own), None)
            name_of[case] = same or (f"{case} (set {number})" if there else case)
            there.append((name_of[case], own))
        names.append(name_of)
    return names


def _marks(shards: ShardSet, member: Member) -> list[tuple[str, str, str, str]]:
    """Case, named patient (or empty), split and source file (SHA-256) of each case of a set."""
    names, source = ["case_id", "split", "source_sha256"], member.index.get("source") or {}
    later = [other.first_row for other in shards.members if other.first_row > member.first_row]
    table = shards.samples.slice(member.first_row, min([*later, len(shards)]) - member.first_row)
    columns = table.select(names).group_by(names).aggregate([]).to_pydict()
    return [
        (case, str(source.get(case, {}).get("patient") or ""), split, sha256)
        for case, split, sha256 in zip(*(columns[name] for name in names), strict=True)
    ]
