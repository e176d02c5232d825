"""What a pipeline's folder or a MONAI bundle says of its model: names of files, process of the training, sampler."""

from __future__ import annotations

from pathlib import Path

from data_shards.documents import read_json, reading
from segdiff_dist.config import validate
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.weight_files import DESCRIPTION

UNET, SEGMENTER, SCHEDULER = "unet", "segmenter", "scheduler"
INDEX, CARD, PICTURE = "model_index.json", "README.md", "gallery.png"
# The file that diffusers runs to get the class of the pipeline.
CODE, CLASS_NAME = "pipeline.py", "SegGuidedDiffusionPipeline"
RESTORE = "copy the folder again from where it was written"
# Of a MONAI bundle (docs/source/mb_specification.rst of MONAI).
BUNDLE_CONFIGS, BUNDLE_MODELS, BUNDLE_DOCS = "configs", "models", "docs"


def description_of(folder: Path) -> Path:
    """The segdiff.json of a pipeline's folder, or of a MONAI bundle."""
    of_bundle = folder / BUNDLE_CONFIGS / DESCRIPTION
    return of_bundle if of_bundle.is_file() else folder / DESCRIPTION


def net_of(folder: Path) -> Path:
    """The net's folder in a pipeline's folder, or in a MONAI bundle."""
    return folder / (UNET if description_of(folder).parent == folder else BUNDLE_MODELS)


def trained_process(weights: Path, otherwise: DiffusionConfig) -> DiffusionConfig:
    """The facts that sampling needs about the process that the net was trained on."""
    with reading(weights / DESCRIPTION, "the description of a denoiser", RESTORE):
        said = read_json(weights / DESCRIPTION, RESTORE).get("diffusion", {})
        process = as_trained(otherwise, said)[0].process
        return validate(DiffusionConfig, process, weights / DESCRIPTION)
