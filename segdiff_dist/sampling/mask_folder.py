"""Masks of a folder: NIfTI volumes, cut as `segdiff prepare` cuts, or PNG slices; in the ids of the model's table.

Dimensions: I, J, K as in data_shards.ingest.volumes; H rows, W columns; M masks.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.labels import UNUSED, LabelTable
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.records import LONGEST_CASE_ID, is_case_id
from segdiff_dist.config import read_yaml
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.items import MASK_FILE, NO_MODALITY

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.store.shards import ShardSet

_ENDINGS = (".nii.gz", ".nii", ".png")
_MOST_IDS = 256


@dataclass(frozen=True)
class FolderMasks:
    """All masks of a folder: uint8 [M, H, W] ids, and a row for each (key, case_id, modality, axis, slice_index)."""

    mask_MHW: np.ndarray
    rows: pa.Table
    num_empty: int


def read_mask_folder(folder: Path, shards: ShardSet, label_table: LabelTable, config: SampleConfig) -> FolderMasks:
    """Every mask below `folder`, NIfTI volumes resampled, turned and cut as the slices of `shards` were; of a volume
    too thin for that, the slice in the middle.

    PNG masks say neither spacing nor orientation: they must be slices of the set's size, shown as docs/data.md says.
    Raises InputProblems for all that is wrong with the files at once: unreadable ones, ids that the label table or
    config.label_map does not know, PNGs of another size.
    """
    import pyarrow as pa

    files = mask_files(folder)
    to_own = _label_map(config.label_map, label_table)
    names_files = any(not is_named_after(file.relative_to(folder)) for file in files)
    found: list[Problem] = []
    masks: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            for index, mask_HW in _slices(file, shards, to_own, config.masks_axis):
                rows.append(_row(file.relative_to(folder), config.masks_axis, index, names_files=names_files))
                masks.append(mask_HW)
        except InputProblems as error:
            found += error.problems
    keys = [row["key"] for row in rows]
    if len(set(keys)) < len(keys) and not found:
        twice = next(key for key in keys if keys.count(key) > 1)
        found.append(Problem(str(folder), "names", f"two masks are called {twice}", "rename one of the files"))
    refuse(found)
    return FolderMasks(np.stack(masks), pa.Table.from_pylist(rows), sum(not mask_HW.any() for mask_HW in masks))


def mask_files(folder: Path) -> list[Path]:
    """The NIfTI and PNG files below a folder, by name; refused where there is none."""
    files = sorted(file for file in folder.rglob("*") if _ending(file) and file.is_file())
    if not files:
        passed_over = others_told(folder)
        value = f"none there: {passed_over}" if passed_over else "none there"
        raise problem(folder, "masks", value, f"give a folder of {', '.join(_ENDINGS)} files")
    return files


def others_told(folder: Path) -> str | None:
    """Words for the files below a folder that are no masks, hidden ones left out; None where there are none."""
    others = [file for file in folder.rglob("*") if file.is_file() and file.name[0] != "." and not _ending(file)]
    if not others:
        return None
    endings = sorted({file.suffix or file.name for file in others})
    told = ", ".join(endings[:5]) + (", ..." if len(endings) > 5 else "")
    return f"{len(others):,} other file{'s' if len(others) > 1 else ''} passed over ({told})"


def folder_digest(folder: Path, config: SampleConfig) -> str:
    """sha256 over the names and bytes of a folder's masks and of the label map."""
    digest = hashlib.sha256()
    for file in mask_files(folder):
        digest.update(str(file.relative_to(folder)).encode() + hashlib.sha256(file.read_bytes()).digest())
    if config.label_map is not None:
        read_yaml(config.label_map)  # refused where it is not there
        digest.update(config.label_map.read_bytes())
    return digest.hexdigest()


def _slices(
    file: Path, shards: ShardSet, to_own: Callable[[Path, np.ndarray], np.ndarray], axis: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(slice index, uint8 [H, W] in the model's ids) of a file's masks."""
    if _ending(file) == ".png":
        yield 0, to_own(file, _read_png(file, shards.size))
        return
    from data_shards.ingest.archive import read_header
    from data_shards.ingest.body import BodyField
    from data_shards.ingest.intensity import GreyMap
    from data_shards.ingest.prepare_config import PrepareConfig
    from data_shards.ingest.slices import Slice, cut
    from data_shards.ingest.volumes import UnreadableVolume, Volume, read_labels

    found: list[Problem] = []
    read_header(file, found)
    refuse(found)
    try:
        labels = read_labels(file, _MOST_IDS)
    except UnreadableVolume as error:
        raise problem(file, "voxels", error.reason, "give whole numbers from 0 to 255, one a voxel") from error
    own_IJK = to_own(file, labels.voxels_IJK)
    volume = Volume(own_IJK, 1.0, 0.0, labels.affine, labels.sha256)
    defaults = PrepareConfig()
    names = ("size", "spacing_mm", "slice_stride", "fit", "mask_resize")
    geometry = {name: shards.index["preprocessing"].get(name, getattr(defaults, name)) for name in names}
    # A mask is cut as the mask of an image that is not there: its own ids stand for grey values that nobody looks at.
    nobody = BodyField(np.broadcast_to(np.float32(0), own_IJK.shape), np.ones(3))

    def planes(**changes: Any) -> Iterator[Slice]:
        return cut(volume, volume, nobody, GreyMap(1.0, 0.0), axis=axis, body_id=0, **geometry | changes)

    is_empty = True
    for one in planes():
        is_empty = False
        yield one.slice_index, one.mask_HW
    if is_empty:  # thinner than half a stride
        every = list(planes(slice_stride=1))
        middle = every[len(every) // 2]
        yield middle.slice_index, middle.mask_HW


def _ending(file: Path) -> str:
    """Which of the endings a file has, in upper or lower case; nothing where it is no mask."""
    name = file.name.lower()
    return next((ending for ending in _ENDINGS if name.endswith(ending)), "")


def _read_png(file: Path, size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            mode, pixels = picture.mode, np.asarray(picture)
    except (OSError, UnidentifiedImageError) as error:
        raise problem(file, "PNG", f"cannot be read ({error})", "write it again") from error
    if mode not in ("1", "L", "P", "I;16", "I") or pixels.ndim != 2:
        raise problem(file, "PNG", f"{mode} pixels", "a mask has one channel, and in it label ids")
    if pixels.shape != (size, size):
        height, width = pixels.shape
        remedy = f"make it {size}x{size}, or give NIfTI, which says its spacing and is resampled"
        raise problem(file, "size", f"{width}x{height} pixels", remedy)
    if pixels.min() < 0 or pixels.max() >= _MOST_IDS:
        raise problem(file, "label ids", f"up to {pixels.max()}", f"give whole numbers below {_MOST_IDS}")
    return pixels.astype(np.uint8)


def _label_map(file: Path | None, table: LabelTable) -> Callable[[Path, np.ndarray], np.ndarray]:
    """Turns ids of a file into the table's; ids that nothing is known of are refused, all of them at once."""
    own_of = np.full(_MOST_IDS, -1, dtype=np.int16)
    if file is None:
        known = [i for i, name in enumerate(table.names) if name != UNUSED]
        own_of[known] = known
        remedy = f"no class of {table.name!r}: say what they mean in a --sample.label-map"
    else:
        own_of[0] = 0
        for theirs, meant in _read_label_map(file, table).items():
            own_of[theirs] = meant
        remedy = f"{file} does not say what they mean: add them"

    def to_own(source: Path, ids: np.ndarray) -> np.ndarray:
        counts = sum(np.bincount(plane.ravel(), minlength=_MOST_IDS) for plane in ids)
        unknown = [int(i) for i in np.flatnonzero(counts) if own_of[i] < 0]
        if unknown:
            raise problem(source, "label ids", unknown, remedy)
        return own_of.clip(min=0).astype(np.uint8)[ids]

    return to_own


def _read_label_map(file: Path, table: LabelTable) -> dict[int, int]:
    """{their id: our id} of a YAML or JSON mapping to names or ids of the table."""
    known = {name: i for i, name in enumerate(table.names)} | {i: i for i in range(table.num_classes)}
    found, meanings = [], {}
    for theirs, meant in read_yaml(file).items():
        is_id = str(theirs).isdecimal() and int(theirs) < _MOST_IDS
        if not is_id:
            found.append(Problem(str(file), "label id", repr(theirs), f"give whole numbers below {_MOST_IDS}"))
        elif not isinstance(meant, str | int) or isinstance(meant, bool) or meant not in known:
            remedy = f"choose from {', '.join(table.names)}"
            found.append(Problem(str(file), f"label id {theirs}", repr(meant), remedy))
        else:
            meanings[int(theirs)] = known[meant]
    refuse(found)
    return meanings


def case_id_of(file: Path) -> str:
    """The case id of a mask file, from its path below the folder: / and . become _. So does what else an id cannot
    hold, such as a space or a letter with an accent; a digest of the whole name then keeps it unique."""
    name = _joined_name(file)
    if is_case_id(name):
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[: LONGEST_CASE_ID - 9] + f"_{digest}"


def is_named_after(file: Path) -> bool:
    """Whether a mask's id is its file's name, folders joined by _."""
    return case_id_of(file) == _joined_name(file)


def _joined_name(file: Path) -> str:
    return str(file)[: -len(_ending(file))].replace("/", "_").replace(".", "_")


def _row(file: Path, axis: str, index: int, *, names_files: bool) -> dict[str, Any]:
    case_id = case_id_of(file)
    key = f"{case_id}-{axis}-{index:04d}"
    row = {"key": key, "case_id": case_id, "modality": NO_MODALITY, "axis": axis, "slice_index": index}
    # Only where ids do not say it: the list of a job from before there was this column is the same.
    return row | ({MASK_FILE: os.fsencode(file).decode(errors="replace")} if names_files else {})
