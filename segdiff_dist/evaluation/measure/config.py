"""The `evaluate` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Interval

from data_shards.choices import Split
from data_shards.field_source import ADDRESS_FROM_A_PERSON, CODE_FROM_A_PERSON, FROM_A_PERSON
from data_shards.ingest.prepare_config import has_a_group
from data_shards.problems import Problem
from data_shards.ranges import Count, Share, range_problems
from data_shards.settings import Execution, RecordedOtherwise, Result, ResultWhereSet
from data_shards.workers import LEAST_BYTES_WITH_TORCH, WorkersConfig
from segdiff_dist.config.choices import Device
from segdiff_dist.evaluation.metrics import given_network, imagenet, inception, perceptual, radiomics
from segdiff_dist.evaluation.metrics.distances import FEWEST_FOR_DISTANCES

# More workers than this wait for each other's memory bandwidth and hold a segmenter each.
_MOST_DEFAULT_WORKERS = 16


@dataclass(frozen=True)
class EvaluateConfig:
    """What `segdiff evaluate` measures, and on which devices."""

    segmenter: RecordedOtherwise[Path | None] = field(default=None, metadata=CODE_FROM_A_PERSON)
    """Exported weights of the auxiliary segmenter. null: RUN/segmenter/weights. An independent segmenter may also be a
    TorchScript file (FILE.pt, described by FILE.yaml: docs/metrics.md) or the folder of a MONAI bundle. Loading these
    runs the code in them: name only files that you trust. `totalsegmentator`, or a file TOOL.yaml that describes a
    command, labels samples that make whole volumes."""
    real: Annotated[RecordedOtherwise[str | None], tyro.conf.arg(aliases=["--real"])] = field(
        default=None, metadata=ADDRESS_FROM_A_PERSON
    )
    """A shard set of real images, for samples whose masks are of a folder and for --images: distances, sharpness and
    copies need it. Samples of a shard set are compared with that set."""
    real_split: ResultWhereSet[Split] = "test"
    """The split of `real` whose labelled slices are compared; at most distribution_images of them."""
    spacing_mm: ResultWhereSet[Annotated[float, Interval(ge=0.01, le=50)] | None] = None
    """Side of a pixel in mm, for images whose files do not state it (PNG, samples of a mask folder). Surface Dice and
    areas in mm2 need it."""
    patient: ResultWhereSet[str | None] = None
    """For samples whose masks are of a folder and for --images: a pattern for case ids (paths of masks, / and . as _)
    whose first group is the patient, as `(p[0-9]+)_`. Intervals are over patients. null: as a table beside the masks
    names them, else each case is a patient."""
    fid_weights: Result[Literal["download"] | Path | None] = field(default=None, metadata=ADDRESS_FROM_A_PERSON)
    """torch-fidelity's Inception weights for `fid`: their file, or 'download' for torch-fidelity's own download."""
    imagenet: ResultWhereSet[bool] = False
    """Also measure distances, precision and recall on ImageNet features of efficientnet-lite0, which the extra
    `features` installs with its weights. This takes about as long again as the rest."""
    feature_network: ResultWhereSet[Path | None] = field(default=None, metadata=CODE_FROM_A_PERSON)
    """Also measure distances, precision and recall on the features of a network in a file: torchvision's or
    RadImageNet's ResNet-50 weights (.pth, .pt, .safetensors), or a TorchScript file (docs/metrics.md). Loading
    TorchScript runs the code in it: name only files that you trust."""
    lpips_weights: Result[Literal["download"] | Path | None] = field(default=None, metadata=ADDRESS_FROM_A_PERSON)
    """AlexNet's weights for `lpips`: torchvision's file, or 'download' for torchvision's own download."""
    frd_images: Result[Literal[0] | Annotated[int, Ge(FEWEST_FOR_DISTANCES)]] = 0
    """Real and generated images, each, whose radiomics features make `frd`. Each takes about a second. 0 leaves it
    out."""
    surface_dice: Result[bool] = True
    """Compute surface Dice for every organ in every pair of label maps."""
    distribution_images: Result[Annotated[int, Ge(FEWEST_FOR_DISTANCES)]] = 5000
    """Real and generated images of each group, each, whose features are kept for kernel distance, precision, recall,
    density and coverage. Frechet distances use all images."""
    memorisation: Result[bool] = False
    """Look for training images among the generated ones. This reads the train split; --dry-run says how long it
    takes."""
    memorisation_images: ResultWhereSet[Count] = 1000
    """Generated images, at most, that are compared with all training images, and as many real ones that training has
    not seen."""
    downstream: Annotated[Result[bool], tyro.conf.arg(aliases=["--downstream"])] = False
    """Also train segmenters on real, on generated and on both kinds of images, and test them on real ones, as the
    `downstream` section says. This takes hours."""
    most_memorised: Result[Share] = 0.05
    """The share of suspects above which a set of samples fails. `segdiff evaluate` then exits with 1."""
    batch_size: Execution[Count] = 16
    """Images a worker measures at once."""
    num_workers: Execution[Count | None] = None
    """Worker processes. null: one for each GPU, or for each core if there is no GPU."""
    device: Execution[Device] = "auto"
    """auto: the GPU if there is one."""
    bootstrap_samples: Result[Count] = 1000
    """Bootstrap samples over patients for a 95 % interval."""
    seed: Result[int] = 0
    """Seed of the bootstrap, and of random choices of images."""
    ray_address: Execution[str | None] = field(default=None, metadata=FROM_A_PERSON)
    """A Ray cluster to join, whose GPUs and cores count then. local: Ray on this machine. null: Ray on
    this machine, but for small jobs plain processes."""

    @property
    def workers(self) -> WorkersConfig:
        """How many workers there are, and where they run."""
        device, address = self.device, self.ray_address
        most, least_bytes = _MOST_DEFAULT_WORKERS, LEAST_BYTES_WITH_TORCH
        return WorkersConfig("evaluate", self.num_workers, 1, device, address, most, least_bytes)

    def problems(self) -> list[Problem]:
        """Settings out of range, and files or packages that are missing."""
        problems = range_problems(self, "config", "evaluate.")
        for name, missing in (
            ("fid_weights", inception.missing_for_fid),
            ("lpips_weights", perceptual.missing_for_lpips),
        ):
            weights = getattr(self, name)
            if isinstance(weights, Path) and not weights.is_file():
                problems.append(Problem("config", f"evaluate.{name}", f"{weights}: no such file", "give the file"))
            if weights is not None and (reason := missing(str(weights))):
                problems.append(Problem("config", f"evaluate.{name}", str(weights), reason))
        if self.feature_network is not None and not self.feature_network.is_file():
            remedy = f"give the file: {given_network.HOW_TO_GET}"
            problems.append(
                Problem("config", "evaluate.feature_network", f"{self.feature_network}: no such file", remedy)
            )
        if self.patient is not None and not has_a_group(self.patient):
            remedy = "give a regular expression with one group"
            problems.append(Problem("config", "evaluate.patient", self.patient, remedy))
        if self.imagenet and (reason := imagenet.missing_for_imagenet(self.imagenet)):
            problems.append(Problem("config", "evaluate.imagenet", "true", reason))
        if self.frd_images and (reason := radiomics.missing_for_frd(self.frd_images)):
            problems.append(Problem("config", "evaluate.frd_images", str(self.frd_images), reason))
        # Whether a cluster has GPUs is known after it was joined.
        if self.device == "cuda" and self.ray_address is None and not _num_gpus():
            problems.append(Problem("config", "evaluate.device", "cuda: no GPU found", "use auto or cpu"))
        return problems


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
