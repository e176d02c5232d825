"""The DALI loader against the shard set read directly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import flip_mask_bytes, write_shapes

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.mixing import make_order
from data_shards.feed.order import Sequential, Shuffled, rank_positions, sample_at, sequential_positions
from data_shards.records import MODALITIES, Batch
from data_shards.store.byte_ranges import Range
from data_shards.store.config import CacheConfig
from data_shards.store.shards import ShardSet


def take(
    shards: ShardSet, config: LoaderConfig, start: int, num: int, batch_size: int = 4, seed: int = 7, cold: bool = False
) -> list[Batch]:
    """`cold`: a range that is not in memory is read between batches, so that threads share some of them."""
    order = make_order(shards, shards.select(split="train"), config.mix, seed)
    positions = rank_positions(start, micro_batch_size=batch_size, num_micro_batches=1, rank=0, world_size=1)
    beyond = Range(0, 10**12, 1, [bytearray(1)])
    if cold:
        positions = (shards.read_ranges([beyond]) and position_B for position_B in positions)
    return list(islice(Loader(shards, order, positions, config, batch_size=batch_size, seed=seed), num))


def joined(batches: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


FORMS = [
    *({"codec": codec} for codec in ("raw", "zstd", "png", "jpeg2000")),
    {"store": "zarr"},
    *({"codec": codec, "bits": 16, "soft_edge": True} for codec in ("raw", "zstd", "png", "jpeg2000")),
    {"store": "zarr", "bits": 16, "soft_edge": True},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pixels_and_order_are_the_shards_own(tmp_path: Path, form: dict[str, Any]) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "set", slices=3, **form))
    rows = shards.select(split="train")
    batches = take(shards, LoaderConfig(), 5, 10)
    position = joined(batches, "position_B").numpy()
    assert position.tolist() == list(range(5, 45))
    assert batches[0].image_BHW.dtype == (torch.uint16 if form.get("bits") == 16 else torch.uint8)
    for number, p in enumerate(position):
        batch, i = batches[number // 4], number % 4
        record = shards.read(int(rows[sample_at(np.array([p]), len(rows), 7)[0]]))
        assert np.array_equal(batch.image_BHW[i].numpy(), record.image_HW)
        assert np.array_equal(batch.mask_BHW[i].numpy(), record.mask_HW)
        assert MODALITIES[batch.modality_B[i]] == record.meta.modality
        if record.edge_2HW is not None:
            assert np.array_equal(batch.edge_B2HW[i].numpy(), record.edge_2HW)


def test_several_sets_and_a_set_behind_a_url_give_the_same_batches(tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    folders = [write_shapes(tmp_path / name, num_patients=n, slices=3) for name, n in (("a", 2), ("b", 3))]
    local = take(ShardSet.open(folders), LoaderConfig(), 0, 20)
    memory.put(str(folders[1]), f"/{tmp_path.name}", recursive=True)
    try:
        roots = [folders[0], f"memory://{tmp_path.name}"]
        remote = take(ShardSet.open(roots, cache=CacheConfig(tmp_path / "cache", 20_000)), LoaderConfig(), 0, 20)
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)
    assert torch.equal(joined(local, "image_BHW"), joined(remote, "image_BHW"))
    assert torch.equal(joined(local, "mask_BHW"), joined(remote, "mask_BHW"))


def test_sequential_reading_visits_each_row_once(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = shards.select(split="val")
    loader = Loader(shards, Sequential(rows), sequential_positions(len(rows), 7), LoaderConfig(), batch_size=7, seed=0)
    masks = torch.cat([batch.mask_BHW for batch in loader])
    assert np.array_equal(masks.numpy(), np.stack([shards.read(int(r)).mask_HW for r in rows]))


def _damaged(out: Path, rows: list[int], **form: Any) -> ShardSet:
    """A set in which one byte of each of these rows' masks is flipped."""
    return flip_mask_bytes(ShardSet.open(write_shapes(out, slices=3, **form)), rows)


@pytest.mark.parametrize("form", [{"codec": "raw"}, {"codec": "png"}, {"store": "zarr"}], ids=str)
def test_a_flipped_byte_stops_the_loader_with_shard_and_sample(tmp_path: Path, form: dict[str, Any]) -> None:
    shards = _damaged(tmp_path / "set", [4], **form)
    with pytest.raises(ValueError, match=rf"sample {shards.key(4)}: mask: its bytes are not those that were written"):
        take(shards, LoaderConfig(), 0, 20)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("form", [{"codec": "raw"}, {"codec": "jpeg2000"}, {"codec": "zstd"}], ids=str)
def test_corrupt_samples_are_skipped_and_counted_alike_on_all_ranks(tmp_path: Path, form: dict[str, Any]) -> None:
    shards = _damaged(tmp_path / "set", [4, 9], **form)
    bad = np.stack([shards.read_part(row, "image") for row in (4, 9)])
    order, config = Shuffled(shards.select(split="train"), 7), LoaderConfig(on_corrupt="skip")

    def run(batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[list[Batch], Loader]:
        positions = rank_positions(
            0, micro_batch_size=batch_size, num_micro_batches=1, rank=rank, world_size=world_size
        )
        loader = Loader(shards, order, positions, config, batch_size=batch_size, seed=7)
        return list(islice(loader, 48 // batch_size // world_size)), loader

    whole, loader = run(4)
    assert sorted(loader.skipped) == [4, 9]
    images = joined(whole, "image_BHW")
    assert len(images) == 48
    assert joined(whole, "position_B").tolist() == list(range(48))
    assert not any((image.numpy() == one).all() for image in images for one in bad)
    by_rank = torch.cat(
        [torch.cat([b.image_BHW for b in pair]) for pair in zip(run(4, 0, 2)[0], run(4, 1, 2)[0], strict=True)]
    )
    assert torch.equal(by_rank, images)

    rows = np.arange(12)
    loader = Loader(shards, Sequential(rows), sequential_positions(12, 5), config, batch_size=5, seed=0)
    left = torch.cat([batch.position_B for batch in loader])
    assert left.tolist() == [p for p in range(12) if p not in (4, 9)]


def test_in_a_mix_the_stand_in_is_of_the_same_group(tmp_path: Path) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "set"))
    order = make_order(shards, shards.select(split="train"), {"CT": 3, "MR": 1}, 5)
    position = np.arange(400)
    before, after = order.rows_at(position), order.stand_ins(position, 1)
    assert np.array_equal(shards.modality_N[before], shards.modality_N[after])
    assert (before != after).mean() > 0.8


def test_a_store_that_fails_is_no_damage_to_skip(tmp_path: Path) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "set", slices=3))
    shards.read_ranges = lambda ranges, then: [OSError(5, "the store does not answer")] * len(ranges)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the store does not answer"):
        take(shards, LoaderConfig(on_corrupt="skip"), 0, 1)


def test_a_shard_cut_short_under_a_running_loader_is_an_error_and_no_crash(tmp_path: Path) -> None:
    out = write_shapes(tmp_path / "set", slices=3)
    shards = ShardSet.open(out)
    order = Shuffled(shards.select(split="train"), 0)
    positions = rank_positions(0, micro_batch_size=4, num_micro_batches=1, rank=0, world_size=1)
    batches = iter(Loader(shards, order, positions, LoaderConfig(prefetch_batches=1), batch_size=4, seed=0))
    next(batches)
    for tar in (out / "shards").glob("train-*.tar"):
        with tar.open("r+b") as stream:
            stream.truncate(4096)
    with pytest.raises(ValueError, match=r"train-00000\d\.tar: sample .*the file ends"):
        list(islice(batches, 50))


def test_batches_are_made_ahead_in_a_thread_that_ends_with_the_iteration(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    asked: list[str] = []

    def positions() -> Iterator[np.ndarray]:
        for start in range(0, 400, 4):
            asked.append(threading.current_thread().name)
            yield np.arange(start, start + 4)

    order = Shuffled(shards.select(split="train"), 0)
    batches = iter(Loader(shards, order, positions(), LoaderConfig(prefetch_batches=3), batch_size=4, seed=0))
    first = next(batches)
    deadline = time.monotonic() + 20
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 5 <= len(asked) <= 9  # one given, three waiting, and what is read ahead of them
    assert set(asked) == {"loader"}
    kept = first.image_BHW.clone()
    list(islice(batches, 10))
    assert torch.equal(first.image_BHW, kept)  # a batch stays its owner's
    batches.close()
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_augmented_pixels_depend_on_position_alone(shapes: Path) -> None:
    """Resumed in the middle, and with other batch sizes, the same positions show the same pixels."""
    shards = ShardSet.open(shapes)
    config = LoaderConfig(flip=True, rotate_degrees=20, zoom=0.2, crop="random", crop_size=24, jitter_mr=0.2)
    whole, resumed = take(shards, config, 0, 8, batch_size=4), take(shards, config, 16, 2, batch_size=8)
    for name in ("image_BHW", "mask_BHW"):
        assert torch.equal(joined(whole, name)[16:], joined(resumed, name))
        assert joined(whole, name).shape[1:] == (24, 24)
    plain = joined(take(shards, LoaderConfig(crop_size=24), 0, 8), "image_BHW")
    assert (joined(whole, "image_BHW") != plain).float().mean() > 0.3


def test_image_and_mask_move_together(shapes: Path) -> None:
    """After rotation, zoom and flip the spleen's pixels are still the bright ones of CT."""
    shards = ShardSet.open(shapes)
    batches = take(shards, LoaderConfig(modalities=("CT",), flip=True, rotate_degrees=30, zoom=0.2), 0, 6)
    image, mask = joined(batches, "image_BHW").float(), joined(batches, "mask_BHW")
    is_ct = joined(batches, "modality_B") == 0
    image, mask = image[is_ct], mask[is_ct]
    assert image[mask == 1].mean() > 180
    assert image[mask == 0].mean() < 20
    assert set(mask.unique().tolist()) <= {0, 1, 6, 16}  # nearest neighbour invents no label


def test_jitter_changes_mr_alone_and_its_image_alone(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    plain, jittered = take(shards, LoaderConfig(), 0, 8), take(shards, LoaderConfig(jitter_mr=0.3), 0, 8)
    changed = (joined(plain, "image_BHW") != joined(jittered, "image_BHW")).flatten(1).any(1)
    is_mr = joined(plain, "modality_B") == MODALITIES.index("MR")
    assert torch.equal(changed, is_mr)
    assert torch.equal(joined(plain, "mask_BHW"), joined(jittered, "mask_BHW"))
    black = joined(plain, "image_BHW") == 0
    assert (joined(jittered, "image_BHW")[black] == 0).all()
    # A contrast and a gamma: brighter stays brighter.
    before, after = (joined(b, "image_BHW")[is_mr][0].flatten() for b in (plain, jittered))
    by_grey = after[before.argsort(stable=True)].int()
    assert (by_grey.cummax(0).values - by_grey).max() == 0


@pytest.mark.parametrize("form", [{"bits": 16, "soft_edge": True}], ids=str)
def test_deep_images_and_edges_are_augmented_with_their_masks(tmp_path: Path, form: dict[str, Any]) -> None:
    deep = ShardSet.open(write_shapes(tmp_path / "deep", **form))
    plain = ShardSet.open(write_shapes(tmp_path / "plain"))
    config = LoaderConfig(flip=True, rotate_degrees=20, zoom=0.2, crop="random", crop_size=24, jitter_mr=0.1)
    mine, theirs = take(deep, config, 0, 8), take(plain, config, 0, 8)
    assert torch.equal(joined(mine, "mask_BHW"), joined(theirs, "mask_BHW"))
    grey = joined(mine, "image_BHW").to(torch.float32) / 257
    assert (grey - joined(theirs, "image_BHW").float()).abs().max() <= 1.5  # two roundings, one before gamma
    # write_shapes makes [1] of an edge the mask's complement, so that it shows whether it moved along.
    share, mask = joined(mine, "edge_B2HW")[:, 1].int(), joined(mine, "mask_BHW").int()
    inside = share != 0  # outside of a turned slice there is nothing
    assert torch.equal(share[inside], (255 - mask)[inside])
    assert inside.float().mean() > 0.8


def test_weights_set_how_often_a_modality_comes(shapes: Path) -> None:
    modality = joined(take(ShardSet.open(shapes), LoaderConfig(mix={"CT": 3, "MR": 1}), 0, 25), "modality_B")
    assert modality.bincount().tolist() == [75, 25]


def test_flip_mirrors_about_half(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    plain, flipped = (joined(take(shards, LoaderConfig(flip=f), 0, 16), "mask_BHW") for f in (False, True))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 16 <= sum(mirrored) <= 48
    for a, b, changed in zip(plain, flipped, mirrored, strict=True):
        assert torch.equal(a.flip(1), b) if changed else torch.equal(a, b)


@pytest.mark.parametrize("size", [20, 24, 32])
def test_slices_are_cut_and_mirrored_as_dali_does_it(tmp_path: Path, size: int) -> None:
    """DALI does it with pictures; of raw slices the windows are copied, in one thread or shared by three."""
    config = LoaderConfig(flip=True, crop="random", crop_size=size)
    form = {"bits": 16, "soft_edge": True, "slices": 3}
    by_dali = take(ShardSet.open(write_shapes(tmp_path / "png", codec="png", **form)), config, 3, 6)
    raw = ShardSet.open(write_shapes(tmp_path / "raw", codec="raw", **form))
    for cold in (False, True):
        copied = take(raw, replace(config, num_threads=3), 3, 6, cold=cold)
        for name in ("image_BHW", "mask_BHW", "edge_B2HW"):
            assert torch.equal(joined(copied, name), joined(by_dali, name)), name


def test_centre_crop_is_the_centre(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    whole, cropped = (take(shards, LoaderConfig(crop_size=size), 0, 1)[0] for size in (None, 20))
    assert torch.equal(whole.image_BHW[:, 6:26, 6:26], cropped.image_BHW)
    record = shards.read(0)
    assert np.array_equal(record.cropped(20).mask_HW, record.mask_HW[6:26, 6:26])


def test_settings_out_of_range_are_named() -> None:
    config = LoaderConfig(modalities=("../PET",), axes=(), zoom=2.0, crop_size=1)
    assert {p.field for p in config.problems()} == {
        "loader.modalities",
        "loader.axes",
        "loader.zoom",
        "loader.crop_size",
    }
    assert LoaderConfig().problems() == []
