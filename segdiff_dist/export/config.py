"""What `segdiff export` and `segdiff volume` are to write: the `export` and `volume` sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_shards.problems import Problem
from data_shards.settings import Result
from data_shards.store.codecs import CODECS
from data_shards.store.set_index import STORES


@dataclass(frozen=True)
class ExportConfig:
    """How a run's samples, or its model, are exported."""

    format: Annotated[
        Result[Literal["nnunet", "nifti", "png", "shards", "pipeline"]], tyro.conf.arg(aliases=["--format"])
    ] = "nnunet"
    """nnunet: a raw data set of nnU-Net v2. nifti, png: pairs of files. shards: a set that `segdiff train` reads.
    pipeline: the model itself, as a diffusers folder."""
    samples: Result[Path | None] = None
    """The folder of the images; null: RUN/samples."""
    modality: Annotated[Result[Literal["CT", "MR"] | None], tyro.conf.arg(aliases=["--modality"])] = None
    """Of the images that are written; null: all. An nnU-Net data set has one."""
    file_ending: Result[Literal[".nii.gz", ".png"]] = ".nii.gz"
    """Of nnU-Net's files: NIfTI with spacing and stored values, or PNG, which has neither."""
    body_label: Result[bool] = False
    """nnunet: keep the class `body`, for nnU-Net to learn; otherwise it is background, as where experts drew organs."""
    split: Result[Literal["train", "val", "test"] | None] = None
    """shards: the split they go into; null: their mask's own, so that no patient's anatomy crosses splits."""
    store: Result[str] = "webdataset"
    """shards: webdataset or zarr."""
    codec: Result[str] = "raw"
    """shards: of the tars."""
    weights: Result[str] = "ema"
    """pipeline: the folder under RUN/weights; ema is the first of train.ema_lengths."""

    @property
    def writes_values(self) -> bool:
        """Whether files say what grey values mean, HU of CT."""
        return self.format in ("nifti", "shards") or (self.format == "nnunet" and self.file_ending == ".nii.gz")

    def problems(self) -> list[Problem]:
        """What is out of range."""
        checks = (("store", STORES), ("codec", CODECS))
        return [
            Problem("config", f"export.{name}", repr(getattr(self, name)), f"use one of {', '.join(choices)}")
            for name, choices in checks
            if getattr(self, name) not in choices
        ]


@dataclass(frozen=True)
class VolumeConfig:
    """A whole volume from a mask volume. Model, sampler and seed are those of the `sample` section."""

    modality: Annotated[Result[Literal["CT", "MR"]], tyro.conf.arg(aliases=["--modality"])] = "CT"
    """CT comes out in HU, MR in grey values from 0 to 255."""
    axis: Annotated[Result[Literal["axial", "coronal", "sagittal"]], tyro.conf.arg(aliases=["--axis"])] = "axial"
    """The axis along which slices are made."""
    noise: Result[Literal["shared", "independent"]] = "shared"
    """shared: one noise field for all slices, so that neighbours with like masks look alike."""
    body_image: Result[Path | None] = None
    """An image of `modality` on the mask's voxels, in which the patient's outline is found (class `body`) as `prepare`
    finds it, for masks that hold organs alone. null: the mask says it all."""
    probe_slices: Result[int] = 8
    """How many neighbouring slices are also made with the other noise, to say what sharing does; 0 leaves that out."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        if self.probe_slices == 0 or self.probe_slices >= 2:
            return []
        return [Problem("config", "volume.probe_slices", str(self.probe_slices), "give 0, or at least 2")]
