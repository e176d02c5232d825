"""The baselines of our loader: webdataset with torch's DataLoader, and a bare gather from memory.

Dimensions: N pairs, B batch, H rows, W columns. Run this file to find the best settings of webdataset on a machine.
"""

from __future__ import annotations

import io
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from support.harness import Contender, arguments, compare, measure, report, time_batches

SIZE = 256
_PAIRS_PER_SHARD = 250  # so that a small set still has several shards for each worker


def make_pair(number: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask, uint8 [H, W], about as hard to compress as abdominal CT: a body of smooth tissue with noise of
    eight grey levels, in air; organs with edges of their own, labelled 1 to 15. A pure function of its number."""
    from PIL import Image

    rng = np.random.default_rng(number)

    def smooth(cells: int) -> np.ndarray:
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))

    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = (x / 0.85) ** 2 + (y / 0.65) ** 2 + 0.1 * smooth(6) < 1
    organs = np.stack([smooth(7) for _ in range(16)]).argmax(axis=0)
    mask = np.where(inside & (smooth(7) > 0), organs, 0)
    tissue = 110 + 15 * smooth(9) + 3.0 * mask + 8 * rng.standard_normal((size, size))
    return np.where(inside, tissue, 0).clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def write_pairs(folder: Path, num: int, codec: str, size: int = SIZE) -> list[Path]:
    """The pairs of write_raw as tars of 250, in the usual form: KEY.image.png, KEY.mask.png (or .npy) and
    KEY.meta.json. Existing shards are kept."""
    import webdataset
    from PIL import Image

    def encoded(pixels_HW: np.ndarray) -> bytes:
        stream = io.BytesIO()
        if codec == "png":
            Image.fromarray(pixels_HW).save(stream, format="png")
        else:
            np.save(stream, pixels_HW)
        return stream.getvalue()

    pairs_N2HW = open_raw(write_raw(folder, num, size), size)
    shards = []
    for first in range(0, num, _PAIRS_PER_SHARD):
        last = min(first + _PAIRS_PER_SHARD, num)
        path = folder / f"{codec}-{first:06d}-{last:06d}.tar"
        shards.append(path)
        if path.exists():
            continue
        unfinished = path.with_suffix(".unfinished")
        with webdataset.TarWriter(str(unfinished), encoder=False) as tar:
            for number in range(first, last):
                image, mask = pairs_N2HW[number]
                tar.write(
                    {
                        "__key__": f"case{number // 100:04d}-axial-{number:06d}",
                        f"image.{codec}": encoded(image),
                        f"mask.{codec}": encoded(mask),
                        "meta.json": b'{"modality": "CT", "axis": "axial", "spacing_mm": [1.0, 1.0]}',
                    }
                )
        unfinished.rename(path)
    return shards


def write_raw(folder: Path, num: int, size: int = SIZE) -> Path:
    """The pairs 0 .. num - 1 as one file of bare pixels, uint8 [N, 2, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pairs-{num:06d}.raw"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            for number in range(num):
                stream.writelines(pixels.tobytes() for pixels in make_pair(number, size))
        unfinished.rename(path)
    return path


def open_raw(path: Path, size: int = SIZE) -> np.ndarray:
    """The pairs in such a file, memory-mapped: uint8 [N, 2, H, W]."""
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 2, size, size)


def into_page_cache(paths: list[Path]) -> None:
    """Read every byte once, so that no contender waits for the disk."""
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


@dataclass(frozen=True)
class WebDatasetSettings:
    """The settings of webdataset and DataLoader. The defaults are the fastest of those tried (see main)."""

    num_workers: int = 2
    batched_by_dataset: bool = False
    """.batched(B) and DataLoader(batch_size=None); else DataLoader batches. Both in the workers."""
    shuffle_buffer: int = 1000
    prefetch_factor: int = 8
    decoder: str = "lean"
    """`usual`: webdataset's own, .decode("l8"); `lean`: only the two members, straight to an array."""
    shared_collate: bool = True
    """Batch directly into the memory that the worker passes on; else np.stack, and then DataLoader copies."""
    crop: int | None = None
    """Flip left and right in half of the samples, then crop to this many pixels at random."""


def webdataset_batches(shards: list[Path], codec: str, batch_size: int, settings: WebDatasetSettings) -> Any:
    """A DataLoader of endless shuffled batches (image_BHW, mask_BHW), uint8 tensors."""
    import torch
    import webdataset

    image, mask = f"image.{codec}", f"mask.{codec}"
    dataset = webdataset.WebDataset(
        [str(path) for path in shards],
        shardshuffle=100,
        select_files=None if settings.decoder == "usual" else lambda name: not name.endswith(".json"),
    )
    dataset = dataset.repeat().shuffle(settings.shuffle_buffer)
    if settings.decoder == "usual":
        dataset = dataset.decode("l8").to_tuple(image, mask)
    else:
        dataset = dataset.to_tuple(image, mask).map_tuple(*[_DECODERS[codec]] * 2)

    if settings.crop:
        dataset = dataset.map(partial(_flip_and_crop, size=settings.crop))

    def collate(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, ...]:
        columns = zip(*samples, strict=True)
        if not settings.shared_collate:
            return tuple(torch.from_numpy(np.stack(column)) for column in columns)
        shape = (len(samples), *samples[0][0].shape)
        batch = [torch.empty(0, dtype=torch.uint8).set_(_shared_storage(shape)).view(shape) for _ in range(2)]
        for out, column in zip(batch, columns, strict=True):
            np.stack(column, out=out.numpy())
        return tuple(batch)

    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": collate}
    if settings.batched_by_dataset:
        dataset, options = dataset.batched(batch_size, collation_fn=collate), {"batch_size": None}
    return torch.utils.data.DataLoader(
        dataset,
        num_workers=settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
        persistent_workers=True,
        multiprocessing_context="fork",  # the default of Linux
        **options,
    )


def webdataset_contender(
    shards: list[Path],
    codec: str,
    *,
    batch_size: int = 32,
    num_pairs: int = 6400,
    settings: WebDatasetSettings | None = None,
) -> Contender:
    """Times `num_pairs` pairs after the shuffle buffers and the queues have filled."""
    chosen = settings or WebDatasetSettings()

    def run() -> tuple[float, float]:
        loader = webdataset_batches(shards, codec, batch_size, chosen)
        # Until its buffer is full, .shuffle reads two samples for each one that it returns; then come the batches that
        # wait in the queues, so that none of the timed ones was made beforehand.
        filling = chosen.num_workers * chosen.shuffle_buffer // batch_size
        warm_up = filling + 2 * chosen.num_workers * chosen.prefetch_factor
        iterator = iter(loader)
        try:
            return time_batches(iterator, max(1, num_pairs // batch_size), warm_up, lambda batch: len(batch[0]))
        finally:
            iterator._shutdown_workers()

    return run


def gather_contender(
    path: Path,
    *,
    batch_size: int = 32,
    num_pairs: int = 20_000,
    num_threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    reads: bool = False,
) -> Contender:
    """The limit: random pairs from one memory-mapped file of raw pixels, copied into a batch that is there already.

    The batch begins at a page, as the pairs do. Sixteen bytes behind, where malloc puts it, a copy takes twice as long
    on an AMD EPYC: its stores then seem to overlap with the next loads. `reads`: with preadv instead of from the map,
    and each of the two compared with a CRC-32C, while it is in the processor's cache."""

    def run() -> tuple[float, float]:
        import google_crc32c

        mapped_N2HW, stream = open_raw(path), path.open("rb", buffering=0)
        mapped_N2HW.reshape(-1)[::4096].sum()  # every page mapped before the clock runs
        barrier = threading.Barrier(num_threads + 1)
        num_batches = num_pairs // num_threads // batch_size

        def gather(seed: int) -> None:
            batch_B2HW = np.frombuffer(mmap.mmap(-1, batch_size * 2 * SIZE**2), np.uint8).reshape(-1, 2, SIZE, SIZE)
            index_TB = np.random.default_rng(seed).integers(len(mapped_N2HW), size=(num_batches, batch_size))
            barrier.wait()
            for index_B in index_TB:
                for at, index in enumerate(index_B.tolist()):
                    if not reads:
                        batch_B2HW[at] = mapped_N2HW[index]
                        continue
                    os.preadv(stream.fileno(), [batch_B2HW[at].data], index * 2 * SIZE**2, os.RWF_NOWAIT)
                    for pixels_HW in batch_B2HW[at]:
                        google_crc32c.value(pixels_HW)
            barrier.wait()

        threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(num_threads)]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = clock()
        barrier.wait()
        seconds = clock() - start
        for thread in threads:
            thread.join()
        stream.close()
        return num_batches * num_threads * batch_size, seconds

    return run


def _shared_storage(shape: tuple[int, ...]) -> Any:
    import torch

    # As torch's own default_collate in a worker.
    return torch.UntypedStorage._new_shared(int(np.prod(shape)), device="cpu")


def _decode_png(payload: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(payload)))


def _decode_npy(payload: bytes) -> np.ndarray:
    # Pixels begin behind the header, whose length is in bytes 8 and 9; no copy.
    return np.frombuffer(payload, np.uint8, offset=10 + int.from_bytes(payload[8:10], "little")).reshape(SIZE, SIZE)


def _flip_and_crop(pair: tuple[np.ndarray, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    # Views: the collation copies what is left, once.
    top, left = (random.randint(0, side - size) for side in pair[0].shape)
    step = -1 if random.random() < 0.5 else 1
    image, mask = (pixels[top : top + size, left : left + size][:, ::step] for pixels in pair)
    return image, mask


_DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {"png": _decode_png, "npy": _decode_npy}


def _settings_to_try() -> Iterator[tuple[str, WebDatasetSettings]]:
    best = WebDatasetSettings()
    yield "chosen", best
    changes: dict[str, tuple[Any, ...]] = {
        "decoder": ("usual",),
        "batched_by_dataset": (True,),
        "shared_collate": (False,),
        "shuffle_buffer": (100, 5000),
        "prefetch_factor": (2, 4),
        "num_workers": (1, 3, 4),
    }
    for name, values in changes.items():
        for value in values:
            yield f"{name}={value}", replace(best, **{name: value})


def main() -> None:
    """Measure webdataset with one setting changed at a time."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, required=True, help="folder for the pairs, about 2 GB for 4,000")
    parser.add_argument("--pairs", type=int, default=4000)
    args = parser.parse_args()
    rounds, pairs = (1, 1000) if args.quick else (args.rounds, args.pairs)
    contenders: dict[str, Contender] = {}
    files = [write_raw(args.data, pairs)]
    for codec in ("png", "npy"):
        shards = write_pairs(args.data, pairs, codec)
        files += shards
        for name, settings in _settings_to_try():
            contenders[f"{codec} {name}"] = webdataset_contender(shards, codec, settings=settings, num_pairs=pairs)
    for num_threads in (1, 2):
        contenders[f"gather, {num_threads} thread(s)"] = gather_contender(files[0], num_threads=num_threads)
    into_page_cache(files)
    rates = measure(contenders, rounds)
    ratios = [
        compare(rates, name, f"{name.split()[0]} chosen")
        for name in rates
        if name.startswith(("png", "npy")) and not name.endswith("chosen")
    ]
    report(args, rates, ratios, unit="pairs a second")


if __name__ == "__main__":
    main()
