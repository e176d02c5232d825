"""Denoiser, training, sampling and evaluation of segdiff. Imports stay light; heavy engines load on use."""

__version__ = "0.1.0"
