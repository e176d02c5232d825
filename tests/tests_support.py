"""What several test files build on: a small real shard set of simple shapes, quick to make and to learn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from data_shards.store.shards import ShardSet

SIZE = 32


def write_shapes(
    out: Path,
    num_patients: int = 4,
    slices: int = 6,
    codec: str = "raw",
    size: int = SIZE,
    store: str = "webdataset",
    bits: int = 8,
    soft_edge: bool = False,
    held_out: int = 2,
) -> Path:
    """A shard set in which an ellipse is `body` and two discs in it are liver and spleen, brighter than the body.

    `num_patients` of each modality in the train split, `held_out` in each of the others."""
    from data_shards.labels import AMOS
    from data_shards.records import SliceMeta, SliceRecord
    from data_shards.store.shard_writer import ShardWriter, set_format

    writer = ShardWriter(out, set_format(store, codec, 10, size=size, bits=bits, soft_edge=soft_edge))
    row, column = np.mgrid[0:size, 0:size] / size
    for split, patients in (("train", num_patients), ("val", held_out), ("test", held_out)):
        for patient in range(patients):
            for modality, base in (("CT", 0), ("MR", 506)):
                case = f"amos_{base + 1 + {'train': 0, 'val': 100, 'test': 200}[split] + patient:04d}"
                file_sha256 = hashlib.sha256(case.encode()).hexdigest()
                rng = np.random.default_rng([patient, base, len(split)])
                for index in range(slices):
                    mask = np.zeros((size, size), np.uint8)
                    mask[(row - 0.5) ** 2 / 0.16 + (column - 0.5) ** 2 / 0.2 < 1] = AMOS.body_id or 0
                    for organ, left in ((6, 0.3), (1, 0.7)):
                        centre = rng.uniform(-0.06, 0.06, 2) + (0.5, left)
                        mask[(row - centre[0]) ** 2 + (column - centre[1]) ** 2 < 0.02] = organ
                    grey = {0: 5, 16: 90, 6: 150, 1: 210} if modality == "CT" else {0: 5, 16: 150, 6: 90, 1: 230}
                    image = np.vectorize(grey.get)(mask) + rng.normal(0, 6, mask.shape)
                    scale = 2.0 if bits == 8 else 2.0 / 257
                    meta = SliceMeta(
                        case, modality, "axial", index, split, (6.0, 6.0), tuple(np.eye(4).ravel()), scale, -256.0,
                        "amos", tuple(int(i) for i in np.unique(mask) if i), True, file_sha256, bits=bits,
                    )  # fmt: skip
                    grey_levels = image.clip(0, 255).astype(np.uint8)
                    if bits == 16:
                        grey_levels = np.maximum(grey_levels.astype(np.int32) * 257 - mask % 3, 0)
                    edge = np.stack([np.roll(mask, 1, 1), 255 - mask]) if soft_edge else None
                    writer.write(SliceRecord(grey_levels.astype(f"uint{bits}"), mask, meta, edge))
    preprocessing = {"size": size, "bits": bits}
    writer.finish({"label_table": {"name": AMOS.name, "names": AMOS.names}, "preprocessing": preprocessing})
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def flip_mask_bytes(shards: ShardSet, rows: Sequence[int]) -> ShardSet:
    """The set, of which one byte of each of these rows' masks is flipped on disk."""
    where = shards.parts["mask"]
    for row in rows:
        file = Path(shards.root) / shards.index["shards"][where.file_N[row]]["file"]
        content = bytearray(file.read_bytes())
        content[where.offset_N[row] + where.bytes_N[row] // 2] ^= 4
        file.write_bytes(content)
    return shards


def actors_of(starters: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes of fan_out's Ray actors under any of `starters`; another test's on this machine are left alone."""
    found = []
    for child in (child for starter in starters for child in starter.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += [child] if " ".join(child.cmdline()).startswith("ray::_Worker") else []
    return found
