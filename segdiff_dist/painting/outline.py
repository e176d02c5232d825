"""An outline of the patient for masks that hold organs alone, as experts' masks do.

Without an outline a model leaves organs in black air. Dimensions: I, J, K canonical.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_shards.ingest.slices import VIEWS
from data_shards.ingest.volumes import Volume

# Semi-axes of the outline over those of the ellipse around the organs: in the phantom the wall of the body is about a
# fifth of its half width.
_WIDER = 1.25


def with_outline(labels: Volume, body_id: int, axis: str) -> Volume:
    """The mask with `body` in the background inside an ellipse, the same one in every plane along `axis`: the smallest
    with the sides' ratio of the organs' box that holds all organs, and a quarter wider."""
    through = VIEWS[axis][0]
    shown = labels.voxels_IJK.any(axis=through)
    first, second = np.nonzero(shown)
    centre = [0.5 * (at.min() + at.max()) for at in (first, second)]
    half = [0.5 * (at.max() - at.min() + 1) for at in (first, second)]
    x = (np.arange(shown.shape[0])[:, None] - centre[0]) / half[0]
    y = (np.arange(shown.shape[1])[None, :] - centre[1]) / half[1]
    radius = np.hypot(x, y)
    inside = np.expand_dims(radius <= _WIDER * radius[shown].max(), through)
    drawn = np.where((labels.voxels_IJK == 0) & inside, np.uint8(body_id), labels.voxels_IJK)
    return replace(labels, voxels_IJK=drawn)
