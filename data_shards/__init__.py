"""Volumes to device batches: phantom, prepare, shards, order, loader. Imports stay light; heavy engines load on use."""

__version__ = "0.2.0"
