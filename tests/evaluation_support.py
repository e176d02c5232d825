"""What the tests of evaluation share: random images, a run evaluated in this process, and a reader of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.labels import AMOS, LabelTable
from data_shards.store.shards import ShardSet

CHANNELS = (8, 8, 8)
# Each worker takes a chunk of 64 items: with this many masks there are two chunks and something to merge.
NUM_MASKS = 24


def random_images(seed: int, shape: tuple[int, ...] = (3, 48, 40)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, shape[-1])[None, None, :] + np.linspace(0, 30, shape[-2])[None, :, None]
    return (ramp + rng.normal(0, 12, shape)).clip(0, 255).astype(np.uint8)


def items_of(shards: ShardSet, rows: list[int], seeds: int = 1, across: int = 0) -> list[dict[str, Any]]:
    """Items of these masks in their own modality, `seeds` images each; of the first `across` one in the other."""
    wanted = [(row, shards.meta(row).modality, seed) for row in rows for seed in range(seeds)]
    wanted += [(row, "MR" if shards.meta(row).modality == "CT" else "CT", 0) for row in rows[:across]]
    return [
        {
            "item_id": i,
            "row": row,
            "key": shards.meta(row).key,
            "case_id": shards.meta(row).case_id,
            "source_modality": shards.meta(row).modality,
            "target_modality": target,
            "axis": shards.meta(row).axis,
            "slice_index": shards.meta(row).slice_index,
            "seed_index": seed,
        }
        for i, (row, target, seed) in enumerate(wanted)
    ]


def evaluate_here(
    run: Path,
    shapes: Path,
    *,
    noise: float = 10.0,
    segmenter_seed: int = 0,
    rows: list[int] | None = None,
    feature_network: Path | None = None,
) -> Path:
    """An evaluated run without figures and report: real slices with noise as its samples, an untrained segmenter as
    its judge, and what is one in a worker done here. `rows`: the masks, by default those of the test split."""
    import torch
    import zarr

    from segdiff_dist.evaluation.measure import trust
    from segdiff_dist.evaluation.measure.provenance import not_available, provenance
    from segdiff_dist.evaluation.measure.rows import RowWriter, with_patients
    from segdiff_dist.evaluation.measure.subject import Subject
    from segdiff_dist.evaluation.measure.summary import Evaluated, spread_columns, summarise
    from segdiff_dist.evaluation.measure.worker import Chunk, Evaluator, Inputs
    from segdiff_dist.evaluation.metrics.sums import Interval
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    shards = ShardSet.open(shapes)
    items = items_of(shards, shards.select(split="test").tolist() if rows is None else rows, seeds=2, across=2)
    job = {"shards": str(shapes), "shards_digest": shards.digest, "weights_digest": "", "region_size": len(items)}
    store = SampleStore.create(run / "samples", job, pa.Table.from_pylist(items), shards.size)
    records = [shards.read(item["row"]) for item in items]
    images = np.stack([record.image_uint8() for record in records])
    images = images + np.random.default_rng(0).normal(0, noise, images.shape)
    store.write_region(0, images.clip(0, 255).astype(np.uint8), np.stack([record.mask_HW for record in records]))
    store = SampleStore.open(run / "samples")

    torch.manual_seed(segmenter_seed)
    config = SegmenterConfig(channels=CHANNELS)
    save_segmenter(run / "segmenter", SegmenterNet(config, AMOS.num_classes).state_dict(), config, AMOS)
    folder = run / "evaluation"
    group = zarr.create_group(folder / "predictions.zarr")
    for side in ("real", "gen"):
        group.create_array(side, shape=images.shape, chunks=(16, *images.shape[1:]), dtype="uint8", fill_value=0)
    inputs = Inputs(
        samples=run / "samples",
        shards=str(shapes),
        segmenter=run / "segmenter",
        predictions=folder / "predictions.zarr",
        fid_weights=None,
        lpips_weights=None,
        radiomics_items=frozenset(),
        surface_dice=True,
        batch_size=64,
        device="cpu",
        feature_network=None if feature_network is None else str(feature_network),
    )
    evaluator = Evaluator(inputs)
    spread = {task.ids[0]: task.run(evaluator) for task in trust.images_of_masks(store.items)}
    measured = Evaluated.empty(shards.label_table, store.items, spread, patient_of=shards.patient_of)
    result = evaluator.run(Chunk(0, len(items)))
    measured.add(0, len(items), result)
    with RowWriter(folder / "samples.parquet") as writer:
        writer.write(
            with_patients(store.items, shards.patient_of), result.columns | spread_columns(spread, 0, len(items))
        )
    summary = summarise(measured, Interval(resamples=20, seed=0))
    summary["trust"] = {"leakage": trust.leakage(store.items, shards)}
    summary["not_available"] = not_available(summary, inputs, Subject(store, shards), measured.distributions.failed)
    summary["provenance"] = provenance(inputs, Subject(store, shards)) | {
        "segmenter_sha256": evaluator.segmenter.weights_sha256,
        "distribution_images": 5000,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return run


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags are closed in order."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self._cells: list[list[str]] = []
        self.best: list[tuple[int, int]] = []
        """Where in `rows` a value is marked as the best."""
        self.pieces: list[str] = []
        self.feed(html)

    @property
    def text(self) -> str:
        """All text, with single spaces."""
        return " ".join("".join(self.pieces).split())

    @property
    def rows(self) -> list[list[str]]:
        """The cells of every table's rows, each as text."""
        return [[" ".join(cell.split()) for cell in row] for row in self._cells]

    def row(self, label: str) -> list[str]:
        """The first row that begins with `label`."""
        return next(row for row in self.rows if row[0].startswith(label))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attributes[name] or "" for name in ("src", "href") if name in attributes]
        if "id" in attributes:
            self.ids.add(attributes["id"] or "")
        if tag == "tr":
            self._cells.append([])
        if tag in ("td", "th"):
            if attributes.get("class") == "best":
                self.best.append((len(self._cells) - 1, len(self._cells[-1])))
            self._cells[-1].append("")
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)
        if {"td", "th"} & set(self.open):
            self._cells[-1][-1] += data


def is_self_contained(page: Page) -> bool:
    """Whether the page asks nothing of anybody: addresses lead inside it, or hold a picture."""
    inside = all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    led = all(a[1:] in page.ids for a in page.addresses if a.startswith("#"))
    return inside and led and not page.open and not {"script", "link"} & set(page.tags) and "@import" not in page.html


def write_segmenter(weights: Path, table: LabelTable = AMOS, num_levels: int = 3) -> None:
    """An untrained segmenter: its labels mean nothing, but are the same every time."""
    import torch

    from segdiff_dist.segmentation.config import SegmenterConfig
    from segdiff_dist.segmentation.network import SegmenterNet
    from segdiff_dist.segmentation.segmenter import save_segmenter

    config = SegmenterConfig(channels=(8,) * num_levels)
    torch.manual_seed(0)
    save_segmenter(weights, SegmenterNet(config, table.num_classes).state_dict(), config, table)


def write_samples(run: Path, shapes: Path, split: str = "test", noise: float = 15, across_only: bool = False) -> None:
    """Headline, diversity (three a mask) and cross-modality items; the "generated" images are noisy real ones."""
    from segdiff_dist.sampling.store import SampleStore

    shards = ShardSet.open(shapes)
    items: list[dict[str, Any]] = []
    for row in shards.select(split=split)[:NUM_MASKS]:
        meta = shards.meta(int(row))
        other = "MR" if meta.modality == "CT" else "CT"
        for target, seed_index in ((meta.modality, 0), (meta.modality, 1), (meta.modality, 2), (other, 0)):
            if across_only and target != other:
                continue
            items.append(
                {
                    "item_id": len(items),
                    "row": int(row),
                    "key": meta.key,
                    "case_id": meta.case_id,
                    "source_modality": meta.modality,
                    "target_modality": target,
                    "axis": meta.axis,
                    "slice_index": meta.slice_index,
                    "seed_index": seed_index,
                }
            )
    job = {"shards": str(shapes), "shards_digest": shards.digest, "weights_digest": "0" * 64, "region_size": 10}
    store = SampleStore.create(run / "samples", job, pa.Table.from_pylist(items), shards.size)
    for region in store.missing_regions():
        records = [shards.read(items[i]["row"]) for i in store.region(region)]
        noises = [np.random.default_rng(i).normal(0, noise, (shards.size, shards.size)) for i in store.region(region)]
        images = np.stack([(r.image_HW + n).clip(0, 255) for r, n in zip(records, noises, strict=True)])
        store.write_region(region, images.astype(np.uint8), np.stack([r.mask_HW for r in records]))
