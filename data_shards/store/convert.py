"""A shard set in another store or codec: the same slices, meta and order, read, checked and written shard by shard."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.documents import read_json
from data_shards.fan_out import Workers, runner
from data_shards.files import write_atomic
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.problems import Problem, WorkFailed, explain_full_disk, refuse
from data_shards.records import SPLITS, SliceMeta
from data_shards.store import tar_store
from data_shards.store.config import ConvertConfig
from data_shards.store.set_index import INDEX, PARTIAL, SAMPLES, SHARDS, read_index
from data_shards.store.shard_writer import Format, Payloads, plan_shards, set_format, write_shards
from data_shards.store.shards import ShardSet

_PLAN = "plan.json"
# Slices that are read and encoded to measure the time.
_TIMED_SLICES = 16
# Entries of the source's index that are not copied but written again.
_OF_THE_FILES = ("format_version", "producer", "num_samples", "shards", "samples", "metadata", "store", "codec")


@dataclass(frozen=True)
class _Rows:
    """Rows start to stop of a set: a shard_writer.Source."""

    root: str
    start: int
    stop: int
    stamp: str
    format: Format

    def samples(self) -> Iterator[tuple[SliceMeta, Payloads]]:
        """Every byte is checked when it is read; raises a ValueError that names shard and sample."""
        source = _open(self.root)
        for row in range(self.start, self.stop):
            record = source.read(row)
            yield record.meta, self.format.payloads(record)


def convert(source: str | Path, out: Path, config: ConvertConfig) -> dict[str, Any]:
    """Write the set at `source` (a folder or a URL) to `out` in another form; returns its index.

    The same call again continues, or does nothing. Raises InputProblems before any work, also if another process writes
    `out` or `out` cannot be written; OutOfSpace; and ShardFailed if a sample of the source is damaged.
    """
    return check(source, out, config).run()


@dataclass(frozen=True)
class Conversion:
    """A checked conversion, made by `check`: the only thing that can run."""

    shards: ShardSet
    out: Path
    config: ConvertConfig

    @cached_property
    def seconds(self) -> float | None:
        """Approximate time, from reading and encoding some slices, evenly spaced; None of a set at a URL, and where one
        of them cannot be read. Files and workers that start come on top."""
        if "://" in self.shards.resolved:
            return None
        rows = np.linspace(0, len(self.shards) - 1, _TIMED_SLICES + 1).astype(int)
        form = replace(_format(self.shards, self.config), store="webdataset")  # Zarr's chunks are encoded as written
        try:
            for number, row in enumerate(rows):
                form.payloads(self.shards.read(int(row)))
                if number == 0:
                    begun = time.perf_counter()
        except (OSError, ValueError, WorkFailed):
            return None
        each = (time.perf_counter() - begun) / _TIMED_SLICES
        return each * len(self.shards) / self.config.workers.num_on_cores

    def run(self) -> dict[str, Any]:
        """Write the missing shards; returns the index. Errors as of `convert`."""
        out = self.out
        if not (out / INDEX).exists():
            with locked(out / FOLDER_LOCK, out, "is writing it"):
                if not (out / INDEX).exists():  # by a command that ended when this one began
                    return _convert(self.shards, out, self.config)
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        return read_index(out)


def check(source: str | Path, out: Path, config: ConvertConfig) -> Conversion:
    """Open the source; raises InputProblems for all problems that show before work starts."""
    out = Path(out).absolute()
    refuse(config.problems())
    shards = ShardSet.open(source)
    refuse([*_problems_with_out(out, shards, config), *_problems_with_ids(shards, config)])
    return Conversion(shards, out, config)


def _convert(shards: ShardSet, out: Path, config: ConvertConfig) -> dict[str, Any]:
    format = _format(shards, config)
    header = {name: value for name, value in shards.index.items() if name not in _OF_THE_FILES}
    header |= {"preprocessing": {**header["preprocessing"], **_form(config)}, "converted_from": shards.digest}
    counted, num_samples = [], {}
    for split, first, count in _runs(shards):
        counted.append((split, count, partial(_rows_from, shards.resolved, first, shards.digest, format)))
        num_samples[split] = count
    num_workers, address = config.workers.num_on_cores, config.workers.ray_address
    plan = plan_shards(out, counted, format)
    workers: Workers[Any, Any] = Workers(runner, num_workers=num_workers, num_tasks=len(plan), address=address)
    with explain_full_disk(out), workers:
        # Marks the folder as this command's, from the first shard until the index is written.
        (out / PARTIAL).mkdir(parents=True, exist_ok=True)
        write_atomic(out / PARTIAL / _PLAN, json.dumps(_plan_of(shards, config)).encode())
        index = write_shards(out, plan, num_samples, header, workers)
    shutil.rmtree(out / PARTIAL)
    return index


def _format(shards: ShardSet, config: ConvertConfig) -> Format:
    return set_format(**_form(config), size=shards.size, bits=shards.bits, soft_edge="edge" in shards.parts)


def _runs(shards: ShardSet) -> Iterator[tuple[str, int, int]]:
    """Split, first row and number of rows of each run of one split; a set is ordered by split."""
    first = 0
    for code, split in enumerate(SPLITS):
        count = int((shards.split_N == code).sum())
        if count:
            yield split, first, count
        first += count


def _rows_from(root: str, first: int, stamp: str, format: Format, start: int, stop: int) -> _Rows:
    return _Rows(root, first + start, first + stop, stamp, format)


@cache
def _open(root: str) -> ShardSet:
    return ShardSet.open(root, check_files=False)


def _form(config: ConvertConfig) -> dict[str, Any]:
    """Store, codec and samples of a shard of the new set. Zarr's arrays are always zstd."""
    codec = "zstd" if config.store == "zarr" else config.codec
    return {"store": config.store, "codec": codec, "samples_per_shard": config.samples_per_shard}


def _plan_of(shards: ShardSet, config: ConvertConfig) -> dict[str, Any]:
    """The content of plan.json: another conversion into the same folder is refused."""
    return {"converted_from": shards.digest, **_form(config)}


def _problems_with_ids(shards: ShardSet, config: ConvertConfig) -> list[Problem]:
    ids = shards.samples["case_id"].unique().to_pylist() if config.store == "webdataset" else []
    return tar_store.dot_problems(shards.root, ids)


def _problems_with_out(out: Path, shards: ShardSet, config: ConvertConfig) -> Iterator[Problem]:
    remedy = "choose another folder"
    if str(out) in {str(Path(member.root).absolute()) for member in shards.members}:
        yield Problem(str(out), "output folder", "is the set that is to be converted", remedy)
    elif (out / INDEX).exists() or (out / PARTIAL / _PLAN).is_file():
        is_finished = (out / INDEX).exists()
        there = _plan_of_finished(out) if is_finished else _plan_of_unfinished(out)
        if any(there.get(name) != value for name, value in _plan_of(shards, config).items()):
            form = f"{there.get('store')}, {there.get('codec')}, {there.get('samples_per_shard')} samples a shard"
            holds = f"holds another set ({form}{'' if is_finished else ', unfinished'})"
            yield Problem(str(out), "output folder", holds, remedy)
    elif out.exists() and not out.is_dir():
        yield Problem(str(out), "output folder", "is a file", remedy)
    else:
        for name in (SHARDS, SAMPLES):
            if (out / name).exists():
                yield Problem(str(out), "output folder", f"holds {name} of something else", remedy)


def _plan_of_finished(out: Path) -> dict[str, Any]:
    index = read_index(out)
    return {**index, "samples_per_shard": index["preprocessing"].get("samples_per_shard")}


def _plan_of_unfinished(out: Path) -> dict[str, Any]:
    return read_json(out / PARTIAL / _PLAN, f"remove {out}", "the plan of a conversion")
