"""The DALI loader against the shard set read directly."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import write_shapes

from data_shards.loader import Loader, LoaderConfig
from data_shards.order import rank_positions, sample_at, sequential_positions
from data_shards.records import MODALITIES, Batch
from data_shards.shards import ShardSet


def take(
    shards: ShardSet, config: LoaderConfig, start: int, num: int, batch_size: int = 4, seed: int = 7
) -> list[Batch]:
    rows = shards.select(split="train")
    positions = rank_positions(start, micro_batch_size=batch_size, num_micro_batches=1, rank=0, world_size=1)
    return list(islice(Loader(shards, rows, positions, config, batch_size=batch_size, seed=seed), num))


def joined(batches: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_pixels_and_order_are_the_shards_own(tmp_path: Path, codec: str) -> None:
    shards = ShardSet.open(write_shapes(tmp_path / "set", codec=codec, slices=3))
    rows = shards.select(split="train")
    batches = take(shards, LoaderConfig(), 5, 10)
    position = joined(batches, "position_B").numpy()
    assert position.tolist() == list(range(5, 45))
    for p, image, mask, modality in zip(
        position, joined(batches, "image_BHW"), joined(batches, "mask_BHW"), joined(batches, "modality_B"), strict=True
    ):
        record = shards.read(int(rows[sample_at(np.array([p]), len(rows), 7)[0]]))
        assert np.array_equal(image.numpy(), record.image_HW)
        assert np.array_equal(mask.numpy(), record.mask_HW)
        assert MODALITIES[modality] == record.meta.modality


def test_sequential_reading_visits_each_row_once(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rows = shards.select(split="val")
    loader = Loader(
        shards, rows, sequential_positions(len(rows), 7), LoaderConfig(), batch_size=7, seed=0, shuffle=False
    )
    masks = torch.cat([batch.mask_BHW for batch in loader])
    assert np.array_equal(masks.numpy(), np.stack([shards.read(int(r)).mask_HW for r in rows]))


def test_augmented_pixels_depend_on_position_alone(shapes: Path) -> None:
    """Resumed in the middle, and with other batch sizes, the same positions show the same pixels."""
    shards = ShardSet.open(shapes)
    config = LoaderConfig(flip=True, rotate_degrees=20, zoom=0.2, crop="random", crop_size=24)
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


def test_flip_mirrors_about_half(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    plain, flipped = (joined(take(shards, LoaderConfig(flip=f), 0, 16), "mask_BHW") for f in (False, True))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 16 <= sum(mirrored) <= 48
    for a, b, changed in zip(plain, flipped, mirrored, strict=True):
        assert torch.equal(a.flip(1), b) if changed else torch.equal(a, b)


def test_centre_crop_is_the_centre(shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    whole, cropped = (take(shards, LoaderConfig(crop_size=size), 0, 1)[0] for size in (None, 20))
    assert torch.equal(whole.image_BHW[:, 6:26, 6:26], cropped.image_BHW)
    record = shards.read(0)
    assert np.array_equal(record.cropped(20).mask_HW, record.mask_HW[6:26, 6:26])


def test_settings_out_of_range_are_named() -> None:
    config = LoaderConfig(modalities=("PET",), axes=(), zoom=2.0, crop_size=1)
    assert {p.field for p in config.problems()} == {
        "loader.modalities",
        "loader.axes",
        "loader.zoom",
        "loader.crop_size",
    }
    assert LoaderConfig().problems() == []
