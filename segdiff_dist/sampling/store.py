"""Where generated images live: a list of items, written first, and a Zarr v3 group with a region for each task.

RUN/samples/job.json        what made the images: masks, weights, sampler settings
RUN/samples/items.parquet   one row an item: which mask, which modality, which seed index
RUN/samples/images.zarr     arrays `image` and `mask`, uint8 [N, H, W], a Zarr shard a region; `item_id` and
                            `seed_index`, int64 [N]; the attributes name seed and weights
RUN/samples/masks.zarr      uint8 [M, H, W], where the masks come from a folder: all that there are
RUN/samples/done/000012     region 12 is written: CRC-32C of its two shard files, and the seconds that it took
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.problems import problem
from data_shards.store.codecs import ZSTD_LEVEL, crc32c
from segdiff_dist.config import differences, flatten, write_text_atomically

if TYPE_CHECKING:
    import pyarrow as pa

MASKS = "masks.zarr"
_JOB, _ITEMS, _IMAGES, _DONE, _LOCK = "job.json", "items.parquet", "images.zarr", "done", ".lock"
_PARTS = ("image", "mask")


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
    """The images of one sample job, some of which may be missing yet."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq
        import zarr

        self.path = path
        self.job: dict[str, Any] = json.loads((path / _JOB).read_text())
        self.items: pa.Table = pq.read_table(path / _ITEMS)
        group = zarr.open_group(path / _IMAGES, mode="r+")
        self.image: Any = group["image"]
        self.mask: Any = group["mask"]

    def __len__(self) -> int:
        return self.items.num_rows

    @classmethod
    def open(cls, path: Path) -> SampleStore:
        """The store at `path`."""
        if not (path / _JOB).is_file():
            raise problem(path, "samples", "not found", "sample first: `segdiff sample --run DIR --data SHARDS`")
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, job: dict[str, Any]) -> SampleStore | None:
        """The store at `path`, None where there is none; one of another job is refused. Where the job is to run, its
        "device", is not compared."""
        if not (path / _JOB).is_file():
            return None
        store = cls(path)
        if differing := differences(flatten(store.job | {"device": job.get("device")}), flatten(job)):
            key, old, new = differing[0]
            value = f"the samples here were made with {old!r}, not {new!r}"
            raise problem(path, key, value, f"use another folder (--out DIR), or remove {path}")
        return store

    @classmethod
    def create(
        cls, path: Path, job: dict[str, Any], items: pa.Table, size: int, masks_MHW: np.ndarray | None = None
    ) -> SampleStore:
        """Lay out a new job, or open the one that is there when it is the same; another job is refused."""
        if (there := cls.reopen(path, job)) is not None:
            return there
        import pyarrow.parquet as pq
        import zarr
        from zarr.codecs import ZstdCodec

        shutil.rmtree(path, ignore_errors=True)  # what a killed creation left: without job.json it holds no images
        (path / _DONE).mkdir(parents=True)
        pq.write_table(items, path / _ITEMS)
        # The frame's own checksum lets any reader find a flipped byte.
        zstd = ZstdCodec(level=ZSTD_LEVEL, checksum=True)
        told = {name: job.get(name) for name in ("weights", "weights_digest")}
        group = zarr.open_group(path / _IMAGES, mode="w", attributes=told | {"seed": job.get("sample", {}).get("seed")})
        for name in _PARTS:
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
            zarr.create_array(path / MASKS, data=masks_MHW, chunks=chunk, compressors=zstd, write_data=True)
        write_text_atomically(path / _JOB, json.dumps(job, indent=2) + "\n")
        return cls(path)

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
        return sorted(int(p.name) for p in (self.path / _DONE).iterdir() if p.name.isdigit())

    def missing_regions(self) -> list[int]:
        """Regions not made yet."""
        done = set(self.done_regions())
        return [i for i in range(self.num_regions) if i not in done]

    def missing(self) -> list[int]:
        """Item ids not made yet."""
        return [item for index in self.missing_regions() for item in self.region(index)]

    def write_region(self, index: int, image_BHW: np.ndarray, mask_BHW: np.ndarray, seconds: float = 0.0) -> None:
        """Write a region's images and masks, then mark it done; `seconds`: what it took to make them.

        No other process may write this region. Zarr replaces files whole, so even a worker that outlives its driver for
        a moment, beside its successor, harms nothing: both write the same bytes.
        """
        items = self.region(index)
        assert image_BHW.shape == mask_BHW.shape == (len(items), *self.image.shape[1:])
        mark: dict[str, Any] = {"seconds": round(seconds, 4)}
        for name, array, values_BHW in zip(_PARTS, (self.image, self.mask), (image_BHW, mask_BHW), strict=True):
            # An empty mask is stored as well: every region has a file that can be checked.
            array.with_config({"write_empty_chunks": True})[items.start : items.stop] = values_BHW
            mark[name] = _flushed_crc32c(self._file(name, index))
        write_text_atomically(self._mark(index), json.dumps(mark) + "\n")

    def damaged(self) -> Iterator[Damage]:
        """Every finished region whose files are not as they were written, found by their checksums."""
        for index in self.done_regions():
            mark = self.mark(index)
            for name in _PARTS:
                file = self._file(name, index)
                if not file.is_file() or crc32c(file.read_bytes()) != mark.get(name):
                    yield Damage(index, file, tuple(i for i in self.region(index) if not self._reads(name, i)))

    def mark(self, index: int) -> dict[str, Any]:
        """What done/INDEX says; nothing where it is damaged itself."""
        try:
            return dict(json.loads(self._mark(index).read_text()))
        except ValueError:
            return {}

    def num_bytes(self, index: int) -> int:
        """What a finished region takes on disk."""
        files = [self._file(name, index) for name in _PARTS]
        return sum(file.stat().st_size for file in files if file.is_file())

    def unmark(self, index: int) -> None:
        """Have a region made again."""
        self._mark(index).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this process works on the store, others are refused. The lock ends with the process, killed or not."""
        with (self.path / _LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                other = file.read().strip() or "another process"
                raise problem(self.path, "samples", f"{other} is making them", "wait for it, or stop it") from error
            except OSError as error:  # a file system without locks
                warnings.warn(f"{self.path} cannot be locked ({error}): start one job at a time", stacklevel=3)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def _mark(self, index: int) -> Path:
        return self.path / _DONE / f"{index:06d}"

    def _file(self, name: str, index: int) -> Path:
        return self.path / _IMAGES / name / "c" / str(index) / "0" / "0"

    def _reads(self, name: str, item: int) -> bool:
        try:
            getattr(self, name)[item]
        except (OSError, RuntimeError, ValueError):  # of the file, of zstd, of Zarr's shard index
            return False
        return True


def _flushed_crc32c(file: Path) -> int:
    """The checksum of a file that is on the disk when this returns, so that no mark outlives what it vouches for."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return crc32c(stream.read())
