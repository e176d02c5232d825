"""The store of generated images: a list of items, written first, and a Zarr v3 group with a region for each task.

RUN/samples/job.json        what made the images: masks, weights, sampler; or folders of others' images
RUN/samples/items.parquet   one row an item: which mask, which modality, which seed index
RUN/samples/images.zarr     arrays `image` and `mask`, uint8 [N, H, W], a Zarr shard a region; `item_id` and
                            `seed_index`, int64 [N]; the attributes name seed and weights
RUN/samples/masks.zarr      uint8 [M, H, W], where the masks come from a folder: all that were drawn, in one file
RUN/samples/layout.json     CRC-32C of each file that was there before the first image, job.json and itself left out
RUN/samples/done/000012     region 12 is written: CRC-32C of its two shard files, and the seconds that it took
RUN/.samples.lock           held by the command at work, from before there is a store (data_shards/locks.py)
RUN/.samples.unfinished     a store that is being laid out. Nothing else is ever removed
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards import locks
from data_shards.files import hidden_folder, is_leftover, new_folder, write_atomic
from data_shards.locks import lock_beside
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.store.codecs import ZSTD_LEVEL, crc32c
from segdiff_dist.config import differences, flatten, how_to_make
from segdiff_dist.sampling.store_files import (
    DONE,
    IMAGES,
    ITEMS,
    JOB,
    LABELS,
    LAYOUT,
    PARTS,
    open_images,
    read_checksums,
    read_items,
    read_job,
    read_mark,
)

if TYPE_CHECKING:
    import pyarrow as pa

MASKS = "masks.zarr"
# Paths in job.json. Digests beside them identify the files, so that a job may be moved with them.
_PLACES = ("weights", "shards", "images", "masks", "sample.sampler.guidance_segmenter")


@dataclass(frozen=True)
class Damage:
    """A region whose bytes are not those that were written, and which items can no longer be read from it."""

    region: int
    file: Path
    items: tuple[int, ...]

    def __str__(self) -> str:
        items = ", ".join(map(str, self.items))
        return f"{self.file}: damaged (items {items})" if self.items else f"{self.file}: damaged or missing"


class SampleStore:
    """The images of one sample job, some of which may still be missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = read_job(path)
        self.items: pa.Table = read_items(path)
        self.image, self.mask = open_images(path, len(self), self.region_size)

    def __len__(self) -> int:
        return self.items.num_rows

    @classmethod
    def open(cls, path: Path) -> SampleStore:
        """The store at `path`. Refused if there is none, or if one of the files that are written first is damaged."""
        if not (path / JOB).is_file():
            raise problem(path, "samples", "not found", f"sample first: {how_to_make('sample', path)}")
        remedy = "run the same `segdiff sample` again: it makes the file again"
        refuse(Problem(str(path / name), "samples", "damaged or missing", remedy) for name in _broken_files(path))
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, job: dict[str, Any]) -> SampleStore | None:
        """The store of `job` at `path`; None if `create` must make it, or write again the files that are written first.

        Refused: a folder with other files; a store of another job, unless it has no image yet. The job's "device" is
        not compared, and neither are paths of files that have digests.
        """
        if _is_free(path):
            return None
        try:
            _refuse_another(path, job)
            return None if _broken_files(path) else cls(path)
        except InputProblems:
            if _holds_no_image(path):
                return None
            raise

    @classmethod
    def create(
        cls, path: Path, job: dict[str, Any], items: pa.Table, size: int, masks_MHW: np.ndarray | None = None
    ) -> SampleStore:
        """Create a new job, or open the existing one if it is the same; another job is refused.

        The folder gets its name when it is complete: a killed creation leaves `.NAME.unfinished`, which the next one
        replaces. If other processes may do the same, call it under `locked`.
        """
        if (there := cls.reopen(path, job)) is not None:
            return there
        if path.is_dir() and any(path.iterdir()) and not _holds_no_image(path):
            warnings.warn(f"{path}: damaged or missing: {', '.join(_broken_files(path))}; made again", stacklevel=3)
            with hidden_folder(path) as fresh:
                _lay_out(fresh, job, items, size, masks_MHW)
                _mend(path, fresh)
            return cls(path)
        with new_folder(path, replaces=True) as unfinished:
            _lay_out(unfinished, job, items, size, masks_MHW)
        return cls(path)

    def update_places(self, job: dict[str, Any]) -> None:
        """Write the present paths of weights, masks and segmenter to job.json. `job`: the same but for its paths."""
        now = job | {"device": self.job.get("device")}
        if now != self.job:
            _write_job(self.path, now)
            self.job = now

    @property
    def region_size(self) -> int:
        """Items that are made, written and marked together."""
        return int(self.job["region_size"])

    @property
    def num_regions(self) -> int:
        """Regions of the job, the last of which may be shorter."""
        return -(-len(self) // self.region_size)

    def region(self, index: int) -> range:
        """The item ids of a region."""
        return range(index * self.region_size, min((index + 1) * self.region_size, len(self)))

    def done_regions(self) -> list[int]:
        """Regions that are made, in order."""
        marks = {file.name for file in (self.path / DONE).glob("*")}
        return [index for index in range(self.num_regions) if self._mark(index).name in marks]

    def missing_regions(self) -> list[int]:
        """Regions not made yet."""
        done = set(self.done_regions())
        return [i for i in range(self.num_regions) if i not in done]

    def missing(self) -> list[int]:
        """Item ids not made yet."""
        return [item for index in self.missing_regions() for item in self.region(index)]

    def write_region(self, index: int, image_BHW: np.ndarray, mask_BHW: np.ndarray, seconds: float = 0.0) -> None:
        """Write a region's images and masks, then mark it done; `seconds`: the time it took to make them.

        No other process may write this region. If a worker outlives its driver for a moment, its successor writes the
        same region too. That does no harm: Zarr replaces whole files, and both write the same bytes. Refused if another
        job has replaced the store meanwhile.
        """
        _refuse_another(self.path, self.job)
        items = self.region(index)
        assert image_BHW.shape == mask_BHW.shape == (len(items), *self.image.shape[1:])
        mark: dict[str, Any] = {"seconds": round(seconds, 4)}
        for name, array, values_BHW in zip(PARTS, (self.image, self.mask), (image_BHW, mask_BHW), strict=True):
            if len(items) < self.region_size:  # Zarr would read the rest of the file first, which may be damaged
                self._file(name, index).unlink(missing_ok=True)
            # An empty mask is stored as well: every region has a file that can be checked.
            array.with_config({"write_empty_chunks": True})[items.start : items.stop] = values_BHW
            mark[name] = _flushed_crc32c(self._file(name, index))
        write_atomic(self._mark(index), json.dumps(mark) + "\n")

    def damaged(self) -> Iterator[Damage]:
        """Every finished region whose files are not as they were written, found by their checksums."""
        for index in self.done_regions():
            mark = self.mark(index)
            for name in PARTS:
                file = self._file(name, index)
                if not file.is_file() or crc32c(file.read_bytes()) != mark.get(name):
                    yield Damage(index, file, tuple(i for i in self.region(index) if not self._reads(name, i)))

    def mark(self, index: int) -> dict[str, Any]:
        """The contents of done/INDEX; empty if it is damaged."""
        return read_mark(self._mark(index))

    def num_bytes(self, index: int) -> int:
        """Bytes of a finished region on the disk."""
        files = [self._file(name, index) for name in PARTS]
        return sum(file.stat().st_size for file in files if file.is_file())

    def unmark(self, index: int) -> None:
        """Have a region made again."""
        self._mark(index).unlink(missing_ok=True)

    def _mark(self, index: int) -> Path:
        return self.path / DONE / f"{index:06d}"

    def _file(self, name: str, index: int) -> Path:
        return self.path / IMAGES / name / "c" / str(index) / "0" / "0"

    def _reads(self, name: str, item: int) -> bool:
        try:
            getattr(self, name)[item]
        except (OSError, RuntimeError, ValueError):  # of the file, of zstd, of Zarr's shard index
            return False
        return True


def locked(path: Path, *, lends: bool = False) -> AbstractContextManager[None]:
    """While this process works on the store at `path`, which need not exist yet, others are refused (locks.py)."""
    return locks.locked(lock_beside(path), path, "is making them", lends=lends)


def _is_free(path: Path) -> bool:
    """Whether a store may be created at `path` without touching existing files; refused if there are other files."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        if path.is_mount():  # a folder cannot be renamed to it
            raise problem(path, "output folder", "a mount point", f"give a folder in it: --out {path / 'samples'}")
        return True
    if not (path / JOB).is_file() or not (path / IMAGES).is_dir():
        value = "holds other things than samples" if path.is_dir() else "a file"
        raise problem(path, "output folder", value, "give a new or an empty one (--out DIR)")
    return False


def _holds_no_image(path: Path) -> bool:
    """Whether a store may be removed: it holds only the files that are written first, and no finished region."""
    own = {JOB, ITEMS, IMAGES, MASKS, LAYOUT, DONE}
    return {file.name for file in path.iterdir() if not is_leftover(file)} <= own and not any((path / DONE).glob("*"))


def identity(job: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a job, by dotted key: its job.json without paths."""
    return {key: value for key, value in flatten(job).items() if key not in _PLACES}


def _refuse_another(path: Path, job: dict[str, Any]) -> None:
    begun = read_job(path)
    if LABELS not in begun:
        job = {key: value for key, value in job.items() if key != LABELS}
    there, asked = (identity(one) | {"device": None} for one in (begun, job))  # which has its own message
    if differing := differences(there, asked):
        key, old, new = differing[0]
        value = f"the samples here were made with {old!r}, not {new!r}"
        raise problem(path, key, value, f"use another folder (--out DIR), or remove {path}")


def _write_job(path: Path, job: dict[str, Any]) -> None:
    write_atomic(path / JOB, json.dumps(job, indent=2) + "\n")


def _lay_out(path: Path, job: dict[str, Any], items: pa.Table, size: int, masks_MHW: np.ndarray | None) -> None:
    """Write a store without images to the empty folder `path`. The same arguments give the same bytes."""
    import pyarrow.parquet as pq
    import zarr
    from zarr.codecs import ZstdCodec

    pq.write_table(items, path / ITEMS)
    # The frame's own checksum lets any reader find a flipped byte.
    zstd = ZstdCodec(level=ZSTD_LEVEL, checksum=True)
    settings = job.get("sample", {})
    attributes = {"weights": settings.get("weights"), "weights_digest": job.get("weights_digest")}
    group = zarr.open_group(path / IMAGES, mode="w", attributes=attributes | {"seed": settings.get("seed")})
    for name in PARTS:
        group.create_array(
            name,
            shape=(items.num_rows, size, size),
            dtype="uint8",
            chunks=(1, size, size),
            shards=(job["region_size"], size, size),
            compressors=zstd,
        )
    for name in ("item_id", "seed_index"):
        if name in items.column_names:
            group.create_array(name, data=items[name].to_numpy().astype(np.int64))
    if masks_MHW is not None:
        chunk = (1, *masks_MHW.shape[1:])
        zarr.create_array(path / MASKS, data=masks_MHW, chunks=chunk, shards=masks_MHW.shape, compressors=zstd)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    checksums = {str(file.relative_to(path)): crc32c(file.read_bytes()) for file in files}
    write_atomic(path / LAYOUT, json.dumps(checksums, indent=2) + "\n")
    (path / DONE).mkdir()
    _write_job(path, job)


def _broken_files(path: Path) -> list[str]:
    """Files of the layout that are not as they were written."""
    checksums = read_checksums(path)
    if checksums is None:
        return [LAYOUT]
    return [name for name, expected in checksums.items() if _crc32c_of(path / name) != expected]


def _mend(path: Path, fresh: Path) -> None:
    """Move the files that were made again to their places, if they equal the original ones."""
    made, written = read_checksums(fresh), read_checksums(path)
    assert made is not None
    for name, crc in made.items():
        expected = _crc32c_of(path / name) if written is None else written.get(name)
        if expected != crc:
            value = "damaged, and the file made again differs, perhaps because of another version"
            raise problem(path / name, "samples", value, f"restore it, or remove {path} and sample again")
    for name in (*made, LAYOUT):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).replace(path / name)


def _crc32c_of(file: Path) -> int | None:
    return crc32c(file.read_bytes()) if file.is_file() else None


def _flushed_crc32c(file: Path) -> int:
    """The checksum of a file, which is on the disk when this returns, so that no region is marked done before its files
    are safe."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return crc32c(stream.read())
