"""Patients that one of several sets trains on and another one holds out: each set keeps them apart by itself only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_shards.store.shards import Member, ShardSet

_MOST_NAMED = 3


def parted_notes(shards: ShardSet) -> list[str]:
    """A line for each pair of sets of which the first trains on patients of the second's validation or test split: the
    same name, or the same source file."""
    if len(shards.members) == 1:
        return []
    marks = [_marks(shards, member) for member in shards.members]
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


def _marks(shards: ShardSet, member: Member) -> list[tuple[str, str, str]]:
    """Patient, split and source file (SHA-256) of each case of a set."""
    names, source = ["case_id", "split", "source_sha256"], member.index.get("source") or {}
    later = [other.first_row for other in shards.members if other.first_row > member.first_row]
    table = shards.samples.slice(member.first_row, min([*later, len(shards)]) - member.first_row)
    columns = table.select(names).group_by(names).aggregate([]).to_pydict()
    return [
        (str(source.get(case, {}).get("patient") or case), split, sha256)
        for case, split, sha256 in zip(*(columns[name] for name in names), strict=True)
    ]
