"""Slices to batches: which comes when, what is done to it, and DALI."""
