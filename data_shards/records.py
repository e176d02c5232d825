"""What passes between the stages: a slice on its way to a shard, a batch on its way to the network.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MODALITIES = ("CT", "MR")
AXES = ("axial", "coronal", "sagittal")
SPLITS = ("train", "val", "test")
# Who drew a mask: nobody (body alone), the archive's experts, a whole-body tool, or the one laid over the other.
MASK_SOURCES = ("none", "expert", "wholebody", "merged")


@dataclass(frozen=True)
class SliceMeta:
    """Everything known of a slice besides its pixels.

    `affine` is 4x4, row-major, in mm: it takes (row, column, 0, 1) of the stored slice to RAS world coordinates.
    `intensity_scale`, `intensity_offset`: value = grey * scale + offset, in HU for CT, so that HU can be restored
    inside the window; a grey value has 8 or 16 `bits`. `mask_source` is one of MASK_SOURCES; `labelled` is False where
    it is none: the mask is then body alone.
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

    @property
    def key(self) -> str:
        """The sample's name in its shard, unique in a shard set; holds no dot, which WebDataset splits at."""
        return f"{self.case_id}-{self.axis}-{self.slice_index:04d}"

    def to_json(self) -> dict[str, Any]:
        """A dictionary that json can write; its tuples come back from there as lists."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SliceMeta:
        """The inverse of to_json."""
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


@dataclass(frozen=True)
class SliceRecord:
    """One slice and its meta: image_HW grey values, uint8 or uint16 (meta.bits); mask_HW uint8 label ids.

    edge_2HW, where soft edges are kept: uint8, [0] the id of each pixel's second largest class, [1] the share of the
    pixel that mask_HW's class has, 255 being all of it.
    """

    image_HW: np.ndarray
    mask_HW: np.ndarray
    meta: SliceMeta
    edge_2HW: np.ndarray | None = None

    def image_uint8(self) -> np.ndarray:
        """uint8 [H, W] whatever the depth: 16-bit grey values are divided by 257 and rounded."""
        if self.image_HW.dtype == np.uint8:
            return self.image_HW
        return ((self.image_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)

    def cropped(self, size: int) -> SliceRecord:
        """The central size x size pixels, as the loader's centre crop gives them. Meta still tells of the whole."""
        top, left = ((side - size) // 2 for side in self.image_HW.shape)
        window = (slice(top, top + size), slice(left, left + size))
        edge_2HW = None if self.edge_2HW is None else self.edge_2HW[:, *window]
        return SliceRecord(self.image_HW[window], self.mask_HW[window], self.meta, edge_2HW)


@dataclass(frozen=True)
class Batch:
    """What the loader yields, on the device: image_BHW uint8 (uint16 from a 16-bit set) and mask_BHW uint8; modality_B,
    axis_B int64 indices into MODALITIES and AXES; position_B int64 global positions of the run (see feed.order);
    edge_B2HW uint8, as in SliceRecord, where the set keeps soft edges."""

    image_BHW: torch.Tensor
    mask_BHW: torch.Tensor
    modality_B: torch.Tensor
    axis_B: torch.Tensor
    position_B: torch.Tensor
    edge_B2HW: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.position_B.shape[0])
