"""The stages that the campaign kills: their commands, in the order the data goes, and the smallest configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_LABELS = "sleep 0.2; cp {work}/amos_root/labels*/{case_id}.nii.gz {mask} # {image}"


@dataclass(frozen=True)
class StageRun:
    """A command on the folder of the campaign, after those before it. `{work}` in a flag is that folder,
    `{ray}` an address."""

    name: str
    flags: tuple[str, ...] = ()
    variant: str = ""
    has_config: bool = True
    is_killed: bool = True
    """False: it makes what the next one reads, and depends on the machine's speed."""

    @property
    def title(self) -> str:
        """As in the tables."""
        return f"{self.name} {self.variant}".rstrip()

    @property
    def folder(self) -> str:
        """As part of a file's name."""
        return self.title.replace(" ", "-")

    @property
    def is_on_ray(self) -> bool:
        """Whether it starts a Ray, or uses a cluster."""
        return "{ray}" in self.flags

    def arguments(self, work: Path, ray: str = "local") -> list[str]:
        """Of the `segdiff` command. `ray`: the address of a stage on Ray."""
        config = ["--config", str(work / "config.yaml")] if self.has_config else []
        flags = (flag.replace("{work}", str(work)).replace("{ray}", ray) for flag in self.flags)
        return [self.name, *flags, *config, "--quiet"]


STAGES = (
    StageRun("phantom"),
    StageRun(
        "annotate",
        ("{work}/amos_root", "{work}/wholebody", "--annotate.tool", "command")
        + ("--annotate.command", f"sh -c '{_LABELS}'", "--annotate.num-workers", "2"),
    ),
    StageRun("prepare"),
    StageRun("prepare", ("{work}/amos_root", "{work}/data-ray", "--prepare.ray-address", "{ray}"), "on Ray"),
    StageRun("convert", ("{work}/data", "{work}/zarr", "--convert.store", "zarr"), has_config=False),
    StageRun("train-segmenter"),
    StageRun("train-autoencoder"),
    StageRun("train"),
    StageRun("average", ("--average.length", "0.2")),
    StageRun("sample"),
    StageRun("sample", ("--sample.ray-address", "{ray}", "--out", "{work}/images-ray"), "on Ray"),
    StageRun("evaluate"),
    StageRun("evaluate", ("--evaluate.ray-address", "{ray}"), "on Ray"),
    StageRun("export", ("{work}/exported", "--format", "png")),
    StageRun("export", ("{work}/pipeline", "--format", "pipeline"), "pipeline"),
    StageRun(
        "volume",
        ("{work}/amos_root/labelsTs/amos_0003.nii.gz", "{work}/volume.nii.gz", "--modality", "CT")
        + ("--volume.probe-slices", "0"),
    ),
    StageRun("report", ("{work}/run", "--format", "html,csv,latex"), has_config=False),
    StageRun("distil", ("--distil.teacher", "{work}/run", "--run", "{work}/student")),
    StageRun("plan", ("{work}/amos_root", "--out", "{work}/own", "--recipe", "smoke"), is_killed=False),
    StageRun("run", ("--out", "{work}/own"), has_config=False),
)


def config_of(work: Path) -> dict[str, Any]:
    """The smoke configuration, still smaller, for all stages."""
    from segdiff_dist.shipped import find_config

    config: dict[str, Any] = yaml.safe_load(Path(find_config("smoke")).read_text())
    config |= {name: str(work / name) for name in ("amos_root", "data", "run")}
    config["train"] |= {"num_images": 32, "checkpoint_every_images": 8, "snapshot_every_images": 8}
    config["validation"] |= {"num_images": 4, "num_pictures": 1, "num_steps": 2}
    config["segmenter"]["train"] |= {"num_images": 64, "checkpoint_every_images": 16}
    config["distil"]["train"] |= {"checkpoint_every_images": 8}
    config["autoencoder"]["train"] |= {"num_images": 32, "checkpoint_every_images": 8}
    config["prepare"] |= {"num_workers": 2}
    config["sample"] |= {"num": 4, "num_workers": 1, "region_size": 2}
    config["evaluate"] |= {"num_workers": 1, "bootstrap_samples": 50}
    config["tracking"] = {"enabled": False}
    return config


def environment() -> dict[str, str]:
    """Of every command."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
