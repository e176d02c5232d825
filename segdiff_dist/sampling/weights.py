"""The weights that a job samples with: their identity, whether they can be used, and whether they stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.problems import InputProblems, problem
from segdiff_dist.config import how_to_make
from segdiff_dist.weight_files import DESCRIPTION, folder_digest

if TYPE_CHECKING:
    from segdiff_dist.denoising.denoiser import Denoiser


def refuse_missing(folder: Path) -> None:
    """Raise InputProblems if there are no weights in `folder`."""
    if not (folder / DESCRIPTION).is_file():
        raise problem(folder, "weights", "not found", f"train first: {how_to_make('train', folder)}")


def weights_digest(folder: Path) -> str:
    """sha256 over a weights folder's files; it names the model of an image. Folders inside do not belong to it."""
    refuse_missing(folder)
    return folder_digest(folder)


def load_denoiser(folder: Path, expected_digest: str | None = None) -> tuple[Denoiser, str]:
    """The denoiser in `folder` and its digest, which was the same before and after loading.

    Raises InputProblems: weights that cannot be used; another digest than the expected one, or two while loading.
    """
    from segdiff_dist.denoising.denoiser import Denoiser

    digest = weights_digest(folder)
    if expected_digest not in (None, digest):
        raise changed(folder, "weights")
    try:
        model = Denoiser.load(folder)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        remedy = "copy the folder again, or have `segdiff train` or `segdiff average` write it again"
        value = f"describes no network that can be built ({type(error).__name__}: {error})"
        raise problem(folder / DESCRIPTION, "weights", value, remedy) from error
    if weights_digest(folder) != digest:
        raise problem(folder, "weights", "replaced while they were loaded", "wait until they are written, start again")
    return model, digest


def changed(what: object, field: str) -> InputProblems:
    """The error if something that a job's images depend on has changed since the job began."""
    remedy = (
        "a store holds the images of one model and one list: restore the former weights, or sample to another --out"
    )
    return problem(what, field, "changed since the job began", remedy)
