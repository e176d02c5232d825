"""Denoiser, training, sampling and evaluation of segdiff. Imports stay light; heavy engines load on use.

`segdiff_dist.paint(mask)` is the shortest way to an image; `open_model` keeps a model for many.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data_shards import __version__

if TYPE_CHECKING:
    from segdiff_dist.painting.api import PaintOptions, open_model, paint

__all__ = ["PaintOptions", "__version__", "open_model", "paint"]


def __getattr__(name: str) -> Any:
    if name in ("PaintOptions", "open_model", "paint"):
        return getattr(import_module("segdiff_dist.painting.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
