"""benchmarks/few_labels.py: that its arms are trainings that start, of equal images, on the labels that they claim."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.store.shards import ShardSet
from segdiff_dist.config import to_yaml
from segdiff_dist.denoising.task import find_problems
from segdiff_dist.experiment import load_experiment

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
few_labels: Any = importlib.import_module("few_labels")
rewritten: Any = importlib.import_module("support.rewritten_shards")


def test_arms_differ_in_conditioning_and_labels_alone(tmp_path: Path, shapes: Path) -> None:
    shards, images = ShardSet.open(shapes), {}
    args = Namespace(base_images=96, control_images=48, masks=4, seed=0, memorisation=True)
    for name in few_labels.ARMS:
        (tmp_path / "config.yaml").write_text(to_yaml(few_labels.settings_of(name, args, tmp_path)))
        experiment = load_experiment(tmp_path / "config.yaml", None)
        assert find_problems(shards, 32, experiment.denoiser, experiment.diffusion) == []
        assert experiment.denoiser.loader_problems(experiment.loader) == []
        images[name] = experiment.train.num_images
    regularised = dict.fromkeys(few_labels.REGULARISED, 144)
    assert images == {"base": 96, "controlnet": 48, "concat": 144, "concat-all": 144} | regularised


def test_the_labelled_part_has_few_training_patients_and_all_others(tmp_path: Path, shapes: Path) -> None:
    shards = ShardSet.open(shapes)
    rewritten.rewrite(shapes, tmp_path / "few", lambda whole: few_labels.labelled_part(whole, 1))
    few = ShardSet.open(tmp_path / "few")
    for modality in shards.modalities:
        rows = few.select(split="train", modalities=[modality])
        assert len(set(np.array(few.samples["case_id"].to_pylist())[rows])) == 1
    for split in ("val", "test"):
        assert len(few.select(split=split)) == len(shards.select(split=split))
    assert few.label_table == shards.label_table
