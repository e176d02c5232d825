"""The output of `segdiff export` and `segdiff volume`: the `export` and `volume` sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge

from data_shards.choices import Axis, Codec, Modality, Split, Store
from data_shards.ingest.itk_files import ENDINGS
from data_shards.ingest.prepare_config import has_a_group
from data_shards.problems import Problem
from data_shards.ranges import range_problems
from data_shards.settings import Result, ResultWhereSet

_IMAGES = ("nnunet", "nifti", "png", "dicom", "shards")
_MODELS = ("pipeline", "monai")
# The formats that use a setting; one that is not listed is used by all, or changes nothing in the others.
_FORMATS_OF = {
    **dict.fromkeys(("modality", "patient"), _IMAGES),
    "file_ending": ("nnunet", "nifti"),
    **dict.fromkeys(("split", "store", "codec"), ("shards",)),
    **dict.fromkeys(("weights", "precision", "segmenter", "about", "data_licence", "picture"), _MODELS),
}


@dataclass(frozen=True)
class ExportConfig:
    """How a run's samples, or its model, are exported."""

    format: Annotated[
        Result[Literal["nnunet", "nifti", "png", "dicom", "shards", "pipeline", "monai"]],
        tyro.conf.arg(aliases=["--format"]),
    ] = "nnunet"
    """nnunet: a raw data set of nnU-Net v2. nifti, png: pairs of files. dicom: a series for each image, and a SEG
    of its mask (extra `dicom`). shards: a set that `segdiff train` reads. pipeline, monai: the model itself, as a
    diffusers folder or a MONAI bundle."""
    samples: Result[Path | None] = None
    """The folder of the images. null: RUN/samples."""
    modality: Annotated[Result[Modality | None], tyro.conf.arg(aliases=["--modality"])] = None
    """The modality of the images that are written. null: all. An nnU-Net data set has one."""
    file_ending: Result[Literal[".nii.gz", ".png", ".mha", ".nrrd"]] = ".nii.gz"
    """nnunet and nifti: the kind of files. PNG (nnunet alone) holds neither spacing nor stored values; MetaImage and
    NRRD need the extra `formats`."""
    patient: ResultWhereSet[str | None] = None
    """For samples whose masks are of a folder: a pattern for names of masks whose first group is the patient, as
    `(p[0-9]+)_`. With merge_with it is for names of real cases, too. A fold has a patient in one part only. null: as a
    table beside the masks names them, else each mask is of a patient of its own."""
    merge_with: Annotated[Result[Path | None], tyro.conf.arg(aliases=["--merge-with"])] = None
    """nnunet: a raw data set of nnU-Net with real cases, which are put beside the synthetic ones. Only real cases are
    validated on."""
    body_label: Result[bool] = False
    """nnunet: keep the class `body`, for nnU-Net to learn. Otherwise it becomes background, as in experts' masks."""
    split: Result[Split | None] = None
    """shards: the split that they go into. null: their mask's own, so that no patient's anatomy is in two splits."""
    store: Result[Store] = "webdataset"
    """shards: webdataset or zarr."""
    codec: Result[Codec] = "raw"
    """shards: how the tars store images."""
    weights: Result[str] = "ema"
    """pipeline, monai: the folder under RUN/weights. ema is the first of train.ema_lengths."""
    precision: ResultWhereSet[Literal["fp32", "bf16"]] = "fp32"
    """pipeline, monai: of the stored weights. bf16 halves the files, and rounds the weights to 8 bits."""
    segmenter: ResultWhereSet[bool] = False
    """pipeline, monai: add RUN/segmenter/weights, the auxiliary segmenter."""
    about: ResultWhereSet[Path | None] = None
    """pipeline, monai: a Markdown file that the model card begins with: what the model is for, what was measured."""
    data_licence: ResultWhereSet[str | None] = None
    """pipeline, monai: the licence of the training data, as the model card is to say it."""
    picture: ResultWhereSet[bool] = True
    """pipeline, monai: gallery.png, with masks and images of RUN/samples. Off, if their masks may not be shown."""

    @property
    def is_model(self) -> bool:
        """Whether the model is exported, not images."""
        return self.format in _MODELS

    @property
    def without_effect(self) -> list[str]:
        """Settings that differ from their defaults, and that the format does not use."""
        changed = (name for name in _FORMATS_OF if getattr(self, name) != getattr(ExportConfig, name))
        return [f"export.{name}" for name in changed if self.format not in _FORMATS_OF[name]]

    @property
    def writes_values(self) -> bool:
        """Whether files hold the meaning of grey values, which is HU for CT."""
        return self.format in ("nifti", "dicom", "shards") or (self.format == "nnunet" and self.file_ending != ".png")

    @property
    def pair_ending(self) -> str:
        """The ending of pairs of files."""
        return ".png" if self.format == "png" else self.file_ending

    @property
    def needs_simpleitk(self) -> bool:
        """Whether SimpleITK writes its files."""
        return self.format in ("nnunet", "nifti") and self.file_ending in ENDINGS

    def problems(self) -> list[Problem]:
        """What is out of range."""
        problems = range_problems(self, "config", "export.")
        if self.patient is not None and not has_a_group(self.patient):
            problems.append(
                Problem("config", "export.patient", self.patient, "give a regular expression with one group")
            )
        if self.format == "nifti" and self.file_ending == ".png":
            problems.append(Problem("config", "export.file_ending", ".png with --format nifti", "give --format png"))
        if self.merge_with is not None and self.format != "nnunet":
            problems.append(
                Problem("config", "export.merge_with", f"with --format {self.format}", "give --format nnunet")
            )
        if self.about is not None and not self.about.is_file():
            problems.append(Problem("config", "export.about", str(self.about), "no such file: give a Markdown file"))
        return problems


@dataclass(frozen=True)
class VolumeConfig:
    """A whole volume from a mask volume. Model, sampler and seed are those of the `sample` section."""

    modality: Annotated[Result[Modality], tyro.conf.arg(aliases=["--modality"])] = "CT"
    """The modality to make. CT is written in HU, MR in grey values from 0 to 255; others as the set has them."""
    axis: Annotated[Result[Axis], tyro.conf.arg(aliases=["--axis"])] = "axial"
    """The axis along which slices are made."""
    noise: Result[Literal["shared", "independent"]] = "shared"
    """shared: one noise field for all slices, so that neighbours with similar masks look similar. independent: one for
    each slice."""
    body_image: Result[Path | None] = None
    """For masks that hold organs only: an image of `modality` on the mask's voxels. The patient's outline (class
    `body`) is found in it, as `prepare` finds it. null: the mask is used as it is."""
    probe_slices: Result[Literal[0] | Annotated[int, Ge(2)]] = 8
    """How many neighbouring slices are also made with the other noise, to measure the effect of sharing. 0: none."""
    format: Annotated[Result[Literal["auto", "nnunet"]], tyro.conf.arg(aliases=["--format"])] = "auto"
    """auto: a volume, in the format of OUT's ending. nnunet: OUT is a raw data set of nnU-Net v2, with a 3-D case for
    each mask; MASK, and body_image too, may be folders."""
    file_ending: Result[Literal[".nii.gz", ".mha", ".nrrd"]] = ".nii.gz"
    """nnunet: the kind of files."""
    merge_with: Annotated[Result[Path | None], tyro.conf.arg(aliases=["--merge-with"])] = None
    """nnunet: a raw data set with real cases, which are put beside the synthetic ones. Only real cases are validated
    on."""
    body_label: Result[bool] = False
    """nnunet: keep the class `body`, for nnU-Net to learn."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        problems = range_problems(self, "config", "volume.")
        if self.merge_with is not None and self.format != "nnunet":
            problems.append(Problem("config", "volume.merge_with", "without a data set", "give --format nnunet"))
        return problems
