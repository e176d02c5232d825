"""Our loader against webdataset with torch's DataLoader, over the same 256x256 pairs, shuffled, as uint8 tensors.

    (a) webdataset + DataLoader, 2 workers, PNG as in its documentation (.decode("l8")), and tuned (b) the same over raw
    .npy ours, on each codec; and with flips and random crops the limit: a gather of the same bytes from a memory map

Contenders are measured in turns. Then once each: memory over ten epochs, the first batch of a set of 1,000 shards, and
a set of 10 million slices, index and order alone.

--limit measures our loader and the gather alone, by the clock and by the CPU time of all threads, which other work on
the machine changes less. --against COMMIT compares with the loader of another commit instead, each time in a process of
its own, in turns, by CPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from support.baselines import (
    SIZE,
    WebDatasetSettings,
    gather_contender,
    into_page_cache,
    open_raw,
    webdataset_contender,
    write_pairs,
    write_raw,
)
from support.harness import Contender, arguments, compare, measure, report, time_batches
from support.other_code import against

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Shuffled
from data_shards.labels import AMOS
from data_shards.records import SliceMeta, SliceRecord
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet

_BATCH = 32
_PLAIN = LoaderConfig()
_AUGMENTED = LoaderConfig(flip=True, crop="random", crop_size=224)
_TEN_MILLION = 10_000_000


def write_set(out: Path, pairs_N2HW: np.ndarray, store: str, codec: str, samples_per_shard: int = 1000) -> Path:
    """The pairs as a shard set."""
    if not (out / "index.json").exists():
        writer = ShardWriter(out, set_format(store, codec, samples_per_shard, size=SIZE, bits=8, soft_edge=False))
        for number, (image, mask) in enumerate(pairs_N2HW):
            writer.write(SliceRecord(image, mask, _meta(number, mask)))
        table = {"name": AMOS.name, "names": list(AMOS.names)}
        writer.finish({"label_table": table, "preprocessing": {"size": SIZE, "bits": 8}, "failed": []})
    return out


def batches(shards: ShardSet, config: LoaderConfig, seed: int = 0) -> Any:
    """Endless shuffled batches of our loader."""
    order = Shuffled(shards.select(split="train"), seed)
    positions = (np.arange(step * _BATCH, (step + 1) * _BATCH) for step in count())
    return iter(Loader(shards, order, positions, config, batch_size=_BATCH, seed=seed))


def ours(path: Path, config: LoaderConfig, num_pairs: int, clock: Callable[[], float] = time.perf_counter) -> Contender:
    """Times `num_pairs` pairs after the batches that were made ahead have been consumed."""

    def run() -> tuple[float, float]:
        iterator = batches(ShardSet.open(path), config)
        try:
            warm_up = 2 * config.prefetch_batches
            return time_batches(iterator, max(1, num_pairs // _BATCH), warm_up, lambda batch: len(batch), clock)
        finally:
            iterator.close()

    return run


def webdataset_turn(shards: list[Path], codec: str, options: dict[str, Any]) -> tuple[float, float]:
    """One turn of (a) or (b). In a process without DALI, since DataLoader forks its workers and a fork of a process
    that runs other libraries' threads may not live."""
    return webdataset_contender(shards, codec, batch_size=_BATCH, **options)()


def memory_over_epochs(path: Path, epochs: int = 10) -> list[int]:
    """Memory in MiB of a separate process after each epoch, without file pages."""
    return _in_a_process(_memory_over_epochs, path, epochs)


def first_batch_s(path: Path) -> dict[str, float]:
    """Seconds from opening a set to its first batch, in a separate process that has already loaded its modules."""
    return _in_a_process(_first_batch, path)


def ten_million(folder: Path) -> dict[str, float]:
    """A set of ten million slices, whose shards are empty files of the right length: seconds and MiB to open it and to
    draw a batch's rows."""
    if not (folder / "index.json").exists():
        _fake_set(folder, _TEN_MILLION, samples_per_shard=2048)
    return _in_a_process(_open_ten_million, folder)


def _memory_over_epochs(path: Path, epochs: int) -> list[int]:
    shards = ShardSet.open(path)
    iterator = batches(shards, _AUGMENTED)
    taken = []
    for _ in range(epochs):
        for _ in islice(iterator, len(shards) // _BATCH):
            pass
        gc.collect()
        taken.append(_mib("RssAnon"))
    iterator.close()
    return taken


def _first_batch(path: Path) -> dict[str, float]:
    import nvidia.dali.fn
    import pyarrow
    import torch

    del nvidia, pyarrow, torch  # loaded before the clock runs

    start = time.perf_counter()
    shards = ShardSet.open(path)
    opened = time.perf_counter() - start
    iterator = batches(shards, _PLAIN)
    next(iterator)
    seconds = {"open_s": round(opened, 3), "first_batch_s": round(time.perf_counter() - start, 3)}
    iterator.close()
    return {"shards": len(shards.index["shards"]), **seconds}


def _open_ten_million(folder: Path) -> dict[str, float]:
    import pyarrow

    del pyarrow  # loaded before the clock runs
    before = _mib("VmHWM")
    start = time.perf_counter()
    shards = ShardSet.open(folder)
    opened = time.perf_counter() - start
    rows = shards.select(split="train", modalities=["CT", "MR"])
    order = Shuffled(rows, 0)
    ready = time.perf_counter() - start
    for step in range(100):
        order.rows_at(np.arange(step * 256, (step + 1) * 256) * 31_337)
    per_batch = (time.perf_counter() - start - ready) / 100
    return {
        "slices": len(shards),
        "open_s": round(opened, 3),
        "select_and_order_s": round(ready - opened, 3),
        "rows_of_a_batch_of_256_us": round(per_batch * 1e6),
        "peak_mib": _mib("VmHWM"),
        "peak_before_mib": before,
    }


def _fake_set(folder: Path, num: int, samples_per_shard: int) -> None:
    """samples.arrow and index.json as prepare would write them; the tars are holes of the right length."""
    import pyarrow as pa

    from data_shards.records import AXES, MODALITIES, SPLITS
    from data_shards.store import samples_table
    from data_shards.store.set_index import SAMPLES, SHARDS, UNFINISHED, write_index

    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).mkdir(exist_ok=True)
    step = 2 * (SIZE * SIZE + 1024) + 2048
    columns = _fake_columns(num, samples_per_shard, step)
    arrays = [_fake_column(field, columns, num) for field in samples_table.schema()]
    samples_table.write(pa.Table.from_arrays(arrays, schema=samples_table.schema()), folder / f"{SAMPLES}.unfinished")
    assert (MODALITIES, AXES[0], SPLITS[0]) == (("CT", "MR"), "axial", "train")
    entries = []
    for number in range(-(-num // samples_per_shard)):
        held = min(samples_per_shard, num - number * samples_per_shard)
        name = f"train-{number:06d}.tar"
        with (folder / UNFINISHED / name).open("wb") as stream:
            stream.truncate(held * step)
        entries.append(
            {
                "file": f"{SHARDS}/{name}",
                "split": "train",
                "parts": ["image", "mask"],
                "bytes": held * step,
                "samples": held,
                "sha256": "0" * 64,
            }
        )
    header = {
        "label_table": {"name": AMOS.name, "names": list(AMOS.names)},
        "preprocessing": {"size": SIZE, "bits": 8},
        "store": "webdataset",
        "codec": "raw",
        "failed": [],
    }
    write_index(folder, header, entries, [], num)


def _fake_columns(num: int, samples_per_shard: int, step: int) -> dict[str, Any]:
    """The columns of samples.arrow that are no dictionaries; a sample takes `step` bytes of a tar."""
    pixels, index_N = SIZE * SIZE, np.arange(num)
    within_N = index_N % samples_per_shard
    columns: dict[str, Any] = {
        "slice_index": index_N % 400,
        "intensity_scale": np.full(num, 2.0),
        "intensity_offset": np.full(num, -256.0),
        "labelled": np.ones(num, bool),
        "bits": np.full(num, 8),
    }
    for number, part in enumerate(("image", "mask")):
        columns |= {
            f"{part}_file": index_N // samples_per_shard,
            f"{part}_offset": within_N * step + 640 + number * (pixels + 640),
            f"{part}_bytes": np.full(num, pixels),
            f"{part}_crc32c": index_N % 2**32,
        }
    return columns | {
        "edge_file": np.full(num, -1),
        **{f"edge_{n}": np.zeros(num) for n in ("offset", "bytes", "crc32c")},
    }


def _fake_column(field: Any, columns: dict[str, Any], num: int) -> Any:
    """A column of samples.arrow of `num` slices."""
    import pyarrow as pa

    from data_shards.store import samples_table

    index_N = np.arange(num)
    if field.name == "key":
        return pa.array([f"amos_{i // 1200:05d}-axial-{i % 1200:04d}" for i in range(num)])
    elif field.name == "case_id":
        cases = pa.array([f"amos_{i:05d}" for i in range(num // 1200 + 1)])
        return pa.DictionaryArray.from_arrays(pa.array((index_N // 1200).astype(np.int32)), cases)
    elif field.name in samples_table.VOCABULARY:
        words = samples_table.VOCABULARY[field.name]
        codes = {"modality": index_N // 1200 % 2, "axis": index_N % 3}.get(field.name, np.zeros(num))
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.uint8)), pa.array(words))
    elif pa.types.is_dictionary(field.type):
        codes = pa.array(np.zeros(num, np.int32))
        return pa.DictionaryArray.from_arrays(codes, pa.array(["0" * 64]))
    elif field.name in ("spacing_mm", "affine"):
        width = field.type.list_size
        return pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(num * width)), width)
    elif field.name == "labels_present":
        ends = pa.array(np.arange(num + 1, dtype=np.int32))
        return pa.ListArray.from_arrays(ends, pa.array(np.ones(num, np.uint8)))
    else:
        return pa.array(columns[field.name]).cast(field.type)


def _meta(number: int, mask_HW: np.ndarray) -> SliceMeta:
    return SliceMeta(
        case_id=f"amos_{number // 100:04d}",
        modality="CT",
        axis="axial",
        slice_index=number % 100,
        split="train",
        spacing_mm=(1.0, 1.0),
        affine=tuple(np.eye(4).ravel()),
        intensity_scale=512 / 255,
        intensity_offset=-256.0,
        label_set="amos",
        labels_present=tuple(int(i) for i in np.unique(mask_HW) if i),
        labelled=True,
        source_sha256="0" * 64,
    )


def _in_a_process(function: Any, *args: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _mib(which: str) -> int:
    """Memory of this process: VmHWM, its peak, or RssAnon, its own memory without the page cache."""
    with open("/proc/self/status", encoding="ascii") as status:
        values = dict(line.split(":", 1) for line in status)
    return int(values[which].split()[0]) // 1024


def _contenders(
    folder: Path, num: int, files: list[Path], elsewhere: Callable[..., Any]
) -> Iterator[tuple[str, Contender]]:
    raw = write_raw(folder, num)
    files.append(raw)
    usual = WebDatasetSettings(decoder="usual", batched_by_dataset=True, shared_collate=False, prefetch_factor=2)
    kinds = {
        "as usual": usual,
        "tuned": WebDatasetSettings(),
        "tuned, flips and crops": WebDatasetSettings(crop=224),
    }
    for codec, letter in (("png", "a"), ("npy", "b")):
        shards = write_pairs(folder, num, codec)
        files += shards
        for kind, settings in kinds.items():
            options = {"num_pairs": num if codec == "png" else 2 * num, "settings": settings}
            yield (
                f"({letter}) webdataset {codec}, {kind}",
                lambda shards=shards, codec=codec, options=options: elsewhere(webdataset_turn, shards, codec, options),
            )
    for store, codec in (("webdataset", "raw"), ("webdataset", "zstd"), ("zarr", "zstd"), ("webdataset", "png")):
        path = write_set(folder / f"{store}-{codec}-{num}", open_raw(raw), store, codec)
        files += [path / entry["file"] for entry in json.loads((path / "index.json").read_text())["shards"]]
        name = "zarr" if store == "zarr" else codec
        pairs = {"raw": 8 * num, "png": num}.get(codec, 2 * num)
        yield f"ours, {name}", ours(path, _PLAIN, pairs)
        if name == "raw":
            yield "ours, raw, flips and crops", ours(path, _AUGMENTED, 4 * num)
    for threads in (1, 2):
        yield (
            f"gather from memory, {threads} thread{'s' * (threads > 1)}",
            gather_contender(raw, num_pairs=8 * num, num_threads=threads),
        )


def measure_limit(args: argparse.Namespace, raw: Path, path: Path, rounds: int) -> None:
    """Our loader and the gather in turns."""
    num, contenders = 4 * args.pairs, {}
    for how, clock in (("", time.perf_counter), (", CPU time", time.process_time)):
        contenders[f"ours, raw{how}"] = ours(path, _PLAIN, num, clock)
        contenders[f"ours, raw, flips and crops{how}"] = ours(path, _AUGMENTED, num, clock)
        contenders[f"preadv and CRC-32C, 2 threads{how}"] = gather_contender(
            raw, num_pairs=num, num_threads=2, clock=clock, reads=True
        )
        contenders[f"gather, 2 threads{how}"] = gather_contender(raw, num_pairs=num, num_threads=2, clock=clock)
    rates = measure(contenders, rounds)
    ratios = [
        compare(rates, f"ours, raw{kind}{how}", f"gather, 2 threads{how}", 0.4)
        for how in ("", ", CPU time")
        for kind in ("", ", flips and crops")
    ]
    bound = "preadv and CRC-32C, 2 threads, CPU time"
    ratios += [compare(rates, bound, "gather, 2 threads, CPU time"), compare(rates, "ours, raw, CPU time", bound)]
    report(args, rates, ratios, unit="pairs a second")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder that keeps the test data (4 GB); a temporary one if left out")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--limit", action="store_true", help="our loader on raw pairs beside the gather alone")
    parser.add_argument("--against", metavar="COMMIT", help="compare with the code of this commit")
    args = parser.parse_args()
    rounds, num = (1, 500) if args.quick else (args.rounds, args.pairs)
    folder = args.data or Path(tempfile.mkdtemp(prefix="bench-loader-"))
    files: list[Path] = []
    try:
        if args.limit or args.against is not None:
            raw = write_raw(folder, num)
            path = write_set(folder / f"webdataset-raw-{num}", open_raw(raw), "webdataset", "raw")
            into_page_cache([raw, *(path / "shards").iterdir()])
            if args.limit:
                return measure_limit(args, raw, path, rounds)
            return against(args, ("load", path, 16 * num), unit="pairs a CPU second")
        print(f"writing {num} pairs in every form to {folder}", file=sys.stderr)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            contenders = dict(_contenders(folder, num, files, lambda *task: apart.submit(*task).result()))
            into_page_cache(files)
            rates = measure(contenders, rounds)
        ratios = [
            compare(rates, "ours, raw", "(a) webdataset png, as usual", 8),
            compare(rates, "ours, raw", "(a) webdataset png, tuned"),
            compare(rates, "ours, raw", "(b) webdataset npy, as usual", 3),
            compare(rates, "ours, raw", "(b) webdataset npy, tuned"),
            compare(rates, "ours, raw, flips and crops", "(a) webdataset png, tuned, flips and crops", 8),
            compare(rates, "ours, raw, flips and crops", "(b) webdataset npy, tuned, flips and crops", 3),
            compare(rates, "ours, png", "(a) webdataset png, tuned"),
            compare(rates, "ours, raw", "gather from memory, 2 threads", 0.4),
        ]
        set_of = folder / f"webdataset-raw-{num}"
        notes: dict[str, Any] = {"MiB after each of 10 epochs": memory_over_epochs(set_of)}
        few = open_raw(files[0])[: 50 if args.quick else 1000]
        many = write_set(folder / f"{len(few)}-shards", few, "webdataset", "raw", 1)
        notes["first batch"] = first_batch_s(many)
        if not args.quick:
            notes["10 million slices"] = ten_million(folder / "ten-million")
        report(args, rates, ratios, unit="pairs a second", notes=notes)
    finally:
        if args.data is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
