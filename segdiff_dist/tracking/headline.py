"""The numbers of an evaluation that people compare: MLflow shows them as metrics of a run and as tags of a model."""

from __future__ import annotations

# The headline Dice and its ceiling, sharpness, distances, then what others report.
HEADLINE = (
    *("dice_either_mask_gen", "dice_either_mask_real", "dice_mask_gen", "sharpness", "texture"),
    *(
        "segmenter_frechet",
        "segmenter_precision",
        "segmenter_recall",
        "segmenter_patient_precision",
        "segmenter_patient_recall",
    ),
    *("fid", "kid", "frd"),
    *("psnr_db", "ssim", "lpips"),
)
