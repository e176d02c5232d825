"""Denoiser, training, sampling and evaluation of segdiff. Imports stay light; heavy engines load on use."""

from data_shards import __version__

__all__ = ["__version__"]
