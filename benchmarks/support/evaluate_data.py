"""Synthetic triples for benchmarks/evaluate.py: a shard set of discs in an ellipse, and "generated" images, which are
the real ones with noise. The cost of an evaluation depends on their number, size and organs, not on their content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.labels import AMOS
from data_shards.records import AXES, MODALITIES, SliceMeta, SliceRecord
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet

_PATIENTS, _SLICES = 40, 6  # of each modality
_REGION = 64


def write_shards(out: Path, size: int) -> ShardSet:
    """40 patients of each modality, 6 slices each, eight organs a slice; kept where it is there already."""
    if not (out / "index.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        writer = ShardWriter(out, set_format("webdataset", "zstd", 100, size=size, bits=8, soft_edge=False))
        for modality in MODALITIES:
            for patient in range(_PATIENTS):
                for index in range(_SLICES):
                    writer.write(_slice(modality, patient, index, size))
        about = {"label_table": {"name": AMOS.name, "names": AMOS.names}, "preprocessing": {"size": size, "bits": 8}}
        writer.finish(about)
    return ShardSet.open(out)


def write_segmenter(weights: Path) -> None:
    """The default auxiliary U-Net, untrained: as fast as a trained one."""
    import torch

    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    config = SegmenterConfig()
    torch.manual_seed(0)
    save_segmenter(weights, SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)


def write_samples(run: Path, shards: ShardSet, num: int) -> None:
    """`num` triples, going round the shard set's slices; kept where they are there already."""
    import pyarrow as pa

    from segdiff_dist.sampling.store import SampleStore

    table = shards.samples.select(["key", "case_id", "modality", "axis", "slice_index"]).to_pylist()
    items = [_item(i, i % len(table), table[i % len(table)]) for i in range(num)]
    job = {"shards": str(shards.root), "shards_digest": shards.digest, "weights_digest": "", "region_size": _REGION}
    store = SampleStore.create(run / "samples", job, pa.Table.from_pylist(items), shards.size)
    for region in store.missing_regions():
        rng = np.random.default_rng(region)
        records = [shards.read(items[i]["row"]) for i in store.region(region)]
        noise = rng.integers(-20, 21, (len(records), shards.size, shards.size))
        images = (np.stack([record.image_HW for record in records]) + noise).clip(0, 255).astype(np.uint8)
        store.write_region(region, images, np.stack([record.mask_HW for record in records]))


def forget_evaluation(run: Path) -> None:
    """Remove the results of an earlier turn."""
    shutil.rmtree(run / "evaluation", ignore_errors=True)


def _item(item_id: int, row: int, source: dict[str, Any]) -> dict[str, Any]:
    plain = {name: source[name] for name in ("key", "case_id", "axis", "slice_index")}
    modality = source["modality"]
    return {"item_id": item_id, "row": row, **plain} | {
        "source_modality": modality,
        "target_modality": modality,
        "seed_index": 0,
    }


def _slice(modality: str, patient: int, index: int, size: int) -> SliceRecord:
    rng = np.random.default_rng([patient, index, MODALITIES.index(modality)])
    row, column = np.mgrid[0:size, 0:size] / size
    mask = np.zeros((size, size), np.uint8)
    mask[(row - 0.5) ** 2 / 0.16 + (column - 0.5) ** 2 / 0.2 < 1] = AMOS.body_id or 0
    for organ in rng.choice(AMOS.organ_ids, 8, replace=False):
        centre, radius = rng.uniform(0.28, 0.72, 2), rng.uniform(0.02, 0.1)
        mask[(row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2] = organ
    image = (mask.astype(int) * 13 + rng.integers(0, 24, mask.shape)).clip(0, 255).astype(np.uint8)
    case = f"amos_{patient + 1 + 500 * MODALITIES.index(modality):04d}"
    meta = SliceMeta(
        case, modality, AXES[index % len(AXES)], index, "test", (1.5, 1.5), tuple(np.eye(4).ravel()), 2.0, -256.0,
        AMOS.name, tuple(int(i) for i in np.unique(mask) if i), True, "0" * 64,
    )  # fmt: skip
    return SliceRecord(image, mask, meta)
