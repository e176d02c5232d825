"""Whose anatomy a mask shows, by the shard set that it comes from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.ingest.layouts.base import patient_of
from data_shards.ingest.volume_files import stem

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.export.real_set import RealSet

# The name of a case's own export: segdiff_dist.export.samples.
_OWN_NAME = re.compile(r"(.+)_[a-z0-9-]+_(?:[0-9]+|real)-(?:volume|(?:axial|coronal|sagittal)-[0-9]{4,})")


@dataclass(frozen=True)
class Patients:
    """Who a case is of, by the set that masks or model come from: `patient` of its `source`, else the pattern that it
    was prepared with, else the case itself. For masks of a folder: `named`, the patients that a table names, and
    `pattern`."""

    shards: ShardSet | None
    pattern: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    def of(self, case_id: str) -> str:
        """The patient of a case of the set, or of a file named after it."""
        case_id = case_id.rsplit("/", 1)[-1]
        case_id = stem(case_id) or case_id
        if case_id in self._by_table:
            return self._by_table[case_id]
        if case_id not in self._source and (own := _OWN_NAME.fullmatch(case_id)):
            case_id = own[1]
        stated = self._source.get(case_id, {}).get("patient")
        return str(stated or patient_of(case_id, self._pattern) or case_id)

    def is_unnamed(self, case_id: str) -> bool:
        """Whether nothing says who a file's case is of: it counts as a patient, by a guess."""
        return case_id not in self._source and self.of(case_id) == case_id

    def same_files(self, real: RealSet) -> dict[str, str | None]:
        """For each case of a data set the set's case whose image file it has, by size and sha256; None for others. A
        file of the same name, and of a size that no other has, is not read."""
        return {case: self._same_file(case, real.image(case)) for case in (*real.cases, *real.tests)}

    def of_real(self, same_files: Mapping[str, str | None]) -> dict[str, str]:
        """The patient of each case of a data set: that of the set's case of the same image file, or of this name."""
        return {case: self.of(known or case) for case, known in same_files.items()}

    def namesakes(self, same_files: Mapping[str, str | None]) -> list[str]:
        """The cases of a data set that have the name of a case of the set, and another image file."""
        known = {case for cases in self._cases_of_size.values() for case in cases}
        return [case for case, same in same_files.items() if same is None and case in known]

    @cached_property
    def trained_on(self) -> frozenset[str] | None:
        """The patients of the set's training split, which the model has seen; None if the set is not there."""
        if self.shards is None:
            return None
        rows = self.shards.select(split="train", labelled_only=False)
        return frozenset(map(self.of, self.shards.samples["case_id"].take(rows).unique().to_pylist()))

    @cached_property
    def _source(self) -> dict[str, Any]:
        members = () if self.shards is None else self.shards.members
        return {case: one for member in members for case, one in (member.index.get("source") or {}).items()}

    @cached_property
    def _by_table(self) -> dict[str, str]:
        """`named`; where a mask is that of an own export, the case that it was made from is of the same patient."""
        of_names = {case: _OWN_NAME.fullmatch(case) for case in self.named}
        made_from = {own[1]: self.named[case] for case, own in of_names.items() if own}
        return made_from | dict(self.named)

    @cached_property
    def _pattern(self) -> str | None:
        return self.pattern if self.shards is None else self.shards.index["preprocessing"].get("patient")

    @cached_property
    def _case_of_file(self) -> dict[str, str]:
        if self.shards is None:
            return {}
        columns = (self.shards.samples[name].to_pylist() for name in ("source_sha256", "case_id"))
        return dict(zip(*columns, strict=True))

    @cached_property
    def _cases_of_size(self) -> dict[int, list[str]]:
        """The cases by the bytes of their image files."""
        found: dict[int, list[str]] = {}
        for case, one in self._source.items():
            if one.get("image"):
                found.setdefault(one["image"][1], []).append(case)
        return found

    def _same_file(self, case: str, file: Path) -> str | None:
        cases = self._cases_of_size.get(file.stat().st_size, [])
        if not cases or cases == [case]:
            return case if cases else None
        with file.open("rb") as stream:
            return self._case_of_file.get(hashlib.file_digest(stream, "sha256").hexdigest())
