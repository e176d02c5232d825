"""An upload as a file that the readers of masks take. Its kind is found by its bytes; no name of a client is used.

Refused here is what a reader of local files may believe and a service must not: another file that a header names, and
forms that unpack without a bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from data_shards.ingest.png_files import kind_of
from data_shards.problems import problem
from data_shards.ray_session import scratch_folder

if TYPE_CHECKING:
    from segdiff_dist.painting.masks import MaskFile

# NIfTI-1 and NIfTI-2 in one file: the magic's place (nifti1.h, nifti2.h).
_NIFTI = ((344, b"n+1\0"), (4, b"n+2\0"))
_META_IMAGE = re.compile(rb"\A\s*(ObjectType|NDims|Comment)\s*=")
# The voxels follow the header only where it says LOCAL.
_ELSEWHERE = re.compile(rb"^\s*(ElementDataFile\s*=\s*(?!LOCAL\s*$)|data ?file:)", re.M | re.I)
_HEADER_BYTES = 2**20
# Explicit and implicit little endian, and run lengths: what a SEG is stored in. Deflated ones unpack without a bound.
_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5")
_KINDS = "send one PNG, NIfTI (.nii, .nii.gz), MetaImage (.mha), NRRD or DICOM SEG file"


@contextmanager
def stored(content: bytes) -> Iterator[Path]:
    """The upload as a file in a folder of its own, which is removed. Raises InputProblems."""
    ending = _ending(content)
    with TemporaryDirectory(prefix="segdiff-", dir=scratch_folder()) as folder:
        file = Path(folder) / f"mask{ending}"
        file.write_bytes(content)
        if ending == ".dcm":
            _check_syntax(file)
        yield file


def check_size(mask: MaskFile, most: int) -> None:
    """Raise InputProblems for more voxels than `most`; before they are unpacked."""
    num = int(np.prod(mask.shape, dtype=object))
    if num > most:
        shape = " x ".join(map(str, mask.shape))
        raise problem("mask", "size", f"{shape} is {num:,} voxels", f"at most {most:,} are taken here: resample it")


def _ending(content: bytes) -> str:
    if not content:
        raise problem("mask", "mask format", "empty", _KINDS)
    if any(content[at : at + len(magic)] == magic for at, magic in _NIFTI):
        return ".nii"
    if content[128:132] == b"DICM":
        return ".dcm"
    is_nrrd = content.startswith(b"NRRD")
    if is_nrrd or _META_IMAGE.match(content[:256]):
        if _ELSEWHERE.search(content[:_HEADER_BYTES]):
            raise problem("mask", "mask format", "its header names another file", "send voxels and header in one file")
        return ".nrrd" if is_nrrd else ".mha"
    kind = kind_of(content[:64])
    if kind == "gzip":
        return ".nii.gz"
    if kind == "PNG":
        return ".png"
    raise problem("mask", "mask format", f"{kind or 'no known format'} by its bytes", _KINDS)


def _check_syntax(file: Path) -> None:
    from data_shards.ingest.dicom_files import library

    pydicom = library("pydicom", file)
    try:
        syntax = str(pydicom.filereader.read_file_meta_info(file).get("TransferSyntaxUID", ""))
    except Exception as error:  # pydicom raises whatever the bytes lead it to
        raise problem("mask", "DICOM", f"cannot be read ({type(error).__name__})", "write it again") from error
    if syntax not in _SYNTAXES:
        raise problem("mask", "DICOM", f"transfer syntax {syntax[:64] or '(none)'}", "store it uncompressed")
