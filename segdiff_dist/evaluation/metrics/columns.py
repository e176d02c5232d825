"""The metric columns of samples.parquet: what is compared with what, the names, and the values from label maps.

Dimensions: B batch, H rows, W columns, K label ids, O organs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from segdiff_dist.evaluation.metrics import overlaps, similarity, surfaces
from segdiff_dist.evaluation.metrics.air import AIR_METRICS
from segdiff_dist.evaluation.metrics.organ_texture import organ_texture_columns
from segdiff_dist.evaluation.metrics.sharpness import sharpness_columns

if TYPE_CHECKING:
    import torch

    from data_shards.labels import LabelTable
    from data_shards.records import SliceMeta

# The three pairs of label maps; the first of each is the reference whose classes count.
PAIRS = ("mask_real", "real_gen", "mask_gen")
SIDES = ("real", "gen")
# For organs that the reference does not hold: whether they appear, and on what area.
FALSE_POSITIVES = ("false_positive_rate", "false_positive_area_mm2")
# HU inside an organ's mask on either image, CT only; `hu_mean_error` is the difference of the means without its sign.
HU_METRICS = ("hu_mean_real", "hu_mean_gen", "hu_mean_error", "hu_std_real", "hu_std_gen")
# The same in grey values of the common 8-bit window, which MR has too.
GREY_METRICS = ("grey_mean_real", "grey_mean_gen", "grey_std_real", "grey_std_gen")
# Where an organ's area is measured: in the mask, and in the labels predicted on either image.
SOURCES = ("mask", "real", "gen")

# Metrics of each organ and each pair of label maps.
ORGAN_METRICS = tuple(
    f"{kind}_{pair}"
    for kind in ("dice_either", "dice", "sensitivity", "precision", "surface_dice", "area_error", *FALSE_POSITIVES)
    for pair in PAIRS
)
# Columns whose means over the headline images are in the summary.
HEADLINE_METRICS = (
    *("psnr_db", "ssim", "ms_ssim", "lpips"),
    *ORGAN_METRICS,
    *(f"legacy_dice_{pair}" for pair in PAIRS),
)


def column_names(table: LabelTable) -> list[str]:
    """Names of the metric columns of samples.parquet, in order."""
    organs = [table.names[i] for i in table.organ_ids]
    names = ["psnr_db", "ssim", "ms_ssim", "lpips"]
    kinds = ["dice", "dice_either", "sensitivity", "precision", "surface_dice", "area_error", "legacy_dice"]
    kinds += FALSE_POSITIVES
    names += [f"{kind}_{pair}" for kind in kinds for pair in PAIRS]
    names += [*sharpness_columns(table), *organ_texture_columns(table), *AIR_METRICS]
    names += [f"{name}/{organ}" for name in (*HU_METRICS, *GREY_METRICS) for organ in organs]
    names += [f"dice_{pair}/{name}" for pair in PAIRS for name in table.names[1:]]
    of_organs = ("dice_either", "sensitivity", "precision", "surface_dice", "area_error", *FALSE_POSITIVES)
    names += [f"{kind}_{pair}/{organ}" for kind in of_organs for pair in PAIRS for organ in organs]
    return names + [f"area_mm2_{source}/{organ}" for source in SOURCES for organ in organs]


def similarity_columns(real_BHW: torch.Tensor, gen_BHW: torch.Tensor) -> dict[str, np.ndarray]:
    """Values [B] by column of pairs of uint8 images; `ms_ssim` only where the images are large enough."""
    columns: dict[str, np.ndarray] = {"psnr_db": similarity.psnr_db(real_BHW, gen_BHW)}
    if min(real_BHW.shape[1:]) >= similarity.MS_SSIM_SMALLEST_SIDE:
        columns["ssim"], columns["ms_ssim"] = similarity.ssim_and_ms_ssim(real_BHW, gen_BHW)
    else:
        columns["ssim"] = similarity.ssim(real_BHW, gen_BHW)
    return columns


def overlap_columns(
    pair: str,
    reference_BHW: np.ndarray,
    predicted_BHW: np.ndarray,
    table: LabelTable,
    spacing_mm: Sequence[tuple[float, float]],
    tolerance_mm_O: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """Values [B] by column of one of PAIRS: Dice, area error, areas, false organs; surface Dice where tolerances are
    given.

    uint8 label maps; `spacing_mm` of each, rows then columns; what needs it is NaN where it is NaN.
    """
    organ_ids, names = list(table.organ_ids), table.names
    counts_BKK = overlaps.confusion(reference_BHW, predicted_BHW, table.num_classes)
    values_by_kind = {
        "dice": overlaps.dice_per_class(counts_BKK),
        "dice_either": overlaps.dice_either(counts_BKK),
        "sensitivity": overlaps.sensitivity(counts_BKK),
        "precision": overlaps.precision(counts_BKK),
        "area_error": overlaps.area_errors(counts_BKK),
    }
    if tolerance_mm_O is not None:
        surface_BK = np.full(values_by_kind["dice"].shape, np.nan)
        surface_BK[:, organ_ids] = _surface_dice(reference_BHW, predicted_BHW, organ_ids, tolerance_mm_O, spacing_mm)
        values_by_kind["surface_dice"] = surface_BK
    columns = {f"legacy_dice_{pair}": overlaps.legacy_dice(counts_BKK)}
    for kind, values_BK in values_by_kind.items():
        columns[f"{kind}_{pair}"] = overlaps.mean_over_organs(values_BK, organ_ids)
        # Dice alone is also of the body.
        ids = range(1, table.num_classes) if kind == "dice" else organ_ids
        columns |= {f"{kind}_{pair}/{names[i]}": values_BK[:, i] for i in ids}
    first, second = pair.split("_")
    pixel_mm2 = np.array([np.prod(spacing) for spacing in spacing_mm])
    columns |= {f"area_mm2_{first}/{names[i]}": counts_BKK[:, i].sum(axis=1) * pixel_mm2 for i in organ_ids}
    columns |= {f"area_mm2_{second}/{names[i]}": counts_BKK[:, :, i].sum(axis=1) * pixel_mm2 for i in organ_ids}
    false_pixels_BO = overlaps.false_positive_pixels(counts_BKK)[:, organ_ids]
    return columns | _false_positive_columns(pair, false_pixels_BO, pixel_mm2, [names[i] for i in organ_ids])


def _surface_dice(
    reference_BHW: np.ndarray,
    predicted_BHW: np.ndarray,
    organ_ids: Sequence[int],
    tolerance_mm_O: Sequence[float],
    spacing_mm: Sequence[tuple[float, float]],
) -> np.ndarray:
    """float64 [B, O]; NaN for slices whose spacing is not known."""
    values_BO = np.full((len(reference_BHW), len(organ_ids)), np.nan)
    for b, (reference_HW, predicted_HW) in enumerate(zip(reference_BHW, predicted_BHW, strict=True)):
        if np.isfinite(spacing_mm[b]).all():
            values_BO[b] = surfaces.surface_dice(reference_HW, predicted_HW, organ_ids, tolerance_mm_O, spacing_mm[b])
    return values_BO


def _false_positive_columns(
    pair: str, false_pixels_BO: np.ndarray, pixel_mm2: np.ndarray, organs: Sequence[str]
) -> dict[str, np.ndarray]:
    rate, area = FALSE_POSITIVES
    appears_BO = np.where(np.isnan(false_pixels_BO), np.nan, false_pixels_BO > 0)
    area_mm2_BO = false_pixels_BO * pixel_mm2[:, None]
    columns = {f"{rate}_{pair}/{organ}": appears_BO[:, o] for o, organ in enumerate(organs)}
    columns |= {f"{area}_{pair}/{organ}": area_mm2_BO[:, o] for o, organ in enumerate(organs)}
    columns[f"{rate}_{pair}"] = overlaps.mean_over_organs(appears_BO, range(len(organs)))
    # The area of all false organs of an image together, not their mean.
    columns[f"{area}_{pair}"] = np.where(np.isfinite(pixel_mm2), np.nansum(area_mm2_BO, axis=1), np.nan)
    return columns


def hounsfield_columns(
    metas: Sequence[SliceMeta],
    mask_BHW: np.ndarray,
    real_BHW: np.ndarray,
    gen_BHW: np.ndarray,
    table: LabelTable,
    in_hu: Sequence[str] = ("CT",),
) -> dict[str, np.ndarray]:
    """HU_METRICS and GREY_METRICS [B] inside each organ of the mask, by column; HU are NaN for modalities
    that are not `in_hu`.

    From uint8 grey values, so that only the window of intensities counts that the shards keep.
    """
    hu_B2 = hu_of_slices(metas, in_hu)
    columns: dict[str, np.ndarray] = {}
    for side, images_BHW in zip(SIDES, (real_BHW, gen_BHW), strict=True):
        columns |= intensity_columns(side, mask_BHW, images_BHW, table, hu_B2)
    for organ in (table.names[i] for i in table.organ_ids):
        difference_B = columns[f"hu_mean_gen/{organ}"] - columns[f"hu_mean_real/{organ}"]
        columns[f"hu_mean_error/{organ}"] = np.abs(difference_B)
    return columns


def hu_of_slices(metas: Sequence[SliceMeta], in_hu: Sequence[str] = ("CT",)) -> np.ndarray:
    """float64 [B, 2]: HU of black, and HU a grey value of the 8-bit window; NaN for modalities that are not `in_hu`."""
    scales = [(m.intensity_offset, m.intensity_scale * (2**m.bits - 1) / similarity.GREY_RANGE) for m in metas]
    is_ct_B = np.array([meta.modality in in_hu for meta in metas])
    return np.where(is_ct_B[:, None], scales, np.nan)


def intensity_columns(
    side: str, mask_BHW: np.ndarray, images_BHW: np.ndarray, table: LabelTable, hu_B2: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean and spread [B] of one side ("real" or "gen") inside each organ of the mask, by column, in grey values and in
    HU; `hu_B2`: HU of black, and HU a grey value."""
    columns: dict[str, np.ndarray] = {}
    mean_BK, std_BK = similarity.grey_moments(mask_BHW, images_BHW, table.num_classes)
    at_black_B, per_grey_B = hu_B2.T
    for i in table.organ_ids:
        organ = table.names[i]
        columns[f"grey_mean_{side}/{organ}"], columns[f"grey_std_{side}/{organ}"] = mean_BK[:, i], std_BK[:, i]
        columns[f"hu_mean_{side}/{organ}"] = mean_BK[:, i] * per_grey_B + at_black_B
        columns[f"hu_std_{side}/{organ}"] = std_BK[:, i] * per_grey_B
    return columns
