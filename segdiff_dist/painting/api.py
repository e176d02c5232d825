"""For programs: `segdiff_dist.paint(mask)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segdiff_dist.painting.job import Noise, Outline, Painting, PaintSettings, check_paint
from segdiff_dist.painting.masks import open_mask
from segdiff_dist.painting.model import Model, open_model
from segdiff_dist.painting.tables import OtherLabels

__all__ = ["Model", "Painting", "open_model", "paint"]


def paint(
    mask: Any,
    model: Model | str | Path | None = None,
    *,
    modality: str | None = None,
    seed: int = 0,
    labels: str | Path | Mapping[int, str] | None = None,
    other_labels: OtherLabels = "refuse",
    affine: np.ndarray | None = None,
    spacing_mm: float | None = None,
    axis: str = "axial",
    outline: Outline = "auto",
    noise: Noise = "shared",
    shows_progress: bool = False,
) -> Painting:
    """The image of a mask: `.image` (PIL, of a 2-D mask), `.values` (int16 in the mask's layout, HU for CT), `.save`.

    mask: a file (.png, .nii.gz, .mha, .nrrd, DICOM SEG), an array of label ids [H, W] or [I, J, K], or a PIL image.
    model: of `open_model`, or what it takes; None: the small model of the package. labels: a file, a table's name or
    {id: name}; None: as the mask says, else the model's ids. affine: of an array [I, J, K], voxels to RAS mm.
    spacing_mm: the side of a picture's pixels; None: the picture fills the model's square. The other arguments are
    those of `segdiff paint --help-all`. Raises InputProblems.
    """
    opened = model if isinstance(model, Model) else open_model(model)
    settings = PaintSettings(
        modality=modality,
        axis=axis,
        seed=seed,
        labels=labels,
        other_labels=other_labels,
        outline=outline,
        noise=noise,
    )
    job = check_paint(open_mask(mask, affine=affine, grid_mm=opened.grid_mm, spacing_mm=spacing_mm), opened, settings)
    return job.make(shows_progress=shows_progress)
