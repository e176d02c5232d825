"""Downloads of weights, before anything is measured. If one fails, its metric is left out with a reason.

They are downloaded here and not on each worker. So all workers use one file, whose digest is recorded.
"""

from __future__ import annotations

import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segdiff_dist.evaluation.metrics import inception, perceptual

# How long a server may take a connection and send nothing.
_SILENCE_S = 60.0


@dataclass(frozen=True)
class Weights:
    """Files of weights on this machine; None if a metric was not requested or its file could not be downloaded.

    `missing`: the reason, by the metric's name.
    """

    fid: str | None
    lpips: str | None
    missing: dict[str, str] = field(default_factory=dict)


@contextmanager
def weights_for(
    fid_weights: Path | str | None, lpips_weights: Path | str | None, shared: Path | None = None
) -> Iterator[Weights]:
    """The files to measure with: each given as a path, as 'download', or not at all.

    `shared`: a folder that all workers see, where they are on other machines. Downloaded files are copied there, and
    it is removed at the end.
    """
    missing: dict[str, str] = {}
    try:
        fid = _file(fid_weights, "fid", inception.load_inception, inception.downloaded_weights, shared, missing)
        lpips = _file(lpips_weights, "lpips", perceptual.load_lpips, perceptual.downloaded_weights, shared, missing)
        yield Weights(fid, lpips, missing)
    finally:
        if shared is not None:
            shutil.rmtree(shared, ignore_errors=True)


def _file(
    given: Path | str | None,
    name: str,
    load: Callable[[str, str], Any],
    downloaded: Callable[[], Path],
    shared: Path | None,
    missing: dict[str, str],
) -> str | None:
    if not isinstance(given, str):
        return str(given.resolve()) if given is not None else None
    patience_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        load(given, "cpu")  # downloads a missing file, and fails for a damaged one
        file = downloaded()
        if shared is not None:
            shared.mkdir(parents=True, exist_ok=True)
            file = Path(shutil.copyfile(file, shared / file.name))
    except Exception as error:  # of the network, of the disk, of a file that is not the weights
        reason = f"its weights could not be downloaded ({type(error).__name__}: {' '.join(str(error).split())})"[:300]
        missing[name] = f"{reason}; give their file {downloaded().name} as evaluate.{name}_weights"
        warnings.warn(f"{name} is left out: {missing[name]}", stacklevel=4)
        return None
    finally:
        socket.setdefaulttimeout(patience_s)
    return str(file.resolve())
