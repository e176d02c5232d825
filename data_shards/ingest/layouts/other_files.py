"""What is in a folder or file that no layout reads, and what can be done with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from data_shards.ingest.layouts.base import MANIFESTS
from data_shards.ingest.pictures import picture_stem
from data_shards.ingest.volume_files import stem

_MOST_LOOKED_AT = 100_000
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".7z", ".rar", ".nii.zip")
_UNPACK = "unpack it, and give the folder that comes out"
_TO_NIFTI = "write them as NIfTI, with their affine"
# By ending: what it is, and what to do.
_KINDS = {
    **dict.fromkeys(_ARCHIVES, ("archives", "unpack them")),
    **dict.fromkeys(
        (".npy", ".npz", ".h5", ".hdf5", ".mat", ".pt", ".pth", ".pkl", ".b2nd"),
        ("arrays, which state no spacing", "give the volumes that they were made from, or " + _TO_NIFTI),
    ),
    **dict.fromkeys((".img", ".hdr"), ("halves of volumes, header and voxels", "write each pair as one .nii.gz")),
    **dict.fromkeys((".mgz", ".mgh", ".mnc", ".v", ".nhdr", ".gipl", ".par", ".rec"), ("volumes", _TO_NIFTI)),
    **dict.fromkeys((".tfrecord", ".tfrecords", ".parquet", ".arrow", ".lmdb"), ("tables of records", _TO_NIFTI)),
    **dict.fromkeys((".bmp", ".gif", ".webp", ".svs"), ("pictures", "write them as PNG")),
}


def no_folder(path: Path, known: str) -> tuple[str, str]:
    """What a path is that is no folder, and a remedy. `known`: what can be given."""
    if not path.exists():
        return "there is nothing" if not path.is_symlink() else "a link to nothing", known
    if _ending(path.name) in _ARCHIVES or _is_archive(path):
        return "an archive", _UNPACK
    if stem(path.name) is not None or picture_stem(path.name) is not None:
        return "one file", f"give the folder of all images and labels; {known}"
    return "not a folder", known


def seen_in(root: Path) -> Iterator[str]:
    """What there is instead: other kinds of files, and volumes or pictures that are in no pair."""
    kinds, volumes = Counter[str](), list[Path]()
    for file in islice(_files(root), _MOST_LOOKED_AT):
        kinds[_ending(file.name)] += 1
        if stem(file.name) is not None or picture_stem(file.name) is not None:
            volumes.append(file)
    for ending, num in kinds.most_common():
        if ending in _KINDS:
            what, remedy = _KINDS[ending]
            yield f"{num} files of {ending} are {what}: {remedy}"
    if volumes:
        example = volumes[0].relative_to(root)
        table = f"list images with their labels in {MANIFESTS[0]} (columns image,label,modality)"
        yield f"no image of {len(volumes)} volumes or pictures, as {example}, has a label by its name: {table}"
    elif not kinds:
        yield "there is no file in it"


def _is_archive(path: Path) -> bool:
    """By its first bytes: zip, or tar (POSIX.1-1988, ustar), if it is not packed."""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(512)
        return start.startswith(b"PK\x03\x04") or start[257:262] == b"ustar"
    return False


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(one for one in folders if not one.startswith((".", "__")))
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def _ending(name: str) -> str:
    """In lower case; of two parts for .tar.gz."""
    parts = Path(name.lower()).suffixes[-2:]
    return "".join(parts) if parts[:1] == [".tar"] else "".join(parts[-1:])
