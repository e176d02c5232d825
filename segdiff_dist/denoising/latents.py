"""The latents of a run's slices, encoded once before its training.

    RUN/latents/latents.json     the digests of autoencoder and set, and the scale; written last
    RUN/latents/latents.npy      float32 [N, C, h, w], by row of the set; rows that are not used are holes

Where the loader augments or crops, a slice has other pixels at every visit. Then only the scale is kept, and batches
are encoded in the training step. N slices, C latent channels, h, w rows and columns of a latent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Sequential, sequential_positions
from data_shards.files import new_file, write_atomic
from data_shards.problems import problem
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.latent_space import DESCRIBED, LatentSpace
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

INDEX, LATENTS = "latents.json", "latents.npy"
# Enough for three digits of the scale.
_MOST_SLICES = 512
_AT_ONCE = 16


def can_cache(loader: LoaderConfig) -> bool:
    """Whether a slice has the same pixels at every visit."""
    return not (loader.flip or loader.rotates_or_zooms or loader.jitter_mr > 0 or loader.crop_size)


def latents_message(space: LatentSpace | None, loader: LoaderConfig) -> str:
    """The end of a message: where the latents come from. Empty without a space."""
    if space is None:
        return ""
    where = (
        "cached in RUN/latents" if can_cache(loader) else "encoded in every step, since the loader augments or crops"
    )
    return f", latents {where}"


def latents_bytes(space: LatentSpace | None, loader: LoaderConfig, num: int) -> int:
    """Bytes of the latents of `num` slices on the disk."""
    if space is None or not can_cache(loader):
        return 0
    return 4 * num * int(np.prod(space.shape(space.autoencoder.size)))


def refuse_other_latents(run: Path, space: LatentSpace | None, shards: ShardSet) -> None:
    """Refuse to go on with the latents, or with the denoiser, of another autoencoder or of another set."""
    if space is None:
        return
    index, remedy = run / "latents" / INDEX, "restore it, or use another run folder"
    if index.is_file():
        known = json.loads(index.read_text())
        if known["autoencoder_sha256"] != space.sha256:
            value = f"made by another autoencoder ({known['autoencoder_sha256'][:12]}...)"
            raise problem(index.parent, "latents", value, f"{remedy}; without checkpoints: remove {index.parent}")
        if known["shards_digest"] != shards.digest:
            raise problem(index.parent, "latents", f"not of {shards.root}", f"{remedy}, or remove {index.parent}")
    for file in sorted((run / "weights").glob(f"[!.]*/{DESCRIPTION}")):
        before = json.loads(file.read_text()).get(DESCRIBED)
        if before is None or before["autoencoder_sha256"] != space.sha256:
            raise problem(file.parent, "autoencoder", "not that of the run's weights", remedy)


def latents_of(
    space: LatentSpace, shards: ShardSet, rows: np.ndarray, loader: LoaderConfig, run: Path
) -> np.ndarray | None:
    """Encode the slices `rows` on rank 0, if that was not done; returns the cached latents by row of the set, None if
    they cannot be cached.

    The scale is that of at most 512 of the rows. Call it on every rank, after torch.distributed was started.
    """
    from segdiff_dist.ranks.distributed import gather_objects, is_main

    folder = run / "latents"
    wanted = rows if can_cache(loader) else None
    if is_main() and not _is_complete(folder, wanted):
        folder.mkdir(parents=True, exist_ok=True)
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_SLICES)).round().astype(np.int64)]
        _write(space, shards, some, wanted, folder, loader)
    gather_objects(None)
    return None if wanted is None else np.load(folder / LATENTS, mmap_mode="r")


def run_space(denoiser: DenoiserConfig, weights: Path) -> LatentSpace | None:
    """The latents' space of a run whose weights are in RUN/weights, with the scale that `latents_of` measured; None for
    pixels."""
    if denoiser.space == "pixel":
        return None
    index = json.loads((weights.parent / "latents" / INDEX).read_text())
    return LatentSpace.open(str(denoiser.autoencoder)).scaled(index["mean"], index["std"])


def _is_complete(folder: Path, wanted: np.ndarray | None) -> bool:
    return (folder / INDEX).is_file() and (wanted is None or (folder / LATENTS).is_file())


def _write(
    space: LatentSpace,
    shards: ShardSet,
    rows: np.ndarray,
    wanted: np.ndarray | None,
    folder: Path,
    loader: LoaderConfig,
) -> None:
    """latents.npy with the latents of the rows `wanted`, if there are any, and latents.json with the scale of `rows`,
    which are among them."""
    shape = (len(shards), *space.shape(space.autoencoder.size))
    moments, for_scale = _ChannelMoments(space.channels), set(rows.tolist())
    with nullcontext() if wanted is None else _latents_file(folder / LATENTS, shape) as write_row:
        for row, latent_Chw in _encoded(space, shards, rows if wanted is None else wanted, loader):
            if write_row is not None:
                write_row(row, latent_Chw)
            if row in for_scale:
                moments.add(latent_Chw)
    mean_C, std_C = moments.mean_and_std()
    if std_C.min() < 1e-6:
        value = f"channel {int(std_C.argmin())} is constant"
        raise problem(space.folder, "autoencoder", value, "train it longer, or with fewer latent_channels")
    index: dict[str, Any] = {"autoencoder_sha256": space.sha256, "shards_digest": shards.digest}
    index |= {name: [float(f"{v:.6g}") for v in values] for name, values in (("mean", mean_C), ("std", std_C))}
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


@contextmanager
def _latents_file(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A NumPy file of float32 `shape`, full of holes; yields the function that writes one of its rows."""
    row_bytes = int(np.prod(shape[1:])) * 4
    with new_file(path) as unfinished, unfinished.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        begin = file.tell()
        file.truncate(begin + row_bytes * shape[0])

        def write_row(row: int, latent_Chw: np.ndarray) -> None:
            file.seek(begin + row_bytes * row)
            file.write(latent_Chw.tobytes())

        yield write_row


class _ChannelMoments:
    """Mean and standard deviation of each channel, over latents that are added one after the other."""

    def __init__(self, channels: int) -> None:
        self._sums_3C = np.zeros((3, channels))  # of 1, z, z^2

    def add(self, latent_Chw: np.ndarray) -> None:
        z_CN = latent_Chw.reshape(len(latent_Chw), -1).astype(np.float64)
        self._sums_3C += (np.full(len(z_CN), z_CN.shape[1]), z_CN.sum(1), np.square(z_CN).sum(1))

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        num_C, sum_C, squares_C = self._sums_3C
        mean_C = sum_C / num_C
        return mean_C, np.sqrt(np.maximum(squares_C / num_C - mean_C**2, 0.0))


def _encoded(
    space: LatentSpace, shards: ShardSet, rows: np.ndarray, loader: LoaderConfig
) -> Iterator[tuple[int, np.ndarray]]:
    """Each of these rows of the set, rising, and its latent: float32 [C, h, w]."""
    from data_shards.progress import progress_bar

    rows = np.unique(rows)
    plain = LoaderConfig(crop_size=loader.crop_size, num_threads=loader.num_threads, on_corrupt=loader.on_corrupt)
    positions = sequential_positions(len(rows), min(_AT_ONCE, len(rows)))
    device = space.autoencoder.device
    batches = Loader(shards, Sequential(rows), iter(positions), plain, batch_size=_AT_ONCE, seed=0, device=device)
    with progress_bar(total=len(rows), desc="latents", unit="img", mininterval=1.0) as bar:
        for batch in batches:
            latents: torch.Tensor = space.autoencoder.encode(batch.image_BHW)
            yield from zip(rows[batch.position_B.cpu().numpy()].tolist(), latents.cpu().numpy(), strict=True)
            bar.update(len(batch))
