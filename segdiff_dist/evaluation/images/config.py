"""The settings of `segdiff evaluate --images` for images that another system made. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from annotated_types import Interval

from data_shards.choices import Axis, Modality
from data_shards.problems import Problem
from data_shards.ranges import RISING, range_problems
from data_shards.settings import RecordedOtherwise, Result


@dataclass(frozen=True)
class ImagesConfig:
    """Images that another system made, and their masks."""

    folder: Annotated[RecordedOtherwise[Path | None], tyro.conf.arg(aliases=["--images"])] = None
    """A folder of images that another system made: PNG of 8 or 16 bits, NIfTI of one slice or of a volume, DICOM
    (.dcm) of one slice. Everything is written to --out."""
    masks: Annotated[RecordedOtherwise[Path | None], tyro.conf.arg(aliases=["--masks"])] = None
    """The folder of their masks: PNG or NIfTI files that have the images' names."""
    modality: Annotated[Result[Modality | None], tyro.conf.arg(aliases=["--modality"])] = None
    """What the images show: CT, MR or another name."""
    axis: Result[Axis] = "axial"
    """The axis of the slices, and the axis along which volumes are cut. A NIfTI file of one slice has its own."""
    label_map: RecordedOtherwise[Path | None] = None
    """A YAML or JSON file that says what the ids in the masks mean: `id: name or id of the segmenter's label table`.
    null: they are the segmenter's own."""
    value_range: Result[Annotated[tuple[float, float], RISING] | None] = None
    """The values of NIfTI and DICOM images that become black and white. null: the HU window of --real, or of
    `segdiff prepare`; MR needs it. PNG files have the whole range of their type."""
    size: Result[Annotated[int, Interval(ge=16, le=2048)] | None] = None
    """Resample images to this side, in pixels: means of pixels if images become smaller, else linear; masks by the
    nearest pixel. null: images are taken as they are, and volumes are cut at the size of --real's slices, or 256."""

    def __bool__(self) -> bool:
        """Whether there are such images."""
        return self.folder is not None

    def problems(self) -> list[Problem]:
        """Values that are out of range, missing, or do not go together."""
        problems = range_problems(self, "config", "images.")

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                problems.append(
                    Problem("command line", f"--{name.replace('_', '-')}", str(getattr(self, name)), remedy)
                )

        if not self:
            given = [name for name in ("masks", "modality", "label_map", "value_range", "size") if getattr(self, name)]
            remedy = "it is of images of a folder: name that by --images FOLDER"
            return problems + [Problem("command line", f"images.{n}", str(getattr(self, n)), remedy) for n in given]
        assert self.folder is not None
        if not self.folder.is_dir():
            problems.append(Problem("command line", "--images", str(self.folder), "no such folder: give one of images"))
        check("masks", self.masks is not None and self.masks.is_dir(), "give the folder of the images' masks")
        check("modality", self.modality is not None, "no file says it for sure: give CT, MR or another name")
        if self.label_map is not None and not self.label_map.is_file():
            problems.append(Problem("command line", "--images.label-map", str(self.label_map), "no such file"))
        return problems

    def recorded(self) -> dict[str, Any]:
        """The settings that the stored images depend on, besides the files."""
        window = None if self.value_range is None else list(self.value_range)
        return {"modality": self.modality, "axis": self.axis, "value_range": window, "size": self.size}
