"""Slices to batches: the order of samples, augmentation, and DALI."""
