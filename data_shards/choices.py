"""The choices of settings, each named once: other modules derive their constants from these."""

from __future__ import annotations

from typing import Annotated, Literal

from data_shards.modalities import is_modality
from data_shards.ranges import Rule

# Any plain name: those of a set are in its index.
Modality = Annotated[str, Rule(is_modality, "letters, digits and -")]
Axis = Literal["axial", "coronal", "sagittal"]
Split = Literal["train", "val", "test"]
LabelSet = Literal["amos", "wholebody", "merged"]
Layout = Literal["auto", "amos", "nnunet", "msd", "folder", "totalsegmentator", "dicom", "pictures"]
Fit = Literal["auto", "crop", "pad"]
# nearest: the nearest voxel's id. soft: every class resampled like an image, the largest share decides. bilinear_ids:
# id numbers resampled like grey values and rounded, as in the paper's code; creates false classes at borders.
MaskResize = Literal["nearest", "soft", "bilinear_ids"]
# window: CT by the window alone. paper: CT also by percentiles after the window, as in the paper's code, so that one
# grey value means another HU in each volume (HU can still be restored from the slice's own mapping).
Intensity = Literal["window", "paper"]
Store = Literal["webdataset", "zarr"]
Codec = Literal["raw", "zstd", "png", "jpeg2000"]
