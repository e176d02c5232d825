"""The `sample` section: what `segdiff sample` makes, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge

from data_shards.choices import Axis, Modality, Split
from data_shards.field_source import FROM_A_PERSON
from data_shards.problems import Problem
from data_shards.ranges import Count, Seed, WholeNumber, is_allowed, range_problems, requirement
from data_shards.settings import Execution, RecordedOtherwise, Result, identity
from data_shards.workers import LEAST_BYTES_WITH_TORCH, WorkersConfig
from segdiff_dist.config.choices import Device, Switch
from segdiff_dist.denoising.config import Objective
from segdiff_dist.denoising.sampler_config import SamplerConfig

# Below this size a CPU computes fp32 products in another way and rounds differently, so smaller batches are filled up.
LEAST_BATCH = 4


@dataclass(frozen=True)
class SampleConfig:
    """The images to make, and how."""

    split: Annotated[Result[Split], tyro.conf.arg(aliases=["--split"])] = "test"
    """The split whose masks are used."""
    masks: Annotated[RecordedOtherwise[Path | None], tyro.conf.arg(aliases=["--masks"])] = None
    """A folder of masks to use in place of a split: NIfTI volumes, which are cut as the shard set was, or PNG slices of
    its size. target_modality then is a name."""
    masks_axis: Result[Axis] = "axial"
    """The axis along which NIfTI masks are cut, and the axis of PNG masks. A NIfTI file of one slice has its own."""
    label_map: RecordedOtherwise[Path | None] = None
    """A YAML or JSON file that says what the ids in `masks` mean: `id: name or id of the model's label table`. null:
    they are the model's own."""
    num: Annotated[Result[Count | None], tyro.conf.arg(aliases=["--num"])] = 1024
    """Masks drawn from the source, from all patients and places. null takes all of them."""
    samples_per_mask: Result[Count] = 1
    """Images made for each mask, with another seed each. If sample.diverse_masks is set, for that many masks; the
    others get 1."""
    diverse_masks: Result[WholeNumber | None] = None
    """How many masks get samples_per_mask images: the modalities' first masks in turn. null: every mask."""
    target_modality: Result[Literal["same", "other"] | Modality] = "same"
    """The modality to make. same: that of the mask's slice. other: the model's other ones, in turn. Or one by name, as
    CT or MR."""
    without_organs: Result[tuple[str, ...]] = ()
    """Organs to leave out of every mask, by name. A model trained with diffusion.organ_dropout knows such masks."""
    cross_modality_masks: Result[WholeNumber] = 0
    """How many masks also get images in another modality: the modalities' first masks in turn."""
    seed: Result[int] = 0
    """Seed of the noise, and of the masks that are drawn: 0 or more."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    weights: Result[str] = "ema"
    """The folder under RUN/weights that is used: ema_LENGTH, or online, the weights without EMA. ema is the first of
    train.ema_lengths."""
    out: Annotated[Execution[Path | None], tyro.conf.arg(aliases=["--out"])] = field(
        default=None, metadata=FROM_A_PERSON
    )
    """The folder of the images. null: RUN/samples, which `segdiff evaluate` reads."""
    region_size: Execution[Count] = 16
    """Images written as one Zarr region, by one worker."""
    batch_size: Execution[Annotated[int, Ge(LEAST_BATCH)] | None] = None
    """Images made at once. null: as many of a region as fit into the worker's share of the memory. On a CPU it changes
    no bit of an image. A GPU may round differently."""
    cuda_graph: Execution[Switch] = "auto"
    """Record the network's pass as a CUDA graph, once for each batch size, and replay it: faster where batches are
    small. auto: on a GPU, if replaying gives the same bits. on: refused if there is no GPU. docs/sampling.md."""
    precision: Result[Literal["auto", "bf16", "fp32"]] = "auto"
    """Precision of the network. auto: bf16 where the device has arithmetic for it, fp32 elsewhere. A job keeps the
    precision that it began with. The sampler computes in fp32."""
    num_workers: Execution[Count | None] = None
    """Worker processes. null: one for each GPU, or for each core, of this machine or of the cluster at ray_address."""
    threads_per_worker: Result[Count] = 1
    """CPU threads of each worker. Another number may round differently."""
    ray_address: Annotated[Execution[str | None], tyro.conf.arg(aliases=["--ray-address"])] = field(
        default=None, metadata=FROM_A_PERSON
    )
    """A Ray cluster to work on: host:port, or auto on one of its machines. All of them must see run and data.
    local: Ray on this machine. null: Ray on this machine, but for small jobs plain processes."""
    device: Execution[Device] = "auto"
    """auto: the GPU if there is one. A job keeps the kind of device that it was begun on."""

    @property
    def workers(self) -> WorkersConfig:
        """The workers that make the images."""
        threads, address = self.threads_per_worker, self.ray_address
        return WorkersConfig(
            "sample", self.num_workers, threads, self.device, address, least_bytes=LEAST_BYTES_WITH_TORCH
        )

    def problems(self) -> list[Problem]:
        """Values that are out of range or missing, and settings that do not go together."""
        problems = range_problems(self, "config", "sample.")

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                problems.append(Problem("config", f"sample.{name}", str(getattr(self, name)), remedy))

        if self.masks is None:
            check("label_map", self.label_map is None, "it says what the ids in `sample.masks` mean: give that too")
        else:
            check("masks", self.masks.is_dir(), "not a folder: give one of .nii.gz, .nii or .png files")
            remedy = "a mask in a folder has no modality of its own: give CT, MR or another name that the model knows"
            there = self.label_map is None or self.label_map.is_file()
            check("label_map", there, "no such file: give a YAML or JSON file, or leave it out")
            check("target_modality", self.target_modality not in ("same", "other"), remedy)
        return problems + self.sampler.problems()

    def seed_problems(self) -> list[Problem]:
        """Problems of the seed of new images."""
        if is_allowed(self.seed, Seed):
            return []
        return [Problem("config", "sample.seed", str(self.seed), f"give {requirement(Seed)}")]

    def result_settings(self, objective: Objective) -> dict[str, Any]:
        """The settings that the images of a net of this objective depend on, as job.json holds them."""
        settings = identity(self)
        del settings["masks_axis" if self.masks is None else "split"]
        # The preset's values are recorded, not its name.
        settings["sampler"] = identity(self.sampler.resolved(objective))
        if self.sampler.guidance_segmenter is not None:  # a worker may not start in this folder
            settings["sampler"]["guidance_segmenter"] = str(Path(self.sampler.guidance_segmenter).resolve())
        return settings
