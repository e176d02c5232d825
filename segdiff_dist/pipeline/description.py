"""What a pipeline's folder says of its model: names of files, the process of its training, its sampler."""

from __future__ import annotations

from pathlib import Path

from data_shards.documents import read_json, reading
from segdiff_dist.config import validate
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.diffusion import as_trained

UNET, SEGMENTER, SCHEDULER = "unet", "segmenter", "scheduler"
DESCRIPTION, INDEX, CARD, PICTURE = "segdiff.json", "model_index.json", "README.md", "gallery.png"
# The file that diffusers runs to get the class of the pipeline.
CODE, CLASS_NAME = "pipeline.py", "SegGuidedDiffusionPipeline"
RESTORE = "copy the folder again from where it was written"


def trained_process(weights: Path, otherwise: DiffusionConfig) -> DiffusionConfig:
    """The facts that sampling needs about the process that the net was trained on."""
    with reading(weights / DESCRIPTION, "the description of a denoiser", RESTORE):
        said = read_json(weights / DESCRIPTION, RESTORE).get("diffusion", {})
        process = as_trained(otherwise, said)[0].process
        return validate(DiffusionConfig, process, weights / DESCRIPTION)
