"""The class of the model in this folder: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` runs this.

The class itself is part of the package segdiff-dist.
"""

try:
    from segdiff_dist.pipeline.for_diffusers import SegGuidedDiffusionPipeline
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "segdiff_dist":
        raise
    raise ImportError(
        "this model needs the package segdiff-dist, of the version that its model card names or a later one: "
        "pip install segdiff-dist"
    ) from error

__all__ = ["SegGuidedDiffusionPipeline"]
