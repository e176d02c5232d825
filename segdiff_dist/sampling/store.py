"""Where generated images live: a list of items, written first, and a Zarr v3 array with a region for each task.

RUN/samples/job.json        what made the images: shard set, weights, sampler settings
RUN/samples/items.parquet   one row an item: which mask, which modality, which seed index
RUN/samples/images.zarr     arrays `image` and `mask`, uint8 [N, H, W]; a Zarr shard is a region
RUN/samples/done/000012     region 12 is written
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.problems import problem
from segdiff_dist.config import differences, flatten, write_text_atomically

if TYPE_CHECKING:
    import pyarrow as pa

_JOB, _ITEMS, _IMAGES, _DONE = "job.json", "items.parquet", "images.zarr", "done"


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
    def create(cls, path: Path, job: dict[str, Any], items: pa.Table, size: int) -> SampleStore:
        """Lay out a new job, or open the one that is there when it is the same; another job is refused."""
        if (path / _JOB).is_file():
            store = cls(path)
            differing = differences(flatten(store.job), flatten(job))
            if differing:
                key, old, new = differing[0]
                raise problem(
                    path,
                    key,
                    f"the samples here were made with {old!r}, not {new!r}",
                    f"use another folder, or remove {path}",
                )
            return store
        import pyarrow.parquet as pq
        import zarr
        from zarr.codecs import ZstdCodec

        shutil.rmtree(path, ignore_errors=True)  # what a killed creation left: without job.json it holds no images
        (path / _DONE).mkdir(parents=True)
        pq.write_table(items, path / _ITEMS)
        group = zarr.open_group(path / _IMAGES, mode="w")
        for name in ("image", "mask"):
            group.create_array(
                name,
                shape=(items.num_rows, size, size),
                dtype="uint8",
                chunks=(1, size, size),
                shards=(job["region_size"], size, size),
                compressors=ZstdCodec(level=3),
            )
        write_text_atomically(path / _JOB, json.dumps(job, indent=2) + "\n")
        return cls(path)

    @property
    def region_size(self) -> int:
        """Items that are made, written and marked together."""
        return int(self.job["region_size"])

    def region(self, index: int) -> range:
        """The item ids of a region."""
        return range(index * self.region_size, min((index + 1) * self.region_size, len(self)))

    def missing_regions(self) -> list[int]:
        """Regions not made yet."""
        num_regions = -(-len(self) // self.region_size)
        done = {int(p.name) for p in (self.path / _DONE).iterdir() if p.name.isdigit()}
        return [i for i in range(num_regions) if i not in done]

    def missing(self) -> list[int]:
        """Item ids not made yet."""
        return [item for index in self.missing_regions() for item in self.region(index)]

    def write_region(self, index: int, image_BHW: np.ndarray, mask_BHW: np.ndarray) -> None:
        """Write a region's images and masks, then mark it done. No other process may write this region."""
        items = self.region(index)
        assert image_BHW.shape == mask_BHW.shape == (len(items), *self.image.shape[1:])
        self.image[items.start : items.stop] = image_BHW
        self.mask[items.start : items.stop] = mask_BHW
        (self.path / _DONE / f"{index:06d}").touch()
