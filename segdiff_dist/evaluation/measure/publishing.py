"""The results of an evaluation are replaced together, although they are three files.

RUN/evaluation/.ready/summary.json, samples.parquet, predictions.zarr

A finished evaluation puts its files there, predictions.zarr last: that rename replaces the earlier evaluation. Then
each file is moved to its place in RUN/evaluation, predictions.zarr last again. Readers take a file from .ready while it
is there. So they see all files of the earlier evaluation, or all of the new one, also where the command was killed
between two of the moves. The next command that writes the folder finishes the moves.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SUMMARY, SAMPLES, PREDICTIONS = "summary.json", "samples.parquet", "predictions.zarr"
READY = ".ready"


def publish(folder: Path, summary: str, rows: Path, predictions: Path) -> None:
    """Replace the evaluation in `folder`, whose lock the caller holds.

    All is written before an earlier one goes, so a full disk does not damage that.
    """
    ready = folder / READY
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    (ready / SUMMARY).write_text(summary)
    rows.rename(ready / SAMPLES)
    predictions.rename(ready / PREDICTIONS)
    finish(folder)


def finish(folder: Path) -> None:
    """Move to their places the files that a killed command left ready. The caller holds the folder's lock."""
    ready = folder / READY
    if (ready / PREDICTIONS).is_dir():
        for name in (SUMMARY, SAMPLES):
            if (ready / name).is_file():
                (ready / name).rename(folder / name)
        shutil.rmtree(folder / PREDICTIONS, ignore_errors=True)
        (ready / PREDICTIONS).rename(folder / PREDICTIONS)
    shutil.rmtree(ready, ignore_errors=True)


def place_of(folder: Path, name: str) -> Path:
    """Where one of the three files is to be read."""
    ready = folder / READY
    is_newer = (ready / PREDICTIONS).is_dir() and (ready / name).exists()
    return ready / name if is_newer else folder / name
