"""Checks of Zarr arrays from others: the layout is the one that we write, and no frame unpacks to more than its
chunk."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from data_shards.store.codecs import unzstd


def is_plain_array(
    array: Any, shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...] | None = None
) -> bool:
    """Whether it is a uint8 array of these shapes, sharded or not, with chunks that are only compressed with zstd."""
    import zarr

    if not isinstance(array, zarr.Array) or array.metadata.zarr_format != 3 or array.dtype != "uint8":
        return False
    if (array.shape, array.chunks, array.shards) != (shape, chunks, shards):
        return False
    outer = [codec.to_dict() for codec in array.metadata.codecs]
    if shards is None:
        return [codec["name"] for codec in outer] == ["bytes", "zstd"]
    if [codec["name"] for codec in outer] != ["sharding_indexed"]:
        return False
    settings: Any = outer[0]["configuration"]
    inner = [[codec["name"] for codec in settings[key]] for key in ("codecs", "index_codecs")]
    return inner == [["bytes", "zstd"], ["bytes", "crc32c"]]


@cache
def bound_zstd() -> None:
    """Make Zarr refuse, in this process, frames that unpack to more than their chunk: a few KB may unpack to any number
    of GB."""
    import zarr
    from zarr.registry import register_codec

    register_codec("zstd", _bounded_codec(), qualname=_NAME)
    zarr.config.set({"codecs.zstd": _NAME})


_NAME = f"{__name__}.BoundedZstd"


def _bounded_codec() -> Any:
    from zarr.codecs import ZstdCodec
    from zarr.core.buffer.cpu import as_numpy_array_wrapper

    class BoundedZstd(ZstdCodec):
        """Raises ValueError if a frame unpacks to more than its chunk."""

        def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
            most_bytes = chunk_spec.dtype.item_size * math.prod(chunk_spec.shape)
            return as_numpy_array_wrapper(
                lambda payload: unzstd(payload, most_bytes), chunk_bytes, chunk_spec.prototype
            )

    return BoundedZstd
