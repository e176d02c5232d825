"""Grey values before and after clipping (the paper's Figure 1), from the archive's volumes where they still exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.ingest.intensity import restore
from data_shards.store.shards import ShardSet

_NUM_VOLUMES = 2
_NUM_SLICES = 48
_NUM_BINS = 160
# Every volume is sampled at this many voxels along each axis: enough for a smooth density, and little memory.
_VOXELS_ALONG_AN_AXIS = 160
# Air to dense bone. With metal and padding values, which are beyond, all else would be in one bin.
_CT_RANGE_HU = (-1100.0, 1500.0)


@dataclass(frozen=True)
class Density:
    """A histogram with unit area: `edges` [n + 1], `values` [n]."""

    edges: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Clipping:
    """One modality's densities. `window` is the range kept, in the unit of `before` (the mean over cases for MR).

    `from_volumes` is False where the archive is not there. `before` then shows the stored slices, mapped back to their
    original unit, and nothing outside the window.
    """

    before: Density
    after: Density
    window: tuple[float, float]
    from_volumes: bool
    case_ids: tuple[str, ...]
    in_hu: bool = False


def clipping_of(shards: ShardSet | None, modality: str, amos_root: Path | None) -> Clipping | None:
    """Densities of a few cases of `modality`, from the volumes under `amos_root`; None when the set holds none."""
    if shards is None:
        return None
    rows = shards.select(modalities=[modality], labelled_only=False)
    if not len(rows):
        return None
    cases = np.array(shards.samples["case_id"].to_pylist())[rows]
    volumes = dict(_read_some(_volume_files(shards, amos_root, dict.fromkeys(cases))))
    chosen = list(volumes) or list(dict.fromkeys(cases))[:_NUM_VOLUMES]
    rows = rows[np.isin(cases, chosen)]
    rows = rows[np.linspace(0, len(rows) - 1, min(_NUM_SLICES, len(rows))).astype(int)]
    records = [shards.read(int(row)) for row in rows]
    grey = np.concatenate([record.image_uint8().ravel() for record in records])
    low = float(np.mean([r.meta.intensity_offset for r in records]))
    width = float(np.mean([(2**r.meta.bits - 1) * r.meta.intensity_scale for r in records]))
    if volumes:
        stored = np.concatenate([values.ravel() for values in volumes.values()])
    else:
        stored = np.concatenate(
            [restore(r.image_HW.ravel(), r.meta.intensity_scale, r.meta.intensity_offset) for r in records]
        )
    upper = float(np.percentile(stored, 99.9))
    in_hu = modality in shards.in_hu
    span = _CT_RANGE_HU if in_hu and volumes else (float(stored.min()), max(upper, float(stored.min()) + 1))
    return Clipping(
        before=_density(stored, np.linspace(*span, _NUM_BINS + 1)),
        after=_density(grey, np.linspace(0, 256, 65)),
        window=(low, low + width),
        from_volumes=bool(volumes),
        case_ids=tuple(chosen),
        in_hu=in_hu,
    )


def _density(values: np.ndarray, edges: np.ndarray) -> Density:
    counts, _ = np.histogram(values, bins=edges)
    return Density(edges, counts / max(counts.sum(), 1) / np.diff(edges))


def _volume_files(shards: ShardSet, amos_root: Path | None, cases: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """The cases' volumes that are still there; the set's index holds their paths within the archive."""
    source = shards.index.get("source") or {}
    for case in cases:
        if amos_root is not None and source.get(case, {}).get("image"):
            name = source[case]["image"][0]
            file = amos_root / name
            if ".." not in Path(name).parts and not Path(name).is_absolute() and file.is_file():
                yield case, file


def _read_some(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, np.ndarray]]:
    """The first few volumes that can be read. Others are skipped: a figure is not worth an error."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    num_read = 0
    for case, file in files:
        try:
            volume = nibabel.load(file)
            step = tuple(slice(None, None, max(1, n // _VOXELS_ALONG_AN_AXIS)) for n in volume.shape)
            values = np.asarray(volume.dataobj[step], dtype=np.float32)
        except (OSError, EOFError, ValueError, ImageFileError):
            continue
        yield case, values[np.isfinite(values)]
        num_read += 1
        if num_read == _NUM_VOLUMES:
            return
