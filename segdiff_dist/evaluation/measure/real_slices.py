"""Real images that are measured by themselves, if generated ones have no real counterparts.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from segdiff_dist.evaluation.metrics import air, organ_texture, sharpness
from segdiff_dist.evaluation.metrics.columns import column_names, hu_of_slices, intensity_columns, overlap_columns

if TYPE_CHECKING:
    from data_shards.labels import LabelTable
    from segdiff_dist.evaluation.measure.worker import ChunkResult, Evaluator


@dataclass(frozen=True)
class RealSlices:
    """A worker's task: these slices of the shard set, compared with their own masks."""

    rows: tuple[int, ...]

    def run(self, evaluator: Evaluator) -> ChunkResult:
        """As for a chunk, with a row for each slice, but only the columns and features of the real side."""
        from segdiff_dist.evaluation.measure.worker import ChunkResult

        records = [evaluator.shards.read(row).cropped(evaluator.store.image.shape[1]) for row in self.rows]
        image_BHW, mask_BHW = (np.stack(a) for a in zip(*((r.image_uint8(), r.mask_HW) for r in records), strict=True))
        label_maps, features = evaluator.label(image_BHW, [record.meta.modality for record in records])
        columns = {name: np.full(len(records), np.nan) for name in column_names(evaluator.table)}
        spacing_mm = [record.meta.spacing_mm for record in records]
        columns |= overlap_columns(
            "mask_real", mask_BHW, label_maps, evaluator.table, spacing_mm, evaluator.tolerances_mm
        )
        columns |= one_sided_columns(
            image_BHW,
            mask_BHW,
            evaluator.table,
            "real",
            hu_of_slices([r.meta for r in records], evaluator.shards.in_hu),
        )
        counts_B2G = np.zeros((len(records), 2, 256), np.int64)
        counts_B2G[:, 0] = [np.bincount(image_HW.ravel(), minlength=256) for image_HW in image_BHW]
        by_side = {(name, "real"): features_BD for name, features_BD in features.items()}
        chosen = [i for i, row in enumerate(self.rows) if row in evaluator.inputs.radiomics_rows]
        by_side |= evaluator.radiomics_of({"real": image_BHW[chosen]}, chosen, len(records))
        return ChunkResult(evaluator.without_body(columns), by_side, counts_B2G, dict(evaluator.failed))


def one_sided_columns(
    image_BHW: np.ndarray, mask_BHW: np.ndarray, table: LabelTable, side: str, hu_B2: np.ndarray
) -> dict[str, np.ndarray]:
    """The columns of one side ("real" or "gen") of images without a counterpart: power, texture, air, grey values, HU.

    Power is of the box inside the image's own constant border.
    """
    columns: dict[str, np.ndarray] = {}
    for texture in (sharpness, organ_texture, air):
        columns |= texture.measure(image_BHW, image_BHW, mask_BHW, table)
    names = (f"power_{side}_", f"texture_{side}", *(f"autocorrelation_{lag}_{side}" for lag in organ_texture.LAGS))
    of_air = [name for name in air.AIR_METRICS if name.endswith(f"_{side}")]
    columns = {n: values_B for n, values_B in columns.items() if n.startswith(names) or n in of_air}
    return columns | intensity_columns(side, mask_BHW, image_BHW, table, hu_B2)
