"""A trained model in five lines of Python: a mask in, an image out.

FOLDER/model_index.json           diffusers' list of what is below
FOLDER/pipeline.py                the class that diffusers' DiffusionPipeline makes of it; it needs segdiff
FOLDER/unet/                      the UNet2DModel; beside its files, what joins the mask to its input
FOLDER/vae/                       for a model that works on latents: the AutoencoderKL
FOLDER/unet/low_resolution/       of a cascade: the denoiser of the stage below, with what belongs to it
FOLDER/scheduler/                 diffusers' scheduler of the process that it was trained on
FOLDER/segdiff.json               schedule and sampler settings
FOLDER/README.md, gallery.png     the model card; masks and synthetic images, if the run has samples

monai_bundle.py writes the same model as a MONAI bundle.
"""

from segdiff_dist.pipeline.card import CardParts
from segdiff_dist.pipeline.description import DESCRIPTION, PICTURE, SEGMENTER, UNET, description_of, net_of
from segdiff_dist.pipeline.folder import Extras, pipeline_problems, scheduler_of, write_pipeline
from segdiff_dist.pipeline.model import SegGuidedPipeline, SliceKey
from segdiff_dist.pipeline.monai_bundle import write_bundle

__all__ = [
    "DESCRIPTION",
    "PICTURE",
    "SEGMENTER",
    "UNET",
    "CardParts",
    "Extras",
    "SegGuidedPipeline",
    "SliceKey",
    "description_of",
    "net_of",
    "pipeline_problems",
    "scheduler_of",
    "write_bundle",
    "write_pipeline",
]
