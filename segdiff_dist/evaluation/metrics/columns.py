"""The metric columns of samples.parquet: what is compared with what, and the names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from segdiff_dist.evaluation.metrics.sharpness import sharpness_columns

if TYPE_CHECKING:
    from data_shards.labels import LabelTable

# The three pairs of label maps; the first of each is the reference whose classes count.
PAIRS = ("mask_real", "real_gen", "mask_gen")
SIDES = ("real", "gen")
# Of organs that the reference does not hold: whether they appear, and on what area.
FALSE_POSITIVES = ("false_positive_rate", "false_positive_area_mm2")
# HU inside an organ's mask on either image, CT only; `hu_mean_error` is the difference of the means without its sign.
HU_METRICS = ("hu_mean_real", "hu_mean_gen", "hu_mean_error", "hu_std_real", "hu_std_gen")
# Where an organ's area is measured: in the mask, and in the labels predicted on either image.
SOURCES = ("mask", "real", "gen")


def column_names(table: LabelTable) -> list[str]:
    """Names of the metric columns of samples.parquet, in order."""
    organs = [table.names[i] for i in table.organ_ids]
    names = ["psnr_db", "ssim", "ms_ssim", "lpips"]
    kinds = ("dice", "dice_either", "surface_dice", "area_error", "legacy_dice", *FALSE_POSITIVES)
    names += [f"{kind}_{pair}" for kind in kinds for pair in PAIRS]
    names += sharpness_columns(table)
    names += [f"{name}/{organ}" for name in HU_METRICS for organ in organs]
    names += [f"dice_{pair}/{name}" for pair in PAIRS for name in table.names[1:]]
    of_organs = ("dice_either", "surface_dice", "area_error", *FALSE_POSITIVES)
    names += [f"{kind}_{pair}/{organ}" for kind in of_organs for pair in PAIRS for organ in organs]
    return names + [f"area_mm2_{source}/{organ}" for source in SOURCES for organ in organs]
