"""A shard set opened for reading: its table is memory-mapped, and samples are read by their position in the files.

A set is in a folder or behind any URL that fsspec knows; several sets that agree can be opened as one.

Dimensions: N samples, H rows, W columns.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.choices import Codec
from data_shards.documents import reading
from data_shards.labels import LabelTable
from data_shards.modalities import in_hu
from data_shards.problems import DamagedSample, Problem, problem, refuse
from data_shards.records import AXES, SPLITS, SliceMeta, SliceRecord
from data_shards.store import samples_table
from data_shards.store.byte_ranges import Filled, Range, ignore
from data_shards.store.byte_store import ByteStore, local_copy, local_path, open_byte_store, read_file
from data_shards.store.codecs import crc32c, decode_into
from data_shards.store.config import CacheConfig
from data_shards.store.patient_overlap import patients_by_member
from data_shards.store.samples_table import PARTS
from data_shards.store.set_index import (
    INDEX,
    SAMPLES,
    broken_files,
    check_samples_file,
    parse_index,
    read_index,
)
from data_shards.store.table_checks import Part, disagreements

if TYPE_CHECKING:
    import pyarrow as pa

# What must be the same in sets that are opened as one.
_ALIKE = ("label_table", "size", "bits", "codec", "parts")


@dataclass(frozen=True)
class Member:
    """One set of those opened together: root, index.json, its digest, and its first file and row."""

    root: str
    index: dict[str, Any]
    digest: str
    first_file: int
    first_row: int


@dataclass
class ShardSet:
    """A finished shard set, or several as one.

    `size`: slices are size x size. `bits` of a grey value. `parts`: image, mask and, with soft edges, edge. `digest`:
    identifies every byte of the set. `samples`: one row a sample, in the order of the shards (split, case, axis,
    slice).
    """

    members: tuple[Member, ...]
    samples: pa.Table
    cache: CacheConfig = field(default_factory=CacheConfig)
    parts: dict[str, Part] = field(init=False, repr=False)
    _stores: dict[int, ByteStore] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.parts = {part: Part.of(self.samples, part) for part in PARTS}
        if len(self) and int(self.parts["edge"].file_N[0]) < 0:
            del self.parts["edge"]

    @classmethod
    def open(
        cls,
        root: str | Path | Sequence[str | Path],
        *,
        verify: bool = False,
        check_files: bool = True,
        cache: CacheConfig | None = None,
    ) -> ShardSet:
        """Open the set at `root` (a folder or a URL), or several sets as one.

        Files on this machine are compared with the index: they must exist with the stated length; `verify` reads every
        byte and compares checksums and members. Bytes of a remote set are checked when they are read.

        Raises InputProblems: no folder, no index (unfinished), another format, files missing, of another length or with
        other bytes, sets that do not go together.
        """
        roots = [root] if isinstance(root, str | Path) else list(root)
        cache = cache or CacheConfig()
        members: list[Member] = []
        tables: list[pa.Table] = []
        for one in map(str, roots):
            first_file = members[-1].first_file + len(members[-1].index["shards"]) if members else 0
            first_row = sum(table.num_rows for table in tables)
            index, digest, table = _open_one(one, cache, verify=verify, check_files=check_files)
            members.append(Member(one, index, digest, first_file, first_row))
            tables.append(table)
        refuse(_differences(members))
        joined = tables[0] if len(tables) == 1 else samples_table.joined(tables, [m.first_file for m in members])
        return cls(tuple(members), joined, cache)

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the table itself; otherwise all of it would be copied.
        return _reopen, ([member.root for member in self.members], self.cache)

    @property
    def root(self) -> str:
        """Its path or URL, for display."""
        return " + ".join(member.root for member in self.members)

    @property
    def resolved(self) -> str:
        """The place of a single set, independent of the working folder: an absolute path or a URL."""
        folder = local_path(self.members[0].root)
        assert len(self.members) == 1, "several sets have several roots"
        return self.members[0].root if folder is None else str(folder.resolve())

    @property
    def path(self) -> Path:
        """The folder of a single set on this machine."""
        folder = local_path(self.members[0].root)
        if len(self.members) > 1 or folder is None:
            raise problem(self.root, "shard set", "not one folder on this machine", "give the folder of one set")
        return folder

    @property
    def index(self) -> dict[str, Any]:
        """index.json; for several sets that of the first."""
        return self.members[0].index

    @cached_property
    def digest(self) -> str:
        """sha256 of index.json, or over those of several sets."""
        digests = [member.digest for member in self.members]
        return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()

    @cached_property
    def label_table(self) -> LabelTable:
        """Names by label id."""
        return LabelTable.of(self.index["label_table"])

    @cached_property
    def patient_of(self) -> dict[str, str]:
        """The patient by case id, of a single set's cases whose patient has another name than the case."""
        assert len(self.members) == 1, "cases of several sets may have one name: see patients()"
        named = (self.index.get("source") or {}).items()
        return {case: str(one["patient"]) for case, one in named if one.get("patient") not in (None, case)}

    def patients(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The patients of these rows, by name; by case id where the set knows no other name. Of several sets, equal
        case ids with other source files are different patients: see patient_overlap.patients_by_member."""
        cases = self.samples["case_id"].take(np.asarray(rows, np.int64)).to_pylist()
        if len(self.members) == 1:
            return [self.patient_of.get(case, case) for case in cases]
        names = self._names_by_member
        return [names[member][case] for member, case in zip(self.member_N[rows].tolist(), cases, strict=True)]

    @cached_property
    def _names_by_member(self) -> list[dict[str, str]]:
        return patients_by_member(self)

    @property
    def size(self) -> int:
        """Rows and columns of a slice."""
        return int(self.index["preprocessing"]["size"])

    @property
    def bits(self) -> int:
        """Bits of a grey value: 8 or 16."""
        return int(self.index["preprocessing"].get("bits", 8))

    @property
    def codec(self) -> Codec:
        """The encoding of pixels in the files: see codecs.py."""
        codec: Codec = self.index["codec"]
        return codec

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the set, in the order of their codes: CT and MR, or the names of its slices."""
        return samples_table.modalities_in(self.samples)

    @cached_property
    def in_hu(self) -> tuple[str, ...]:
        """Those whose values are HU."""
        return in_hu(self.modalities, self.index["preprocessing"])

    @cached_property
    def modality_N(self) -> np.ndarray:
        """uint8 codes into `modalities`."""
        return samples_table.numbers(self.samples, "modality")

    @cached_property
    def axis_N(self) -> np.ndarray:
        """uint8 codes into AXES."""
        return samples_table.numbers(self.samples, "axis")

    @cached_property
    def split_N(self) -> np.ndarray:
        """uint8 codes into SPLITS."""
        return samples_table.numbers(self.samples, "split")

    @cached_property
    def member_N(self) -> np.ndarray:
        """uint8: the index of a sample's set among those opened together."""
        counts = np.diff([*(member.first_row for member in self.members), len(self)])
        return np.repeat(np.arange(len(counts), dtype=np.uint8), counts)

    def select(
        self,
        *,
        split: str | None = None,
        modalities: Sequence[str] | None = None,
        axes: Sequence[str] | None = None,
        labelled_only: bool = True,
    ) -> np.ndarray:
        """Rows of `samples` that meet all given conditions: int64, ascending."""
        keep = np.ones(len(self), dtype=bool)
        for codes, words, allowed in (
            (self.split_N, SPLITS, split and [split]),
            (self.modality_N, self.modalities, modalities),
            (self.axis_N, AXES, axes),
        ):
            if allowed is not None:
                wanted = np.array([word in allowed for word in words])
                keep &= wanted[codes]
        if labelled_only:
            keep &= samples_table.numbers(self.samples, "labelled")
        return np.flatnonzero(keep)

    def key(self, row: int) -> str:
        """The name of a sample in its shard."""
        return str(self.samples["key"][int(row)].as_py())

    def meta(self, row: int) -> SliceMeta:
        """The meta of a row."""
        return samples_table.meta_of(self.samples, row)

    def read(self, row: int) -> SliceRecord:
        """Decode one sample. Raises DamagedSample, which names shard and sample, if its bytes are not those that were
        written."""
        decoded = {part: self.read_part(row, part) for part in self.parts}
        return SliceRecord(decoded["image"], decoded["mask"], self.meta(row), decoded.get("edge"))

    def read_mask(self, row: int) -> np.ndarray:
        """Decode only the mask of a sample: uint8 [H, W]."""
        return self.read_part(row, "mask")

    def read_part(self, row: int, part: str) -> np.ndarray:
        """Decode one part of a sample: uint8 or, for images of 16 bits, uint16 [H, W]; edge uint8 [2, H, W]."""
        payload = self.payload(row, part)
        out = np.empty(((2 if part == "edge" else 1) * self.size, self.size), self.dtype(part))
        try:
            decode_into(payload, self.codec, out)
        except ValueError as error:
            raise DamagedSample(self.describe_failure(row, part, error)) from error
        return out.reshape(2, self.size, self.size) if part == "edge" else out

    def payload(self, row: int, part: str) -> np.ndarray:
        """The encoded bytes of one part (of a NumPy file its pixels alone), checked: 1-D uint8. Raises as `read`."""
        where = self.parts[part]
        payload = np.empty(int(where.bytes_N[row]), np.uint8)
        wanted = Range(int(where.file_N[row]), int(where.offset_N[row]), payload.nbytes, [payload.data])
        [error] = self.read_ranges([wanted])
        if error is None and crc32c(payload) != int(where.crc32c_N[row]):
            error = OSError("its bytes are not those that were written (CRC-32C)")
        if error is not None:
            raise DamagedSample(self.describe_failure(row, part, error)) from error
        return payload

    def dtype(self, part: str) -> np.dtype:
        """The dtype of a part's pixels."""
        return np.dtype(np.uint16 if part == "image" and self.bits == 16 else np.uint8)

    @property
    def is_local(self) -> bool:
        """Whether all files are on this machine's filesystems."""
        return all(local_path(member.root) is not None for member in self.members)

    @property
    def num_misses(self) -> int:
        """Ranges so far that were not in memory. See byte_store.ByteStore."""
        return sum(store.num_misses for store in list(self._stores.values()))

    def read_ranges(self, ranges: Sequence[Range], then: Filled = ignore) -> list[OSError | None]:
        """Fill the views of every range; file numbers run over all members. See byte_store.ByteStore."""
        if len(self.members) == 1:
            return self._store(0).read(ranges, then)
        errors: list[OSError | None] = [None] * len(ranges)
        first_files = np.array([member.first_file for member in self.members])
        member_of = np.searchsorted(first_files, [wanted.file for wanted in ranges], side="right") - 1
        for member in np.unique(member_of).tolist():
            chosen = np.flatnonzero(member_of == member).tolist()
            shifted = [ranges[i]._replace(file=ranges[i].file - int(first_files[member])) for i in chosen]
            filled = partial(lambda chosen, k: then(chosen[k]), chosen)
            for i, error in zip(chosen, self._store(member).read(shifted, filled), strict=True):
                errors[i] = error
        return errors

    def describe_failure(self, row: int, part: str, error: object) -> str:
        """A message about an error with a sample's part: shard, sample, reason, remedy."""
        member, entry = self._file(int(self.parts[part].file_N[row]))
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        shard = f"{member.root.rstrip('/')}/{entry['file']}"
        command = f"segdiff inspect {shlex.quote(member.root)}"
        return f"{shard}: sample {self.key(row)}: {part}: {reason}; verify the set with `{command}`"

    def _file(self, file: int) -> tuple[Member, dict[str, Any]]:
        member = [m for m in self.members if m.first_file <= file][-1]
        return member, member.index["shards"][file - member.first_file]

    def _store(self, member: int) -> ByteStore:
        if member not in self._stores:
            one = self.members[member]
            entries = one.index["shards"]
            self._stores[member] = open_byte_store(
                one.root,
                [entry["file"] for entry in entries],
                [entry["bytes"] for entry in entries],
                one.digest,
                cache_dir=self.cache.folder,
                cache_bytes=self.cache.num_bytes,
            )
        return self._stores[member]


def _reopen(roots: list[str], cache: CacheConfig) -> ShardSet:
    # The process that sent the set has already checked its files.
    return ShardSet.open(roots, check_files=False, cache=cache)


def _open_one(
    root: str, cache: CacheConfig, *, verify: bool, check_files: bool
) -> tuple[dict[str, Any], str, pa.Table]:
    """index.json, its digest and the table of one set."""
    folder = local_path(root)
    if folder is not None:
        index = read_index(folder)
        digest = sha256((folder / INDEX).read_bytes()).hexdigest()
        if check_files or verify:
            refuse(broken_files(folder, index, verify=verify))
        samples_file, remedy = folder / SAMPLES, "restore the file, or prepare the set again"
    else:
        try:
            content = read_file(root, INDEX)
        except FileNotFoundError as error:
            raise problem(root, INDEX, "missing", "give the URL of a finished shard set") from error
        except OSError as error:
            raise problem(root, INDEX, f"cannot be read ({error})", "check the URL and the credentials") from error
        index, digest = parse_index(content, f"{root}/{INDEX}"), sha256(content).hexdigest()
        samples_file = local_copy(root, SAMPLES, cache.folder, digest, num_bytes=index["samples"]["bytes"])
        remedy = f"restore it; remove {samples_file}"
    where = f"{root.rstrip('/')}/{SAMPLES}"
    with reading(where, "the table of a set", remedy):
        check_samples_file(samples_file, where, index, remedy)
        table = samples_table.read(samples_file)
    refuse(disagreements(root, index, table, verify=verify))
    return index, digest, table


def _differences(members: Sequence[Member]) -> Iterator[Problem]:
    """Differences because of which sets cannot be opened as one."""

    def of(member: Member, name: str) -> Any:
        index = member.index
        if name in ("size", "bits"):
            return index["preprocessing"].get(name, 8)
        if name == "label_table":  # colours may differ
            return {key: index[name][key] for key in ("name", "names")}
        return sorted({part for e in index["shards"] for part in e["parts"]}) if name == "parts" else index[name]

    for member in members[1:]:
        for name in _ALIKE:
            mine, first = of(member, name), of(members[0], name)
            if mine != first:
                shown = (mine["name"], first["name"]) if name == "label_table" else (mine, first)
                value = f"{shown[0]} where {members[0].root} has {shown[1]}"
                yield Problem(member.root, name, value, "sets opened as one must agree: prepare or convert it to match")
