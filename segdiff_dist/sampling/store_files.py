"""Reading the files of a sample store: files in another form than store.py writes are refused.

Dimensions: N items, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from data_shards.documents import checked, is_misread, read_json, shown
from data_shards.field_source import is_address
from data_shards.labels import LabelTable
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.records import is_path_inside
from data_shards.store.zarr_bounds import bound_zstd, is_plain_array
from segdiff_dist.sampling.items import COLUMNS, item_problems

if TYPE_CHECKING:
    import pyarrow as pa

JOB, ITEMS, IMAGES, LAYOUT, DONE = "job.json", "items.parquet", "images.zarr", "layout.json", "done"
PARTS = ("image", "mask")
# In job.json: names by label id, of a job whose masks come from a folder. Jobs of earlier versions do not have it.
LABELS = "label_table"
# Limit of an image's side in pixels, as for a shard set (set_index.py).
_LARGEST_SIZE = 4096
_AGAIN = "restore the folder, or remove it and sample again"


class _LabelTable(TypedDict):
    name: str
    names: list[str]


class _Sampled(TypedDict):
    split: NotRequired[str]
    sampler: NotRequired[dict[str, Any]]


class _Job(TypedDict):
    region_size: Annotated[int, Field(ge=1, lt=2**31)]
    weights: NotRequired[str]
    weights_digest: NotRequired[str]
    guidance_segmenter_sha256: NotRequired[str | None]
    guidance_weights_digest: NotRequired[str]
    diffusion: NotRequired[dict[str, Any]]
    sample: NotRequired[_Sampled]
    device: NotRequired[str | None]
    shards: NotRequired[str]
    shards_digest: NotRequired[str]
    images: NotRequired[str]
    images_digest: NotRequired[str]
    masks: NotRequired[str]
    masks_digest: NotRequired[str]
    masks_cut_like: NotRequired[dict[str, Any]]
    label_table: NotRequired[_LabelTable]


def foreign_addresses(path: Path, given: str | None) -> list[Problem]:
    """The shard set of the store at `path`, if it is behind an address that the user did not give. job.json may come
    from somebody else, and this process would connect to its address. `given`: the user's `data`."""
    if not (path / JOB).is_file():
        return []
    named = read_job(path).get("shards")
    if not is_address(named) or named == given:
        return []
    remedy = "an address is not taken from a run folder: give it as `data` in a --config FILE"
    return [Problem(str(path / JOB), "shards", str(named), remedy)]


def read_job(path: Path) -> dict[str, Any]:
    """job.json of the store at `path`."""
    remedy = f"restore it, or remove {path} and sample again: nothing else says what made the images"
    try:
        job = read_json(path / JOB, remedy)
        checked(job, _Job, path / JOB, "a job", remedy)
        by_others = ("images_digest", "masks_digest", LABELS) if "images" in job else ("weights", "weights_digest")
        for name in ("shards_digest",) if "shards" in job else by_others:
            if name not in job:  # source of the labels: the shard set, or the weights if there was no set
                raise ValueError(f"{name} is missing")
        if LABELS in job:
            LabelTable.of(job[LABELS])
    except ValueError as error:
        reason = error.problems[0].value if isinstance(error, InputProblems) else str(error)
        raise problem(path / JOB, "samples", f"damaged ({shown(reason)})", remedy) from error
    return job


def read_checksums(path: Path) -> dict[str, int] | None:
    """The contents of layout.json: CRC-32C by file. None if it is damaged or names files outside the store; empty for
    an old store without the file."""
    if not (path / LAYOUT).exists():
        return {}
    try:
        checksums = read_json(path / LAYOUT, _AGAIN)
    except InputProblems:
        return None
    return checksums if all(is_path_inside(name) and type(crc) is int for name, crc in checksums.items()) else None


def read_mark(file: Path) -> dict[str, Any]:
    """The contents of done/INDEX; empty if it is damaged."""
    try:
        mark = read_json(file, _AGAIN)
    except InputProblems:
        return {}
    return {name: value for name, value in mark.items() if type(value) in (int, float)}


def read_items(path: Path) -> pa.Table:
    """items.parquet: a row an item, with the columns and types of list_items_of, numbered from 0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(path):
        kinds = {name: pa.int64() if kind is int else pa.string() for name, kind in COLUMNS.items()}
        found = pq.read_schema(path / ITEMS)
        for name, kind in kinds.items():
            if name not in found.names or found.field(name).type != kind:
                raise ValueError(f"{name} is no column of {kind}")
        items = pq.read_table(path / ITEMS, schema=found)
        items.validate(full=True)
        if any(items[name].null_count for name in kinds):
            raise ValueError("values are missing")
        numbers = {name: items[name].to_numpy() for name, kind in COLUMNS.items() if kind is int}
        if (numbers["item_id"] != range(items.num_rows)).any():
            raise ValueError("item_id does not count from 0")
        for name, values in numbers.items():
            if ((values < 0) | (values >= 2**31)).any():
                raise ValueError(f"{name} below 0 or beyond 2^31")
    refuse(item_problems(path / ITEMS, items))
    return items


def open_images(path: Path, num_items: int, region_size: int) -> tuple[Any, Any]:
    """The arrays image and mask of images.zarr, uint8 [N, H, W], a chunk an item and a Zarr shard a region."""
    import zarr

    bound_zstd()
    with _readable(path):
        group = zarr.open_group(path / IMAGES, mode="r+")
        arrays = [group[name] for name in PARTS]
        size = arrays[0].shape[-1] if isinstance(arrays[0], zarr.Array) and arrays[0].ndim else 0
        for name, array in zip(PARTS, arrays, strict=True):
            if not is_plain_array(array, (num_items, size, size), (1, size, size), (region_size, size, size)):
                raise ValueError(f"{name} is no array of {num_items} images in shards of {region_size}")
        if not 1 <= size <= _LARGEST_SIZE:
            raise ValueError(f"images of {size} pixels a side")
    return arrays[0], arrays[1]


def open_masks(path: Path) -> Any:
    """The array uint8 [M, H, W] of masks.zarr, a chunk a mask, all in one Zarr shard."""
    import zarr

    bound_zstd()
    with _readable(path):
        masks: Any = zarr.open_array(path, mode="r")
        shape = masks.shape
        if (
            len(shape) != 3
            or max(shape[1:]) > _LARGEST_SIZE
            or not is_plain_array(masks, shape, (1, *shape[1:]), shape)
        ):
            raise ValueError(f"an array {shown(shape)} in chunks {shown(masks.chunks)}")
    return masks


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, InputProblems) or not is_misread(error):
            raise
        raise problem(path, "samples", f"cannot be read ({shown(error)})", _AGAIN) from error
