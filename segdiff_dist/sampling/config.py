"""What `segdiff sample` is to make, and how: the `sample` section."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.records import AXES
from segdiff_dist.denoising.config import Objective
from segdiff_dist.denoising.sampler_config import SamplerConfig

# Below this a CPU's fp32 products take another path and round differently, so smaller batches are filled up to it.
LEAST_BATCH = 4

# Who makes the images and where they come to lie changes none of them. What they show is told of `masks` and
# `label_map` by a digest of the files.
_NOT_IN_THE_JOB = ("num_workers", "ray_address", "device", "region_size", "batch_size", "out", "masks", "label_map")
# The sampler's settings that came after the first job.json: there while they are not the defaults.
_LATER = (
    *("sigma_min", "sigma_max", "rho", "churn", "churn_interval", "churn_noise"),
    *("guidance_interval", "guidance_weights"),
)


@dataclass(frozen=True)
class SampleConfig:
    """What to make, and how."""

    split: Annotated[Literal["train", "val", "test"], tyro.conf.arg(aliases=["--split"])] = "test"
    """Whose masks are used."""
    masks: Annotated[Path | None, tyro.conf.arg(aliases=["--masks"])] = None
    """A folder of masks to use in place of a split: NIfTI volumes, cut as the shard set was, or PNG slices of its size.
    target_modality then is CT or MR."""
    masks_axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """The axis along which NIfTI masks are cut, and which PNG masks are of. A NIfTI file of one slice has its own."""
    label_map: Path | None = None
    """A YAML or JSON file that says what the ids in `masks` mean: `id: name or id of the model's label table`. null:
    they are the model's own."""
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num"])] = 1024
    """Masks drawn from the source, patients and places mixed; null takes all of them."""
    samples_per_mask: int = 1
    """Images made for each of `diverse_masks` masks (Figure 4); 1 for the others."""
    diverse_masks: int | None = None
    """null: every mask gets samples_per_mask images. Otherwise the modalities' first masks in turn."""
    target_modality: Literal["same", "other", "CT", "MR"] = "same"
    """The modality to make. Another than the mask's own is the paper's Figure 5."""
    without_organs: tuple[str, ...] = ()
    """Organs to leave out of every mask, by name. A model trained with diffusion.organ_dropout knows such masks."""
    cross_modality_masks: int = 0
    """This many masks, the modalities' first in turn, also get images in the other modality."""
    seed: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    weights: str = "ema"
    """The folder under RUN/weights that is used: ema_LENGTH, or online, the weights as they are without an average. ema
    is the first of train.ema_lengths."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["--out"])] = field(default=None, metadata=FROM_A_PERSON)
    """The folder of the images; null: RUN/samples, which `segdiff evaluate` reads."""
    region_size: int = 16
    """Images written as one Zarr region, by one worker."""
    batch_size: int | None = None
    """Images made at once, at least 4; null: as many of a region as fit into the worker's share of the memory. On a CPU
    it changes no bit of an image; a GPU may round differently."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the network; the sampler computes in fp32."""
    num_workers: int | None = None
    """Ray workers; null: one a GPU, or one a core, of this machine or of the cluster at ray_address."""
    threads_per_worker: int = 1
    ray_address: Annotated[str | None, tyro.conf.arg(aliases=["--ray-address"])] = field(
        default=None, metadata=FROM_A_PERSON
    )
    """A Ray cluster to work on: host:port, or auto on one of its machines. All of them must see run and data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def problems(self) -> list[Problem]:
        """What is out of range."""
        found = []

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                found.append(Problem("config", f"sample.{name}", str(getattr(self, name)), remedy))

        for name in ("num", "samples_per_mask", "region_size", "num_workers", "threads_per_worker"):
            check(name, getattr(self, name) is None or getattr(self, name) >= 1, "give at least 1")
        check("diverse_masks", self.diverse_masks is None or self.diverse_masks >= 0, "give at least 0")
        check("cross_modality_masks", self.cross_modality_masks >= 0, "give at least 0")
        check("batch_size", self.batch_size is None or self.batch_size >= LEAST_BATCH, f"give at least {LEAST_BATCH}")
        assert self.masks_axis in AXES
        if self.masks is None:
            check("label_map", self.label_map is None, "it says what the ids in `sample.masks` mean: give that too")
        else:
            check("masks", self.masks.is_dir(), "not a folder: give one of .nii.gz, .nii or .png files")
            remedy = "a mask in a folder has no modality of its own: give CT or MR"
            there = self.label_map is None or self.label_map.is_file()
            check("label_map", there, "no such file: give a YAML or JSON file, or leave it out")
            check("target_modality", self.target_modality in ("CT", "MR"), remedy)
        return found + self.sampler.problems()

    def of_the_job(self, objective: Objective) -> dict[str, Any]:
        """The values that the images of a net of this objective depend on."""
        unused = "masks_axis" if self.masks is None else "split"
        values = {name: value for name, value in asdict(self).items() if name not in (*_NOT_IN_THE_JOB, unused)}
        resolved, usual = self.sampler.resolved(objective), SamplerConfig()
        # The preset's values say it all; and a job that began before there was a setting goes on without it.
        left_out = {"preset", *(name for name in _LATER if getattr(resolved, name) == getattr(usual, name))}
        sampler = {name: value for name, value in asdict(resolved).items() if name not in left_out}
        if self.sampler.guidance_segmenter is not None:  # a worker may not start in this folder
            sampler["guidance_segmenter"] = str(Path(self.sampler.guidance_segmenter).resolve())
        return values | {"sampler": sampler}
