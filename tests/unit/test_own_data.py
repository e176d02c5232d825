"""A row of docs/data.md's table each: a layout is recognised, prepared, trained on, sampled, exported, read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts_support import LAYOUTS, slices, write_amos, write_set
from sampling_support import make_here
from training_support import run_training

from data_shards.ingest.layouts.find import recognise
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


WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {"amos": write_amos, **LAYOUTS, "dicom": write_dicom}
USUAL = ("nnunet", "totalsegmentator")


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
    store, names = SampleStore.open(run / "samples"), ShardSet.open(shards).label_table.names
    assert export_samples(run, out, ExportConfig(body_label=True)) == len(store)
    again = {one.meta.case_id: one for one in slices(out, split=(1.0, 0.0, 0.0))}
    assert len(again) == len(store)
    body = names.index("body")
    for item in store.items.to_pylist():
        case = f"{item['case_id']}_ct_0-{item['axis']}-{item['slice_index']:04d}"
        theirs, ours = np.asarray(store.mask[item["item_id"]]), again[case].mask_HW
        # The outline is found in the image anew, and this net has learnt nothing.
        np.testing.assert_array_equal(*(np.where(mask == body, 0, mask) for mask in (ours, theirs)))
