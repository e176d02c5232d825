"""Samples to a shard set: the samples of each shard, writing of shards in parallel, and the final name of the set.

    OUT/shards.unfinished/          shards while they are written
    OUT/shards.unfinished/.done/    rows and entries of each finished shard, so that a killed run can continue

set_index.py has the names of a finished set's files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from typing_extensions import TypedDict

from data_shards.documents import checked, read_json, reading
from data_shards.fan_out import Done, TaskFailure, Workers
from data_shards.files import new_file, write_atomic
from data_shards.modalities import MODALITIES
from data_shards.problems import InputProblems, OutOfSpace, ShardFailed, out_of_space
from data_shards.records import SPLITS, SliceMeta, SliceRecord
from data_shards.store import samples_table, tar_store, zarr_store
from data_shards.store.codecs import encode
from data_shards.store.set_index import MODALITIES_KEY, SAMPLES, SHARDS, UNFINISHED, write_index

if TYPE_CHECKING:
    import pyarrow as pa

Payloads = dict[str, Any]  # part -> encoded bytes (webdataset) or pixels (zarr)
_DONE, _PLAN = ".done", "plan.json"


@dataclass(frozen=True)
class Format:
    """The format of stored samples. shapes: of a sample's parts, with their dtypes: {"image": ((256, 256), "uint8"),
    ...}."""

    store: str
    codec: str
    samples_per_shard: int
    shapes: dict[str, tuple[tuple[int, ...], str]]

    def payloads(self, record: SliceRecord) -> Payloads:
        """A record's parts, ready to be written."""
        parts = {"image": record.image_HW, "mask": record.mask_HW}
        if record.edge_2HW is not None:
            parts["edge"] = record.edge_2HW
        if self.store == "zarr":
            return parts
        return {part: encode(pixels.reshape(-1, pixels.shape[-1]), self.codec) for part, pixels in parts.items()}

    def of_the_set(self) -> dict[str, Any]:
        """The entries in index.json."""
        return {"store": self.store, "codec": "zstd" if self.store == "zarr" else self.codec}


def set_format(store: str, codec: str, samples_per_shard: int, *, size: int, bits: int, soft_edge: bool) -> Format:
    """The format of a set of size x size slices."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "image": ((size, size), "uint8" if bits == 8 else "uint16"),
        "mask": ((size, size), "uint8"),
    }
    if soft_edge:
        shapes["edge"] = ((2, size, size), "uint8")
    return Format(store, codec, samples_per_shard, shapes)


class Source(Protocol):
    """Consecutive samples, which a worker on another machine can read too."""

    @property
    def stamp(self) -> str:
        """A stamp that changes with the samples."""

    def samples(self) -> Iterator[tuple[SliceMeta, Payloads]]:
        """Each sample's meta and encoded parts."""


@dataclass(frozen=True)
class ShardTask:
    """One shard: the `number`-th of its split."""

    folder: Path
    split: str
    number: int
    format: Format
    sources: tuple[Source, ...]

    @property
    def done(self) -> Path:
        """The file that exists when the shard is finished."""
        return self.folder / _DONE / f"{self.split}-{self.number:06d}.json"

    def run(self) -> str | None:
        """Write the shard; returns the error if the disk is full."""
        try:
            write_shard(self, (sample for source in self.sources for sample in source.samples()))
        except OSError as error:
            if out_of_space(error):
                return str(error)
            raise
        return None


def plan_shards(
    out: Path, counted: Sequence[tuple[str, int, Callable[[int, int], Source]]], format: Format
) -> list[ShardTask]:
    """Divide runs of samples into shards. `counted`: split, number of samples, and a function that gives samples lo to
    hi of the run; the runs of a split must be consecutive."""
    tasks = []
    for split in SPLITS:
        waiting: list[Source] = []
        room, number = format.samples_per_shard, 0
        for of_split, count, take in counted:
            start = 0
            while of_split == split and start < count:
                stop = min(count, start + room)
                waiting.append(take(start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    tasks.append(ShardTask(out / UNFINISHED, split, number, format, tuple(waiting)))
                    waiting, room, number = [], format.samples_per_shard, number + 1
        if waiting:
            tasks.append(ShardTask(out / UNFINISHED, split, number, format, tuple(waiting)))
    return tasks


def write_shards(
    out: Path,
    tasks: Sequence[ShardTask],
    num_samples: dict[str, int],
    header: dict[str, Any],
    workers: Workers[Any, Any],
) -> dict[str, Any]:
    """Write every missing shard, then name the set; returns its index. `num_samples`: by split. `workers` call run() of
    the tasks.

    Raises OutOfSpace when the disk is full, and ShardFailed; the same call continues after either.
    """
    from data_shards.progress import progress_bar

    format = tasks[0].format
    _start(out / UNFINISHED, tasks, num_samples, header)
    waiting = [task for task in tasks if not _is_done(task)]
    total = sum(num_samples.values())
    with progress_bar(total=len(tasks), initial=len(tasks) - len(waiting), desc="write shards", unit="shard") as bar:
        done: Done[ShardTask, str | None]
        for done in workers.run(waiting):
            if isinstance(done.result, TaskFailure):
                raise ShardFailed(f"{done.task.split} shard {done.task.number}: {done.result.error}")
            if done.result is not None:
                raise OutOfSpace(out, done.result)
            bar.update()
    return finish(out, [task.done for task in tasks], {**header, **format.of_the_set()}, total)


def write_shard(task: ShardTask, samples: Iterator[tuple[SliceMeta, Payloads]]) -> None:
    """One shard, its rows and its entries; the file task.done comes last."""
    if task.format.store == "zarr":
        rows, entries = zarr_store.write_region(task.folder, task.split, task.number, list(samples))
        metadata: list[dict[str, Any]] = []
    else:
        name = tar_store.shard_name(task.split, task.number)
        parts = list(task.format.shapes)
        rows, entry, [idx] = tar_store.write_tar(task.folder / name, samples, task.format.codec)
        entries = [{"file": name, "split": task.split, "parts": parts, **entry}]
        metadata = [{"file": Path(name).with_suffix(".idx").name, **idx}]
    samples_table.write(samples_table.to_table(rows), task.done.with_suffix(".arrow"))
    write_atomic(task.done, json.dumps({"shards": entries, "metadata": metadata}).encode())


def finish(out: Path, done: Sequence[Path], header: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """samples.arrow and index.json from finished shards, in this order; returns the index."""
    in_shards: list[dict[str, Any]] = []
    metadata: list[dict[str, Any]] = []
    first_files, tables = [], []
    for file in done:
        content, rows = _read_done(file)
        first_files.append(len(in_shards))
        in_shards += content["shards"]
        metadata += content["metadata"]
        tables.append(rows)
    table = samples_table.joined(tables, first_files)
    assert table.num_rows == num_samples, f"{table.num_rows} rows, {num_samples} samples"
    if (modalities := samples_table.modalities_in(table)) != MODALITIES:
        header = {**header, MODALITIES_KEY: list(modalities)}
    # write_index renames it.
    with new_file(out / f"{SAMPLES}.unfinished", durable=True) as unfinished:
        samples_table.write(table, unfinished)
    del tables, table
    # The plan is removed first, so that a folder with a plan still has the records of its finished shards.
    (out / UNFINISHED / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(out / UNFINISHED / _DONE)
    metadata += zarr_store.metadata_files(out / UNFINISHED)
    for entry in (*in_shards, *metadata):
        entry["file"] = f"{SHARDS}/{entry['file']}"
    return write_index(out, header, in_shards, metadata, num_samples)


class _Done(TypedDict):
    shards: list[dict[str, Any]]
    metadata: list[dict[str, Any]]


def _read_done(file: Path) -> tuple[dict[str, Any], pa.Table]:
    """Entries of index.json and rows of a finished shard. Raises InputProblems if they have changed."""
    what, remedy = "the description of a finished shard", "remove it, and start the same command again"
    content = read_json(file, remedy, what)
    checked(content, _Done, file, what, remedy)
    with reading(file.with_suffix(".arrow"), "the rows of a finished shard", remedy):
        return content, samples_table.read(file.with_suffix(".arrow"))


def _is_done(task: ShardTask) -> bool:
    """Whether a shard is finished."""
    with suppress(InputProblems):
        _read_done(task.done)
        return True
    return False


@dataclass
class ShardWriter:
    """Write a set one sample after the other, in one process: for sets without an archive.

    The samples of a split must be consecutive.
    """

    out: Path
    format: Format
    _waiting: list[tuple[SliceMeta, Payloads]] = field(default_factory=list)
    _tasks: list[ShardTask] = field(default_factory=list)
    _num_samples: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)
        (self.out / UNFINISHED / _DONE).mkdir(parents=True)

    def write(self, record: SliceRecord) -> None:
        """Append one sample."""
        if self._waiting and self._waiting[0][0].split != record.meta.split:
            self._flush()
        self._waiting.append((record.meta, self.format.payloads(record)))
        if len(self._waiting) == self.format.samples_per_shard:
            self._flush()

    def finish(self, header: dict[str, Any]) -> dict[str, Any]:
        """Write the last shard and the index (header + files); returns the index."""
        if self._waiting:
            self._flush()
        done = [task.done for task in self._tasks]
        return finish(self.out, done, {**header, **self.format.of_the_set()}, sum(self._num_samples.values()))

    def _flush(self) -> None:
        split = self._waiting[0][0].split
        number = sum(task.split == split for task in self._tasks)
        self._num_samples[split] = self._num_samples.get(split, 0) + len(self._waiting)
        task = ShardTask(self.out / UNFINISHED, split, number, self.format, ())
        if self.format.store == "zarr":
            _create_arrays(task.folder, self.format, {split: self._num_samples[split]}, {})
        write_shard(task, iter(self._waiting))
        self._tasks.append(task)
        self._waiting = []


def _start(folder: Path, tasks: Sequence[ShardTask], num_samples: dict[str, int], header: dict[str, Any]) -> None:
    """Keep the shards that an interrupted run with the same plan has finished; otherwise begin again."""
    format = tasks[0].format
    described = [[t.split, t.number, [s.stamp for s in t.sources]] for t in tasks]
    digest = sha256(json.dumps([format.store, format.codec, described, header], sort_keys=True).encode()).hexdigest()
    plan = folder / _PLAN
    if not (plan.is_file() and plan.read_text() == digest):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / _DONE).mkdir(parents=True)
        if format.store == "zarr":
            _create_arrays(folder, format, num_samples, {"label_table": header["label_table"]})
        write_atomic(plan, digest.encode())


def _create_arrays(folder: Path, format: Format, num_samples: dict[str, int], attributes: dict[str, Any]) -> None:
    shapes = {part: (shape, np.dtype(dtype)) for part, (shape, dtype) in format.shapes.items()}
    zarr_store.create_arrays(folder, num_samples, shapes, format.samples_per_shard, attributes)
