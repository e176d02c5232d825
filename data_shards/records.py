"""Data that stages pass on: a slice for a shard, and a batch for the network.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from data_shards.choices import Axis, Split
from data_shards.modalities import MODALITIES as MODALITIES  # where others look for it
from data_shards.modalities import MODALITY_RULE, is_modality
from data_shards.problems import Problem, refuse

if TYPE_CHECKING:
    import torch

AXES = get_args(Axis)
SPLITS = get_args(Split)
# Sources of a mask: none (only body), the archive's experts, a whole-body tool, or the experts' organs over the tool's.
MASK_SOURCES = ("none", "expert", "wholebody", "merged")
# How a note on a volume begins if it is on its label.
LABEL_NOTE = "its label: "
# A case id becomes a part of names of files and of members of tars. A tar's header holds 100 bytes of a name, and the
# longest that is added to an id is `-sagittal-0000.image.npy.zst`.
LONGEST_CASE_ID = 72
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
CASE_ID_RULE = f"letters, digits, _, - and, not at the front, dots; {LONGEST_CASE_ID} characters at most"


def is_case_id(value: object) -> bool:
    """Whether `value` is a name and not a path: ASCII letters, digits, `.`, `_` and `-`, no dot at the front, at most
    LONGEST_CASE_ID characters. This is the only rule for case ids; it is checked for every input."""
    return isinstance(value, str) and len(value) <= LONGEST_CASE_ID and _NAME.fullmatch(value) is not None


def case_id_problems(where: object, ids: Iterable[object], remedy: str = "do not use this file") -> list[Problem]:
    """One problem for all of `ids` that are not case ids, or an empty list."""
    wrong = [value for value in ids if not is_case_id(value)]
    if not wrong:
        return []
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return [Problem(str(where), "case id", f"{repr(wrong[0])[:100]}{more}", f"an id has {CASE_ID_RULE}: {remedy}")]


def is_path_inside(value: object) -> bool:
    """Whether `value` is a relative path of plain names, so that it cannot lead out of its folder.

    Each part has the characters of a case id: no `..`, no hidden file, no drive, no URL.
    """
    if not isinstance(value, str) or not value or value.startswith("/"):
        return False
    return all(_NAME.fullmatch(part) for part in PurePosixPath(value).parts) and value == str(PurePosixPath(value))


@dataclass(frozen=True)
class SliceMeta:
    """The metadata of a slice.

    `affine` is 4x4, row-major, in mm: it takes (row, column, 0, 1) of the stored slice to RAS world coordinates.
    `intensity_scale`, `intensity_offset`: value = grey * scale + offset, in HU for CT, so that HU can be restored
    inside the window; a grey value has 8 or 16 `bits`. `mask_source` is one of MASK_SOURCES; `labelled` is False if it
    is none: then the mask has only body.
    """

    case_id: str
    modality: str
    axis: str
    slice_index: int
    split: str
    spacing_mm: tuple[float, float]
    affine: tuple[float, ...]
    intensity_scale: float
    intensity_offset: float
    label_set: str
    labels_present: tuple[int, ...]
    labelled: bool
    source_sha256: str
    mask_source: str = "expert"
    bits: int = 8

    def __post_init__(self) -> None:
        # All writers of tars, arrays and files use this meta, so none of their names leads out of a folder.
        problems = case_id_problems("slice", [self.case_id], "rename the case")
        if not is_modality(self.modality):
            problems.append(
                Problem(f"slice of {self.case_id!r}", "modality", repr(self.modality)[:60], f"use {MODALITY_RULE}")
            )
        for name, words in (("axis", AXES), ("split", SPLITS)):
            if (value := getattr(self, name)) not in words:
                problems.append(
                    Problem(f"slice of {self.case_id!r}", name, repr(value), f"use one of {', '.join(words)}")
                )
        refuse(problems)

    @property
    def key(self) -> str:
        """The sample's name in its shard, unique in a shard set. In a tar it has no dot, since WebDataset splits at
        dots."""
        return f"{self.case_id}-{self.axis}-{self.slice_index:04d}"

    def to_json(self) -> dict[str, Any]:
        """A dictionary that json can write; tuples are read back as lists."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SliceMeta:
        """The inverse of to_json."""
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


@dataclass(frozen=True)
class SliceRecord:
    """One slice and its meta: image_HW grey values, uint8 or uint16 (meta.bits); mask_HW uint8 label ids.

    edge_2HW, if soft edges are kept: uint8, [0] the id of each pixel's second largest class, [1] the share of mask_HW's
    class in the pixel; 255 is the whole pixel.
    """

    image_HW: np.ndarray
    mask_HW: np.ndarray
    meta: SliceMeta
    edge_2HW: np.ndarray | None = None

    def image_uint8(self) -> np.ndarray:
        """uint8 [H, W] for any depth: 16-bit grey values are divided by 257 and rounded."""
        if self.image_HW.dtype == np.uint8:
            return self.image_HW
        return ((self.image_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)

    def cropped(self, size: int) -> SliceRecord:
        """The central size x size pixels, as the loader's centre crop gives them. Meta is that of the whole slice."""
        top, left = ((side - size) // 2 for side in self.image_HW.shape)
        window = (slice(top, top + size), slice(left, left + size))
        edge_2HW = None if self.edge_2HW is None else self.edge_2HW[:, *window]
        return SliceRecord(self.image_HW[window], self.mask_HW[window], self.meta, edge_2HW)


@dataclass(frozen=True)
class Batch:
    """The loader's output, on the device: image_BHW uint8 (uint16 from a 16-bit set) and mask_BHW uint8; modality_B,
    axis_B int64 indices into the set's modalities and AXES; position_B int64 global positions of the run (see
    feed.order); edge_B2HW uint8, as in SliceRecord, if the set keeps soft edges; extra_BX the
    samples' rows of the loader's further array, if it was given one; augmentation_BA float32, what the loader's
    augmentation did to each slice (feed.augment), if it is on."""

    image_BHW: torch.Tensor
    mask_BHW: torch.Tensor
    modality_B: torch.Tensor
    axis_B: torch.Tensor
    position_B: torch.Tensor
    edge_B2HW: torch.Tensor | None = None
    extra_BX: torch.Tensor | None = None
    augmentation_BA: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.position_B.shape[0])
