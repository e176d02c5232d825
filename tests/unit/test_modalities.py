"""Modalities beyond CT and MR: names of the set, in the shards, the nets, the samples and the exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from layouts_support import AFFINE, CONFIG, slices, volumes
from layouts_support import save as save_volume
from sampling_support import DIFFUSION, make_here

from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.mixing import make_order
from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.prepare import PrepareConfig, check, find_problems
from data_shards.ingest.volumes import UnreadableVolume, read_volume
from data_shards.modalities import GreyRule, grey_rule, in_order, is_modality, modalities_of, parse_rule
from data_shards.problems import InputProblems
from data_shards.store.shard_writer import ShardWriter
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.task import DenoiserTask, DiceTerm
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.job import export_samples
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.segmentation.segmenter import Segmenter, save_segmenter

CHANNELS = {"0": "FLAIR", "1": "T1w", "2": "CBCT", "3": "T2w"}
NET = DenoiserConfig(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_resolutions=(), attention_head_dim=8
)


def test_names_and_their_order() -> None:
    assert all(map(is_modality, ("CT", "T1-ce", "x")))
    assert not any(map(is_modality, ("T1 ce", "same", "axial", "1T", "T1_ce", "", "\u0422", 3, "x" * 25)))
    assert in_order(["T2", "flair", "MR", "ADC", "MR"]) == ("MR", "ADC", "flair", "T2")
    assert modalities_of(["MR"]) == modalities_of([]) == ("CT", "MR")
    assert modalities_of(["MR", "PET"]) == ("MR", "PET")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("hu", GreyRule("hu")),
        (" hu -500  1500 ", GreyRule("hu", (-500, 1500))),
        ("percentiles 0.5 99.5", GreyRule("percentiles", (0.5, 99.5))),
        ("values 0 10", GreyRule("values", (0, 10))),
        ("values", None),
        ("hu 1 0", None),
        ("percentiles 1 101", None),
        ("hu 1.2.3 4", None),
        ("HU", None),
    ],
)
def test_rules_for_values(text: str, rule: GreyRule | None) -> None:
    assert parse_rule(text) == rule
    assert grey_rule("PET", {"PET": text}) == (rule or GreyRule("percentiles"))
    assert grey_rule("CT", {"PET": text}) == GreyRule("hu")


def write_msd(root: Path, channels: dict[str, str] = CHANNELS) -> Path:
    """An MSD folder with files of several channels. The third has the values of the CT, the others are 0 and more."""
    entries = []
    for case, _, image, label in volumes():
        plain = image - image.min()
        stacked = np.stack([plain // 2, plain, image, plain // 3], axis=3)[..., : len(channels)]
        save_volume(root / f"imagesTr/{case}.nii.gz", stacked)
        save_volume(root / f"labelsTr/{case}.nii.gz", (label > 0).astype(np.uint8))
        entries.append({"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"})
    content = {"modality": channels, "labels": {"0": "background", "1": "tumour"}, "training": entries, "test": []}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_channels_of_one_file_are_read_one_by_one(tmp_path: Path) -> None:
    voxels = np.arange(5 * 4 * 3 * 2, dtype=np.int16).reshape(5, 4, 3, 2)
    for name, stored in (("fourth", voxels), ("fifth", voxels[:, :, :, None])):
        for ending in (".nii", ".nii.gz"):
            nib.save(nib.Nifti1Image(stored, AFFINE), tmp_path / f"{name}{ending}")
            for channel in (0, 1):
                volume = read_volume(tmp_path / f"{name}{ending}", channel=channel)
                np.testing.assert_array_equal(volume.voxels_IJK, voxels[..., channel])
    with pytest.raises(UnreadableVolume, match="the file has 2"):
        read_volume(tmp_path / "fourth.nii", channel=2)
    content = (tmp_path / "fourth.nii").read_bytes()
    (tmp_path / "fourth.nii").write_bytes(content[:-20])
    with pytest.raises(UnreadableVolume, match="truncated"):
        read_volume(tmp_path / "fourth.nii", channel=0)


def test_channels_must_be_chosen(tmp_path: Path) -> None:
    root = write_msd(tmp_path / "data")
    (found,) = find_problems(root, tmp_path / "set", CONFIG)
    assert "4 channels (0 FLAIR, 1 T1w, 2 CBCT, 3 T2w)" in found.value
    assert "--prepare.channels" in found.remedy
    (found,) = find_problems(root, tmp_path / "set", replace(CONFIG, channels=(0, 4)))
    assert (found.field, found.value) == ("channels", "4")
    (found,) = find_problems(root, tmp_path / "set", replace(CONFIG, channel=0, channels=(1,)))
    assert found.field == "channels"
    twice = write_msd(tmp_path / "twice", {"0": "T1", "1": "T1w"})
    (found,) = find_problems(twice, tmp_path / "set", replace(CONFIG, channels=(0, 1)))
    assert found.value == "several are T1"
    assert [one.meta.modality for one in slices(root, channel=3)][:1] == ["T2"]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of FLAIR, T2 and CBCT in HU, of an MSD folder."""
    root = write_msd(tmp_path_factory.mktemp("msd"))
    config = replace(CONFIG, channels=(0, 2, 3), intensities={"CBCT": "hu -500 500"}, slice_stride=2)
    preparation = check(root, root / "set", config)
    splits_of: dict[str, set[str]] = {}
    for case in preparation.cases:
        splits_of.setdefault(str(case.patient), set()).add(case.split)
    assert set(splits_of) == {"p1_1", "p1_2", "p2_1", "p3_1"}
    assert all(len(splits) == 1 for splits in splits_of.values())
    writer = ShardWriter(root / "set", config.format)
    for case in sorted(preparation.cases, key=lambda one: (("train", "val", "test").index(one.split), one.case_id)):
        for record in slices_of(case, config, None, [], preparation.survey.labelling):
            writer.write(record)
    table = preparation.survey.labelling.table
    header = preparation.header | {"label_table": {"name": table.name, "names": list(table.names)}}
    writer.finish(header)
    return root / "set"


def test_a_set_names_its_modalities(three: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(three)
    assert (shards.modalities, shards.in_hu) == (("CBCT", "FLAIR", "T2"), ("CBCT",))
    assert (shards.index["format_version"], shards.index["modalities"]) == (3, ["CBCT", "FLAIR", "T2"])
    assert shards.index["preprocessing"]["modalities"] == ["CBCT", "FLAIR", "T2"]
    meta = shards.meta(int(shards.select(modalities=["CBCT"])[0]))
    assert (meta.intensity_offset, meta.intensity_offset + 255 * meta.intensity_scale) == pytest.approx((-500, 500))
    other = json.loads((three / "index.json").read_text()) | {"modalities": ["CT", "T2"]}
    (tmp_path / "set").mkdir()
    for file in ("samples.arrow", "shards"):
        (tmp_path / "set" / file).symlink_to(three / file)
    (tmp_path / "set/index.json").write_text(json.dumps(other))
    with pytest.raises(InputProblems, match="modalities"):
        ShardSet.open(tmp_path / "set")


def test_sets_of_other_modalities_are_opened_as_one(three: Path, tmp_path: Path) -> None:
    """Codes are those of all names together, and each row keeps its name."""
    shards = ShardSet.open(three)
    writer = ShardWriter(tmp_path / "ct", CONFIG.format)
    for row in shards.select(modalities=["T2"], split="train")[:4]:
        record = shards.read(int(row))
        writer.write(replace(record, meta=replace(record.meta, modality="CT", case_id="other")))
    writer.finish({name: shards.index[name] for name in ("label_table", "preprocessing")})
    assert ShardSet.open(tmp_path / "ct").index["format_version"] == 2
    both = ShardSet.open([tmp_path / "ct", three])
    assert both.modalities == ("CT", "CBCT", "FLAIR", "T2")
    names = [both.modalities[code] for code in both.modality_N]
    assert names == ["CT"] * 4 + shards.samples["modality"].to_pylist()
    assert names == [both.meta(row).modality for row in range(len(both))]
    rows = both.select(split="train")
    order = make_order(both, rows, {"CT": 1, "T2": 1, "1:CBCT": 1, "FLAIR": 1}, seed=0)
    config = LoaderConfig(jitter_mr=0.5, prefetch_batches=0)
    (batch,) = Loader(both, order, [np.arange(8)], config, batch_size=8, seed=0)
    drawn = order.rows_at(np.arange(8))
    assert batch.modality_B.tolist() == both.modality_N[drawn].tolist()
    is_kept = [
        np.array_equal(image, both.read(int(row)).image_HW) for image, row in zip(batch.image_BHW, drawn, strict=True)
    ]
    assert is_kept == [both.modalities[both.modality_N[row]] in ("CT", "CBCT") for row in drawn]  # in HU: no jitter


def test_nets_samples_and_exports_follow_the_set(three: Path, tmp_path: Path) -> None:
    import torch

    shards, run = ShardSet.open(three), tmp_path / "run"
    rows = shards.select(split="train")
    task = DenoiserTask(shards, 32, NET, DIFFUSION, 0, run / "weights", torch.device("cpu"))
    (batch,) = Loader(
        shards,
        make_order(shards, rows, {}, seed=0),
        [np.arange(8)],
        LoaderConfig(prefetch_batches=0),
        batch_size=8,
        seed=0,
    )
    assert len(batch.modality_B.unique()) == 3
    loss, _ = task.loss(task.model, batch)
    loss.backward()
    classes = task.model.unet.class_embedding.weight
    assert len(classes) == 3 * 3 + 1
    assert (classes.grad.abs().sum(dim=1) > 0).sum() == len(task.conditions(batch).class_B.unique())
    task.export("ema", task.model.state_dict())
    assert json.loads((run / "weights/ema/segdiff.json").read_text())["modalities"] == ["CBCT", "FLAIR", "T2"]
    assert Denoiser.load(run / "weights/ema").modalities == shards.modalities

    with pytest.raises(InputProblems, match="the model knows CBCT, FLAIR, T2"):
        make_here(run, three, target_modality="MR")
    task.model.trained_on = ("FLAIR", "T2")
    task.export("part", task.model.state_dict())
    with pytest.raises(InputProblems, match="the model knows FLAIR, T2: choose"):
        make_here(run, three, weights="part", target_modality="CBCT")
    task.model.trained_on = ("FLAIR",)
    task.export("one", task.model.state_dict())
    alone = {"weights": "one", "masks": None, "diverse_masks": 0, "out": tmp_path / "one"}
    with pytest.warns(UserWarning, match="the model knows FLAIR alone, so none is made"):
        made = make_here(run, three, num=2, target_modality="FLAIR", cross_modality_masks=2, **alone)
    assert len(made) == 2
    with pytest.raises(InputProblems, match="the model knows FLAIR alone: give `same`"):
        make_here(run, three, target_modality="other", **alone)
    store = make_here(run, three, num=6, diverse_masks=0, cross_modality_masks=6)
    across = [item for item in store.items.to_pylist() if item["source_modality"] != item["target_modality"]]
    assert {item["target_modality"] for item in across} == {"CBCT", "FLAIR", "T2"}
    export_samples(run, tmp_path / "out", ExportConfig(format="shards"))
    assert ShardSet.open(tmp_path / "out").modalities == shards.modalities
    root = tmp_path / "Dataset700_T2"
    export_samples(run, root, ExportConfig(modality="T2"))
    again = check(root, tmp_path / "again", CONFIG)
    assert {case.modality for case in again.cases} == {"T2"}
    patients = {case.patient for case in again.cases}
    assert patients <= {"p1_1", "p1_2", "p2_1", "p3_1"}, "channels of a case are of one patient"


def test_a_segmenter_knows_its_modalities(tmp_path: Path) -> None:
    import torch

    from data_shards.labels import AMOS

    config, names = SegmenterConfig(channels=(8, 16)), ("MR", "PET", "T2")
    net = SegmenterNet(config, AMOS.num_classes, len(names))
    save_segmenter(tmp_path, net.state_dict(), config, AMOS, names)
    segmenter = Segmenter.load(tmp_path)
    assert segmenter.modalities == names
    assert not list(segmenter.problems(AMOS, ["T2", "MR"], None))
    (found,) = segmenter.problems(AMOS, ["CT", "T2"], None)
    assert "it knows MR, PET, T2" in found.value
    assert segmenter.predict(torch.zeros(1, 16, 16, dtype=torch.uint8), torch.tensor([2])).shape == (1, 16, 16)
    with pytest.raises(InputProblems, match="modalities"):
        DiceTerm(tmp_path, AMOS, torch.device("cpu"))


def test_images_without_labels_get_masks_of_a_tool(tmp_path: Path) -> None:
    """Whatever the layout: the label set says where masks come from."""
    for case, _, image, label in volumes():
        save_volume(tmp_path / f"data/images/{case}.nii.gz", image)
        save_volume(tmp_path / f"masks/{case}.nii.gz", np.where(label == 6, 5, label).astype(np.uint8))
    settings = {**vars(CONFIG), "modality": "CT", "layout": "folder"}
    found = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**settings))
    assert "label" in {one.field for one in found}
    config = PrepareConfig(**{**settings, "label_set": "wholebody"})
    preparation = check(tmp_path / "data", tmp_path / "set", config, tmp_path / "masks")
    records = [
        one
        for case in preparation.cases
        for one in slices_of(case, config, tmp_path / "masks", [], preparation.survey.labelling)
    ]
    assert {one.meta.mask_source for one in records} == {"wholebody"}
    assert {1, 5} <= {label for one in records for label in one.meta.labels_present}
