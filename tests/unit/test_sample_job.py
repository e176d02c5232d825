"""Sampling jobs without Ray: regions, damage, masks of a folder, what a job would cost."""

from __future__ import annotations

import fcntl
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_support import QUICK, arguments, flip_a_byte, make_here, pixels_of, write_weights
from scipy import ndimage

from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shards import ShardSet
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.sampling.batch_size import batch_size_for
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.job import prepare_job, sample
from segdiff_dist.sampling.plan import plan
from segdiff_dist.sampling.store import SampleStore

LIVER, SPLEEN, BODY = 6, 1, 16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_do_not_depend_on_the_batch(shapes: Path, tmp_path: Path, precision: str) -> None:
    """The last region holds one image, so short batches come up too."""
    settings: dict[str, Any] = {"num": 9, "region_size": 8, "samples_per_mask": 1, "cross_modality_masks": 0}
    made = [
        pixels_of(make_here(write_weights(tmp_path / str(size)), shapes, size, precision=precision, **settings))
        for size in (4, 5, 8)
    ]
    assert len({images.tobytes() for images, _ in made}) == 1


def test_precision_changes_images_but_little(shapes: Path, tmp_path: Path) -> None:
    fp32, bf16 = (
        pixels_of(make_here(write_weights(tmp_path / p), shapes, precision=p, num=4))[0] for p in ("fp32", "bf16")
    )
    difference = np.abs(fp32.astype(int) - bf16)
    assert difference.max() > 0
    assert difference.mean() < 3


def test_air_is_cleared_and_nothing_else(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path / "run")
    sampler = QUICK["sampler"]
    plain, mask = pixels_of(make_here(run, shapes, out=tmp_path / "plain"))
    clear, _ = pixels_of(make_here(run, shapes, out=tmp_path / "clear", sampler=replace(sampler, clear_air=True)))
    is_air = np.stack([ndimage.distance_transform_cdt(one == 0, "chessboard") > 1 for one in mask])
    assert is_air.any()
    np.testing.assert_array_equal(clear, np.where(is_air, 0, plain))


def test_the_store_says_what_it_holds(shapes: Path, tmp_path: Path) -> None:
    import zarr

    store = make_here(write_weights(tmp_path), shapes)
    group = zarr.open_group(store.path / "images.zarr", mode="r")
    assert group.attrs["weights_digest"] == store.job["weights_digest"]
    assert group.attrs["seed"] == 0
    assert np.array_equal(group["item_id"][:], np.arange(16))
    assert group["seed_index"][:].tolist() == store.items["seed_index"].to_pylist()


@pytest.mark.parametrize("part", ["image", "mask"])
def test_damage_is_named(shapes: Path, tmp_path: Path, part: str) -> None:
    store = make_here(write_weights(tmp_path), shapes)
    assert list(store.damaged()) == []
    file = flip_a_byte(store, part, 1)
    with pytest.raises((RuntimeError, ValueError)):
        getattr(store, part)[4]
    assert [(d.region, d.file, d.items) for d in store.damaged()] == [(1, file, (4,))]


def test_lost_files_and_broken_marks_are_damage(shapes: Path, tmp_path: Path) -> None:
    store = make_here(write_weights(tmp_path), shapes)
    (store.path / "images.zarr" / "image" / "c" / "2" / "0" / "0").unlink()
    (store.path / "done" / "000000").write_text("")
    assert {damage.region for damage in store.damaged()} == {0, 2}


def test_two_jobs_do_not_work_on_one_store(shapes: Path, tmp_path: Path) -> None:
    make_here(write_weights(tmp_path), shapes)
    with (tmp_path / ".samples.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputProblems, match="is making them"):
            sample(*arguments(tmp_path, shapes))
    assert sample(*arguments(tmp_path, shapes)).missing() == []


def test_images_of_another_device_are_not_mixed_in(shapes: Path, tmp_path: Path) -> None:
    store = make_here(write_weights(tmp_path), shapes)
    job = json.loads((store.path / "job.json").read_text())
    (store.path / "job.json").write_text(json.dumps(job | {"device": "cuda"}))
    assert sample(*arguments(tmp_path, shapes)).missing() == []  # nothing to make: nothing to refuse
    store.unmark(0)
    with pytest.raises(InputProblems, match="begun on 'cuda', not 'cpu'"):
        sample(*arguments(tmp_path, shapes))


def test_batches_fit_the_memory() -> None:
    paper = DenoiserConfig()

    def batch(gib: float, most: int = 64, passes: int = 1, config: DenoiserConfig = paper) -> int:
        return batch_size_for(config, 256, passes, int(gib * 2**30), most)

    assert batch(1000) == 64
    assert batch(1000, most=16) == 16
    assert 4 < batch(12) < batch(24) < 64
    assert batch(12, passes=2) == batch(6)
    assert batch(0.1) == 4  # the least there is
    assert batch(1000, most=1) == 4


# --- masks of a folder ---


def discs(shift: int = 0) -> np.ndarray:
    """uint8 [32, 32]: a body with a liver."""
    row, column = np.mgrid[0:32, 0:32]
    mask = np.where((row - 16) ** 2 + (column - 16) ** 2 < 150, BODY, 0).astype(np.uint8)
    mask[(row - 16) ** 2 + (column - 12 - shift) ** 2 < 20] = LIVER
    return mask


def write_png(file: Path, mask: np.ndarray) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(file)


def write_nifti(file: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    import nibabel as nib

    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), file)


def folder_job(tmp_path: Path, shapes: Path, **changes: Any) -> Any:
    settings = {"masks": tmp_path / "masks", "target_modality": "MR", "num": None, "cross_modality_masks": 0}
    return prepare_job(*arguments(write_weights(tmp_path / "run"), shapes, **settings | changes))


def test_png_masks_of_a_folder(shapes: Path, tmp_path: Path) -> None:
    for name, shift in (("a.png", 0), ("deep/b.png", 4)):
        write_png(tmp_path / "masks" / name, discs(shift))
    settings: dict[str, Any] = {"masks": tmp_path / "masks", "target_modality": "MR", "samples_per_mask": 2}
    store = make_here(write_weights(tmp_path / "run"), shapes, **settings)
    items = store.items.to_pylist()
    assert [item["target_modality"] for item in items] == ["MR"] * 4 + ["CT"] * 4  # QUICK: both in the other one too
    assert {item["source_modality"] for item in items} == {"none"}
    assert {item["case_id"] for item in items} == {"a", "deep_b"}
    for item, mask in zip(items, store.mask[:], strict=True):
        assert np.array_equal(mask, discs(4 if item["case_id"] == "deep_b" else 0))
    assert len({image.tobytes() for image in store.image[:]}) == 8


def test_nifti_masks_are_turned_and_cut_as_prepare_cuts(tmp_path: Path, archive: Any) -> None:
    """The labels of an archive, stored in another orientation, against the set that `prepare` makes of it."""
    import nibabel as nib

    from data_shards.ingest.archive import read_archive
    from data_shards.ingest.case_slices import slices_of
    from data_shards.ingest.prepare_config import PrepareConfig
    from data_shards.store.shard_writer import ShardWriter

    config = PrepareConfig(size=32, axes=("axial",), spacing_mm=2.5, slice_stride=2)
    cases = [case for case in read_archive(archive.root) if case.split == "train"]
    writer = ShardWriter(tmp_path / "set", config.format)
    for case in cases:
        for record in slices_of(case, config, None):
            writer.write(record)
        label = nib.load(case.label)
        turned = label.as_reoriented(nib.io_orientation(np.diag([-1, -1, 1, 1])))
        write_nifti(tmp_path / "masks" / f"{case.case_id}.nii.gz", np.asarray(turned.dataobj), turned.affine)
    table = {"name": AMOS.name, "names": AMOS.names}
    writer.finish({"label_table": table, "preprocessing": config.result_settings()})
    shards = ShardSet.open(tmp_path / "set")
    with pytest.warns(UserWarning, match="shows the patient's outline"):
        job = folder_job(tmp_path, tmp_path / "set")
    assert job.masks_MHW is not None
    rows = {(r["case_id"], r["slice_index"]): r["row"] for r in job.items.to_pylist()}
    assert len(rows) > 4
    for number in range(len(shards)):
        meta, prepared = shards.meta(number), shards.read_mask(number)
        ours = job.masks_MHW[rows[meta.case_id, meta.slice_index]]
        assert np.array_equal(ours, np.where(prepared == AMOS.body_id, 0, prepared))


def test_a_volume_thinner_than_half_a_stride_gives_its_middle_slice(shapes: Path, tmp_path: Path) -> None:
    write_nifti(tmp_path / "masks" / "one.nii.gz", np.full((16, 16, 1), BODY, np.uint8), np.diag([2.0, 2, 2, 1]))
    three = np.stack([np.full((16, 16), label, np.uint8) for label in (SPLEEN, LIVER, BODY)], axis=-1)
    write_nifti(tmp_path / "masks" / "three.nii", three, np.diag([2.0, 2, 2, 1]))
    run, shards, *rest = arguments(
        write_weights(tmp_path / "run"), shapes, masks=tmp_path / "masks", target_modality="MR", cross_modality_masks=0
    )
    shards.index["preprocessing"] |= {"slice_stride": 10, "spacing_mm": 2.0}
    job = prepare_job(run, shards, *rest)
    assert job.masks_MHW is not None
    middle = {(item["case_id"], item["slice_index"]): item["row"] for item in job.items.to_pylist()}
    assert set(middle) == {("one", 0), ("three", 1)}
    assert (job.masks_MHW[middle["one", 0]] == BODY).all()
    assert (job.masks_MHW[middle["three", 1]] == LIVER).all()


def test_masks_may_be_named_in_upper_case_and_what_is_passed_over_is_reported(shapes: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    write_png(masks / "A.PNG", discs())
    write_nifti(masks / "b.nii.gz", np.full((16, 16, 4), LIVER, np.uint8), np.diag([2.0, 2, 2, 1]))
    (masks / "b.nii.gz").rename(masks / "B.NII.GZ")
    for name in ("c.mha", "d.npy", ".hidden"):
        (masks / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 other files skipped \(\.mha, \.npy\)"):
        job = folder_job(tmp_path, shapes)
    assert set(job.items["case_id"].to_pylist()) == {"A", "B"}
    (masks / "A.PNG").unlink()
    (masks / "B.NII.GZ").unlink()
    with pytest.raises(InputProblems, match="none there: 2 other files skipped"):
        folder_job(tmp_path, shapes)


def test_labels_are_mapped_where_a_table_says_how(shapes: Path, tmp_path: Path) -> None:
    theirs = np.select([discs() == LIVER, discs() == BODY], [200, 7]).astype(np.uint8)
    write_png(tmp_path / "masks" / "a.png", theirs)
    (tmp_path / "map.yaml").write_text("200: liver\n7: 16\n")
    job = folder_job(tmp_path, shapes, label_map=tmp_path / "map.yaml")
    assert np.array_equal(job.masks_MHW[0], discs())
    (tmp_path / "map.json").write_text('{"200": "lever", "x": "liver"}')
    with pytest.raises(InputProblems, match=r"200: 'lever'; choose from background, spleen") as error:
        folder_job(tmp_path, shapes, label_map=tmp_path / "map.json")
    assert len(error.value.problems) == 2
    (tmp_path / "lists.yaml").write_text("1: [liver, spleen]\n2: {liver: 1}\n3: yes\n²: liver\n4: null\n")
    with pytest.raises(InputProblems, match=r"label id 1: \['liver', 'spleen'\]; choose from") as error:
        folder_job(tmp_path, shapes, label_map=tmp_path / "lists.yaml")
    assert len(error.value.problems) == 5
    with pytest.raises(InputProblems, match=r"nowhere\.yaml: config: no such file"):
        folder_job(tmp_path, shapes, label_map=tmp_path / "nowhere.yaml")


def test_everything_wrong_with_a_folder_is_reported_at_once(shapes: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    write_png(masks / "good.png", discs())
    write_png(masks / "ids.png", np.full((32, 32), 99, np.uint8))
    write_png(masks / "wide.png", np.zeros((32, 48), np.uint8))
    write_png(masks / "colour.png", np.zeros((32, 32, 3), np.uint8))
    (masks / "torn.png").write_bytes(b"\x89PNG")
    write_nifti(masks / "fractions.nii.gz", np.full((8, 8, 4), 0.5, np.float32), np.eye(4))
    with pytest.raises(InputProblems) as error:
        folder_job(tmp_path, shapes)
    problems = "\n".join(map(str, error.value.problems))
    for words in ("ids.png: label ids: [99]", "48x32 pixels", "RGB pixels", "torn.png", "not whole numbers"):
        assert words in problems
    assert len(error.value.problems) == 5
    assert not (tmp_path / "run" / "samples").exists()


def test_empty_masks_are_allowed_and_reported(shapes: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "masks" / "a.png", discs())
    write_png(tmp_path / "masks" / "b.png", np.zeros((32, 32), np.uint8))
    settings: dict[str, Any] = {"masks": tmp_path / "masks", "target_modality": "CT", "cross_modality_masks": 0}
    with pytest.warns(UserWarning, match="1 of the 2 masks in .* are empty"):
        store = make_here(write_weights(tmp_path / "run"), shapes, **settings)
    assert list(store.damaged()) == []
    assert sorted(mask.any() for mask in store.mask[:]) == [False, False, True, True]


def test_a_changed_folder_is_another_list(shapes: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "masks" / "a.png", discs())
    settings: dict[str, Any] = {"masks": tmp_path / "masks", "target_modality": "CT", "out": tmp_path / "out"}
    run = write_weights(tmp_path / "run")
    assert make_here(run, shapes, **settings).path == tmp_path / "out"
    write_png(tmp_path / "masks" / "a.png", discs(1))
    with pytest.raises(InputProblems, match="masks_digest"):
        prepare_job(*arguments(run, shapes, **settings))


def test_settings_of_a_folder_are_checked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong = SampleConfig(masks=tmp_path / "none", batch_size=1)
    assert [p.field for p in wrong.problems()] == ["sample.batch_size", "sample.masks", "sample.target_modality"]
    assert SampleConfig(label_map=tmp_path / "x").problems()[0].field == "sample.label_map"
    with_map = SampleConfig(masks=tmp_path / "empty", target_modality="CT", label_map=tmp_path / "nowhere.yaml")
    assert [p.field for p in with_map.problems()] == ["sample.label_map"]
    assert SampleConfig(masks=tmp_path / "empty", target_modality="CT").problems() == []


# --- what it would cost ---


def test_a_plan_counts_images_time_and_bytes(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    before = plan(*arguments(run, shapes, num_workers=2))
    assert (before.num_images, before.num_missing, before.num_masks) == (16, 16, 10)
    assert before.passes_per_image == 3
    assert before.num_bytes == 16 * 2 * 32 * 32
    assert before.seconds is not None
    assert before.seconds > 0
    assert not (run / "samples").exists()

    store = make_here(run, shapes)
    for index in (1, 2):
        store.unmark(index)
    after = plan(*arguments(run, shapes, num_workers=2))
    assert after.num_missing == 8
    assert after.seconds_from == "as the 8 images made so far"
    seconds = [store.mark(index)["seconds"] for index in (0, 3)]
    assert after.seconds == pytest.approx(8 * sum(seconds) / 8 / 2)
    assert 0 < after.num_bytes < 8 * 2 * 32 * 32
    assert "8 missing" in str(after)
    assert "images: 16 of 10 masks, 3 passes" in str(after)


def test_a_plan_loads_the_weights_once(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    load = Denoiser.load

    def counted(folder: Path) -> Denoiser:
        loaded.append(folder)
        return load(folder)

    monkeypatch.setattr(Denoiser, "load", counted)
    assert "estimated from a pass" in plan(*arguments(write_weights(tmp_path), shapes)).seconds_from
    assert len(loaded) == 1


def test_a_plan_says_where_there_are_fewer_masks_than_were_asked_for(shapes: Path, tmp_path: Path) -> None:
    planned = str(plan(*arguments(write_weights(tmp_path), shapes, num=1000, samples_per_mask=1)))
    assert re.search(r"images: \d+ of all \d+ masks there are, not 1,000, 3 passes", planned)


def test_a_dry_run_says_what_it_would_do(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from segdiff_dist.cli import main

    run = write_weights(tmp_path)
    (run / "weights" / "ema").rename(run / "weights" / "ema_0.05")
    flags = ["sample", "--run", str(run), "--data", str(shapes), "--dry-run", "--num", "5", "--sample.num-workers", "1"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "# images: 5 of 5 masks, 50 passes through the net each; 5 missing" in printed
    assert "with 1 worker on cpu (estimated from a pass" in printed
    assert yaml.safe_load(printed)["sample"]["num"] == 5
    assert main([*flags, "--sample.weights", "online"]) == 2
    said = capsys.readouterr()
    assert yaml.safe_load(said.out)["sample"]["weights"] == "online"
    assert "nothing was started" in said.err
    assert not (run / "samples").exists()


def test_a_store_of_another_sampler_is_refused(shapes: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    run = write_weights(tmp_path)
    make_here(run, shapes)
    with pytest.raises(InputProblems, match=r"sample\.sampler\.num_steps"):
        prepare_job(*arguments(run, shapes, sampler=replace(QUICK["sampler"], num_steps=4)))
    assert SampleStore.open(run / "samples").missing() == []


def test_masks_of_other_modalities_are_another_list(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    make_here(run, shapes)
    _, shards, _, *settings = arguments(run, shapes)
    with pytest.raises(InputProblems, match=r"modalities"):
        prepare_job(run, shards, shards.select(split="test", modalities=("MR",)), *settings)


def test_a_refused_sampling_leaves_the_run_folder_as_it_was(shapes: Path, tmp_path: Path) -> None:
    run = write_weights(tmp_path)
    make_here(run, shapes)
    before = sorted(p.name for p in run.iterdir())
    from segdiff_dist.cli import main

    assert main(["sample", "--run", str(run), "--data", str(shapes), "--sample.seed", "5"]) == 2
    assert sorted(p.name for p in run.iterdir()) == before
