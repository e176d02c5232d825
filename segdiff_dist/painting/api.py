"""For programs: `segdiff_dist.paint(mask)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segdiff_dist.painting.job import Painting, PaintOptions, PaintSettings, check_paint
from segdiff_dist.painting.masks import open_mask
from segdiff_dist.painting.model import Model, open_model

__all__ = ["Model", "PaintOptions", "Painting", "open_model", "paint"]
_OPTIONS = PaintOptions()


def paint(
    mask: Any,
    model: Model | str | Path | None = None,
    *,
    modality: str | None = None,
    seed: int = 0,
    labels: str | Path | Mapping[int, str] | None = None,
    affine: np.ndarray | None = None,
    spacing_mm: float | None = None,
    options: PaintOptions = _OPTIONS,
) -> Painting:
    """The image of a mask: `.image` (PIL, of a 2-D mask), `.values` (int16 in the mask's layout, HU for CT), `.save`.

    mask: a file (.png, .nii.gz, .mha, .nrrd, DICOM SEG), an array of label ids [H, W] or [I, J, K], or a PIL image.
    model: of `open_model`, or what it takes; None: the small model of the package. labels: a file, a table's name or
    {id: name}; None: as the mask says, else the model's ids. affine: of an array [I, J, K], voxels to RAS mm.
    spacing_mm: the side of a picture's pixels; None: the picture fills the model's square. options: the rest, such as
    `PaintOptions(axis="coronal")`. Raises InputProblems.
    """
    opened = model if isinstance(model, Model) else open_model(model)
    settings = PaintSettings(**vars(options), modality=modality, seed=seed, labels=labels)
    job = check_paint(open_mask(mask, affine=affine, grid_mm=opened.grid_mm, spacing_mm=spacing_mm), opened, settings)
    return job.make(shows_progress=False)
