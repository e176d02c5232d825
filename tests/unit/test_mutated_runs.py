"""Run folders of strangers: whatever their files say, readers give what was written, or InputProblems."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from evaluation_support import evaluate_here
from mutations_support import changed_bytes, changed_json
from tests_support import write_shapes

from data_shards.problems import InputProblems
from data_shards.store.codecs import crc32c
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.measure.result_files import drawing, read_downstream, read_figures, read_rows, read_summary
from segdiff_dist.evaluation.report.comparison import open_runs
from segdiff_dist.evaluation.report.page import write_report
from segdiff_dist.evaluation.report.pictures import Pictures
from segdiff_dist.export.samples import FinishedSamples
from segdiff_dist.sampling.mask_source import MaskArray
from segdiff_dist.sampling.store import SampleStore

DOWNSTREAM = {
    "arms": [
        {
            "name": "real_100",
            "label": "all",
            "num_real_patients": 2,
            "num_real_slices": 8,
            "num_generated": 0,
            "dice": {"value": 0.5, "ci95": [0.4, 0.6], "n": 8},
            "by_modality": {"CT": {"value": 0.5, "ci95": None, "n": 8}},
        }
    ],
    "settings": {"weights_digest": "ab"},
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    shapes = write_shapes(root / "set", num_patients=2, slices=2)
    rows = ShardSet.open(shapes).select().tolist()[:2]
    return evaluate_here(root / "run", shapes, rows=rows)


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def attempts(file: Path, num: int, seed: int) -> Iterator[None]:
    """Changes a file `num` times, then puts it back: its bytes or, of JSON, its structure."""
    rng, good = random.Random(seed), file.read_bytes()
    for number in range(num):
        is_json = file.suffix == ".json" or file.parent.name == "done"
        as_json = is_json and number % 3
        file.write_bytes(changed_json(json.loads(good), rng) if as_json else changed_bytes(good, rng))
        yield
    file.write_bytes(good)


def look_at(store: SampleStore) -> None:
    """What every user of a store does with it."""
    assert FinishedSamples.of(store, None).label_table.num_classes
    store.missing()
    list(store.damaged())
    for index in store.done_regions():
        store.region(index)
        store.num_bytes(index)
        assert isinstance(store.mark(index).get("seconds", 0.0), int | float)


@pytest.mark.parametrize(
    ("name", "num"),
    [
        ("job.json", 150),
        ("layout.json", 150),
        ("items.parquet", 300),
        ("done/000000", 40),
        ("images.zarr/zarr.json", 60),
        ("images.zarr/image/zarr.json", 200),
    ],
)
def test_sample_stores(run: Path, name: str, num: int) -> None:
    samples = run / "samples"
    layout = json.loads((samples / "layout.json").read_text())
    for _ in attempts(samples / name, num, seed=1):
        if name in layout:  # as a stranger would leave it
            forged = layout | {name: crc32c((samples / name).read_bytes())}
            (samples / "layout.json").write_text(json.dumps(forged))
        with suppress(InputProblems):
            look_at(SampleStore.open(samples))


def test_masks_of_a_job(run: Path) -> None:
    store, folder = SampleStore.open(run / "samples"), run / "masks.zarr"
    masks_MHW = np.zeros((2, 8, 8), np.uint8)
    zarr.create_array(folder, data=masks_MHW, chunks=(1, 8, 8), shards=(2, 8, 8), compressors=zarr.codecs.ZstdCodec())
    table = ShardSet.open(store.job["shards"]).label_table
    assert MaskArray.open(folder, table, store.items).mask_MHW.shape == (2, 8, 8)
    for _ in attempts(folder / "zarr.json", 150, seed=2):
        with suppress(InputProblems):
            MaskArray.open(folder, table, store.items)


def test_a_chunk_that_unpacks_to_more_than_its_image_is_refused(run: Path) -> None:
    from numcodecs.zstd import Zstd

    store = SampleStore.open(run / "samples")
    size = store.image.shape[1]
    zarr.create_array(
        run / "bomb.zarr",
        data=np.zeros((1, size, size), np.uint8),
        chunks=(1, size, size),
        compressors=zarr.codecs.ZstdCodec(),
        config={"write_empty_chunks": True},
    )
    (run / "bomb.zarr/c/0/0/0").write_bytes(Zstd().encode(bytes(64 * 1024**2)))
    with pytest.raises(ValueError, match="a zstd frame of 67,108,864 bytes or more"):
        zarr.open_array(run / "bomb.zarr", mode="r")[0]


def read_all(run: Path) -> None:
    read_summary(run)
    read_downstream(run)
    read_figures(run)
    read_rows(run, ["row", "target_modality", "headline", "case_id", "dice_mask_gen"])
    open_runs([run])


@pytest.mark.parametrize(
    ("name", "num", "read"),
    [
        ("evaluation/summary.json", 80, read_all),
        ("evaluation/samples.parquet", 80, read_all),
        ("evaluation/predictions.zarr/zarr.json", 30, Pictures.open),
        ("evaluation/predictions.zarr/gen/zarr.json", 80, Pictures.open),
        ("evaluation/figures/index.json", 100, read_figures),
        ("downstream/summary.json", 100, read_downstream),
        ("config.yaml", 40, read_all),
    ],
)
def test_evaluations(run: Path, name: str, num: int, read: Callable[[Path], Any]) -> None:
    write_beside(run)
    read(run)
    for _ in attempts(run / name, num, seed=3):
        with suppress(InputProblems):
            read(run)


def test_pages_of_changed_numbers_are_drawn_or_refused(run: Path) -> None:
    write_beside(run)
    (run / "evaluation/figures/index.json").unlink()
    for name in ("evaluation/summary.json", "downstream/summary.json"):
        for _ in attempts(run / name, 40, seed=4):
            with suppress(InputProblems), drawing(run):
                write_report(run)


def write_beside(run: Path) -> None:
    """What else a run folder may hold."""
    figures = [{"file": "a.png", "title": "A", "caption": "a", "section": "images"}]
    for name, text in {
        "evaluation/figures/index.json": json.dumps(figures),
        "downstream/summary.json": json.dumps(DOWNSTREAM),
        "config.yaml": "train:\n  batch_size: 4\namos_root: data/amos\nloader: {mix: {CT: 1, MR: 1}}\n",
    }.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
