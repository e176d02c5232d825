"""Measuring the samples of a run: the checks, the Ray job, its workers, and its files. Imports stay light."""
