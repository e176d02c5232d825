"""A row of docs/data.md's table each: a layout is recognised, prepared, trained on, sampled, exported, read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts_support import LAYOUTS, slices, volumes, write_amos, write_set
from sampling_support import make_here
from training_support import run_training

from data_shards.ingest.layouts.find import recognise
from data_shards.records import SliceRecord
from data_shards.store.shards import ShardSet
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.job import export_samples
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.training.config import TrainConfig

pytest.importorskip("SimpleITK")


def write_dicom(root: Path) -> dict[str, Any]:
    """Series with SEG in a tree; the splits are drawn by patient."""
    pytest.importorskip("highdicom")
    from dicom_support import write_dicom as write

    write(root)
    return {"split": (1.0, 0.0, 0.0)}


def write_pictures(root: Path) -> dict[str, Any]:
    """PNG of every axial plane in a window of HU, with a column for what pixels mean."""
    from PIL import Image

    names = ["spleen", "a", "b", "c", "d", "liver"]
    rows = [["image", "label", "modality", "patient", "split", "spacing_mm", "scale", "offset"]]
    for case, split, image, label in volumes():
        grey = np.clip((image + 256.0) / 2.0, 0, 255).round().astype(np.uint8)
        for k in range(grey.shape[2]):
            files = [f"{folder}/{case}-axial-{k:04d}.png" for folder in ("images", "masks")]
            for file, voxels in zip(files, (grey, label), strict=True):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                # Files of one plane are taken as seen from below: columns to the left, rows to the back.
                Image.fromarray(np.ascontiguousarray(voxels[::-1, ::-1, k].T)).save(root / file)
            rows.append([*files, "CT", case[:2], split, "4", "2", "-256"])
    (root / "manifest.csv").write_text("\n".join(map(",".join, rows)))
    table = root.with_suffix(".yaml")
    table.write_text(f"name: mine\nnames: {{{', '.join(f'{i}: {name}' for i, name in enumerate(names, 1))}}}\n")
    return {"labels": str(table), "axes": ("axial",)}


WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "amos": write_amos,
    **LAYOUTS,
    "dicom": write_dicom,
    "folder.png": write_pictures,
}
USUAL = ("nnunet", "totalsegmentator", "folder.png")


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.exhaustive) for n in WRITERS])
def test_a_layout_goes_in_and_comes_out(name: str, tmp_path: Path) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "Dataset701_Again"
    settings = WRITERS[name](data)
    found = recognise(data).layout.name
    assert settings.get("layout", found) == name.split(".")[0].replace("manifest", "folder")
    shards = write_set(data, tmp_path / "shards", **settings)
    losses = run_training(shards, run, num_images=16, checkpoint_every_images=16, log_every_images=8)
    assert np.isfinite(losses).all()
    plain: dict[str, Any] = {"num": None, "samples_per_mask": 1, "diverse_masks": 0, "cross_modality_masks": 0}
    plain["weights"] = TrainConfig().averages[0]
    make_here(run, shards, split="train", **plain)
    assert export_samples(run, out, ExportConfig(body_label=True)) == len(SampleStore.open(run / "samples"))
    _is_equal_again(run, shards, {one.meta.case_id: one for one in slices(out, split=(1.0, 0.0, 0.0))})
    if name == "folder.png":
        _pictures_come_in_again(run, shards, tmp_path)


def _pictures_come_in_again(run: Path, shards: Path, tmp_path: Path) -> None:
    """The export of PNG: grey values too, and a training on it."""
    out, again = tmp_path / "png", tmp_path / "again"
    export_samples(run, out, ExportConfig("png"))
    assert recognise(out).layout.name == "pictures"
    records = {one.meta.case_id: one for one in slices(out)}
    _is_equal_again(run, shards, records)
    store = SampleStore.open(run / "samples")
    for item in store.items.to_pylist():
        np.testing.assert_array_equal(records[_case(item)].image_HW, store.image[item["item_id"]])
    losses = run_training(write_set(out, again), tmp_path / "run2", num_images=16, checkpoint_every_images=16)
    assert np.isfinite(losses).all()


def _case(item: dict[str, Any]) -> str:
    return f"{item['case_id']}_ct_0-{item['axis']}-{item['slice_index']:04d}"


def _is_equal_again(run: Path, shards: Path, again: dict[str, SliceRecord]) -> None:
    store, names = SampleStore.open(run / "samples"), ShardSet.open(shards).label_table.names
    assert len(again) == len(store)
    body = names.index("body")
    for item in store.items.to_pylist():
        theirs, ours = np.asarray(store.mask[item["item_id"]]), again[_case(item)].mask_HW
        # The outline is found in the image anew, and this net has learnt nothing.
        np.testing.assert_array_equal(*(np.where(mask == body, 0, mask) for mask in (ours, theirs)))
