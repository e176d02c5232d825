"""Whose anatomy a mask shows, by the shard set that it comes from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
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
    was prepared with, else the case itself."""

    shards: ShardSet | None

    def of(self, case_id: str) -> str:
        """The patient of a case of the set, or of a file named after it."""
        case_id = case_id.rsplit("/", 1)[-1]
        case_id = stem(case_id) or case_id
        if case_id not in self._source and (own := _OWN_NAME.fullmatch(case_id)):
            case_id = own[1]
        stated = self._source.get(case_id, {}).get("patient")
        return str(stated or patient_of(case_id, self._pattern) or case_id)

    def of_real(self, real: RealSet) -> dict[str, str]:
        """The patient of each case of a data set: that of the set's case of this name, or of the same image file."""
        found = {}
        for case in (*real.cases, *real.tests):
            known = case if case in self._source else self._same_file(real.image(case))
            found[case] = self.of(known or case)
        return found

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
    def _pattern(self) -> str | None:
        return None if self.shards is None else self.shards.index["preprocessing"].get("patient")

    @cached_property
    def _case_of_file(self) -> dict[str, str]:
        if self.shards is None:
            return {}
        columns = (self.shards.samples[name].to_pylist() for name in ("source_sha256", "case_id"))
        return dict(zip(*columns, strict=True))

    def _same_file(self, file: Path) -> str | None:
        """The case whose image the file is, by size and sha256."""
        sizes = {one["image"][1] for one in self._source.values() if one.get("image")}
        if file.stat().st_size not in sizes:
            return None
        with file.open("rb") as stream:
            return self._case_of_file.get(hashlib.file_digest(stream, "sha256").hexdigest())
