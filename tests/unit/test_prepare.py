"""From an AMOS folder to a shard set: right, repeatable, resumable, and losing only the volumes that are bad."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from archive_support import write_archive
from tests_support import bytes_of

from data_shards.ingest.intensity import restore
from data_shards.ingest.prepare import PrepareConfig, PrepareReport, find_problems, prepare
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.inspect import recognised_lines
from data_shards.store.shards import ShardSet

CONFIG = PrepareConfig(size=32, slice_stride=7, samples_per_shard=40, num_workers=1)
BODY = AMOS.body_id


pytestmark = pytest.mark.usefixtures("ray")


class Made(NamedTuple):
    """The set that CONFIG makes of an archive that nothing is wrong with. Tests that change it work on a copy."""

    root: Path
    out: Path
    report: PrepareReport

    def copy(self, folder: Path) -> Path:
        """A copy of the set below `folder`."""
        return Path(shutil.copytree(self.out, folder / "set"))


@pytest.fixture(scope="module")
def made(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    root = write_archive(folder / "amos")
    return Made(root, folder / "set", prepare(root, folder / "set", CONFIG))


def test_slices_hold_what_the_volumes_hold(made: Made) -> None:
    report, shards = made.report, ShardSet.open(made.out, verify=True)
    assert (report.num_cases, report.failed, report.skipped_done) == (6, (), False)
    assert report.num_samples == len(shards)
    # 93 x 77 x 46 mm, every seventh of them from the fourth on.
    row_of = {key: row for row, key in enumerate(shards.samples["key"].to_pylist())}
    assert len(row_of) == 6 * (len(range(3, 46, 7)) + len(range(3, 77, 7)) + len(range(3, 93, 7)))
    record = shards.read(row_of["amos_0001-axial-0024"])
    hu = restore(record.image_HW, record.meta.intensity_scale, record.meta.intensity_offset)
    for organ, expected in ((6, 70), (1, 120)):
        assert np.median(hu[record.mask_HW == organ]) == pytest.approx(expected, abs=10)
    assert np.median(hu[record.mask_HW == BODY]) == pytest.approx(20, abs=3)
    assert (hu[record.mask_HW == 0] < -200).mean() > 0.85  # the rest is skin, half air
    assert record.meta.labels_present == (1, 6, BODY)
    assert (record.meta.modality, record.meta.split, record.meta.labelled) == ("CT", "train", True)
    # The liver lies to the patient's right: on the image's left.
    columns = {organ: np.nonzero(record.mask_HW == organ)[1].mean() for organ in (6, 1)}
    assert columns[6] < columns[1]


def test_samples_are_ordered_by_split_case_axis_and_slice(made: Made) -> None:
    samples = ShardSet.open(made.out).samples.to_pylist()
    places = [
        (
            ("train", "val", "test").index(s["split"]),
            s["case_id"],
            ("axial", "coronal", "sagittal").index(s["axis"]),
            s["slice_index"],
        )
        for s in samples
    ]
    assert places == sorted(places)


def test_an_unlabelled_case_is_body_alone(made: Made) -> None:
    shards = ShardSet.open(made.out)
    rows = [row for row, case in enumerate(shards.samples["case_id"].to_pylist()) if case == "amos_0003"]
    assert rows
    assert not any(shards.meta(row).labelled for row in rows)
    assert set().union(*(np.unique(shards.read(row).mask_HW).tolist() for row in rows)) == {0, BODY}
    assert set(rows).isdisjoint(shards.select().tolist())


def test_same_input_gives_the_same_bytes_however_many_workers(archive, made: Made, tmp_path: Path) -> None:
    prepare(archive.root, tmp_path / "set", replace(CONFIG, num_workers=2))
    assert bytes_of(tmp_path / "set") == bytes_of(made.out)


def test_zarr_and_soft_edges_are_the_same_bytes_too(archive, tmp_path: Path) -> None:
    for name, num_workers in (("one", 1), ("two", 2)):
        config = replace(CONFIG, store="zarr", bits=16, mask_resize="soft", soft_edge=True, num_workers=num_workers)
        prepare(archive.root, tmp_path / name, config)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert len(ShardSet.open(tmp_path / "two", verify=True)) > 16


def test_the_same_command_again_does_nothing(made: Made) -> None:
    times = {file: file.stat().st_mtime_ns for file in made.out.rglob("*")}
    again = prepare(made.root, made.out, CONFIG)
    assert again.skipped_done
    assert (again.num_samples, again.num_cases) == (made.report.num_samples, made.report.num_cases)
    assert {file: file.stat().st_mtime_ns for file in made.out.rglob("*")} == times


def test_modalities_axes_and_empty_slices_can_be_left_out(archive, tmp_path: Path) -> None:
    """As PNG files; and what another program has in the folder stays."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mlflow.db").write_text("a tracker was here first")
    config = PrepareConfig(
        axes=("sagittal",), modalities=("MR",), size=32, min_labelled_pixels=1, codec="png", num_workers=2
    )
    prepare(archive.root, tmp_path / "set", config)
    shards = ShardSet.open(tmp_path / "set", verify=True)
    assert set(shards.samples["axis"].to_pylist()) == {"sagittal"}
    assert set(shards.samples["modality"].to_pylist()) == {"MR"}
    assert all({1, 6} & set(present) for present in shards.samples["labels_present"].to_pylist())
    assert (tmp_path / "set" / "mlflow.db").read_text() == "a tracker was here first"


def _refusal(archive_root: Path, out: Path, config: PrepareConfig = CONFIG) -> str:
    with pytest.raises(InputProblems) as caught:
        prepare(archive_root, out, config)
    return str(caught.value)


def test_another_config_is_refused_key_by_key(made: Made, tmp_path: Path) -> None:
    message = _refusal(made.root, made.copy(tmp_path), PrepareConfig(size=16, slice_stride=7, codec="png"))
    assert "size: made with 32, asked for 16" in message
    assert "codec: made with 'raw', asked for 'png'" in message
    assert "slice_stride" not in message


def test_another_source_is_refused(archive, made: Made, tmp_path: Path) -> None:
    archive.edit(lambda d: d["test"].pop())
    assert "source of amos_0504" in _refusal(archive.root, made.copy(tmp_path))


def test_a_folder_that_holds_something_else_is_refused(archive, made: Made, tmp_path: Path) -> None:
    assert "holds dataset.json" in _refusal(archive.root, archive.root)
    out = made.copy(tmp_path)
    (out / "index.json").unlink()
    assert "holds shards of something else" in _refusal(archive.root, out)
    (tmp_path / "file").touch()
    assert "is a file" in _refusal(archive.root, tmp_path / "file")


def test_config_and_archive_faults_are_reported_together_before_work_starts(archive, tmp_path: Path) -> None:
    (archive.root / "imagesTr/amos_0001.nii.gz").unlink()
    config = PrepareConfig(
        axes=("axial", "oblique"), size=4, spacing_mm=0, codec="jpg", hu_window=(5.0, 5.0), mr_percentiles=(1.0, 101.0)
    )
    found = find_problems(archive.root, tmp_path / "set", config)
    assert [p.field for p in found] == ["axes", "size", "spacing_mm", "hu_window", "mr_percentiles", "codec", "file"]
    assert not (tmp_path / "set").exists()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


def _bad_checksum(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-6] ^= 255
    file.write_bytes(content)


def _spoil_voxels(archive, kept: Path) -> dict[str, str]:
    """Five cases whose headers are good and whose voxels are not; the good files go to `kept`. Returns the reasons."""
    shutil.copytree(archive.root, kept)
    _truncate(archive.root / "imagesTr/amos_0001.nii.gz")
    _bad_checksum(archive.root / "labelsVa/amos_0002.nii.gz")
    voxels, label = archive.patient("MR", 501)
    voxels = voxels.astype(np.float32)
    voxels[3, 4, 5] = np.nan
    archive.save(archive.root / "imagesTr/amos_0501.nii.gz", voxels)
    label[0, 0, 0] = 99
    archive.save(archive.root / "labelsVa/amos_0502.nii.gz", label)
    archive.save(archive.root / "imagesTs/amos_0504.nii.gz", np.full(archive.shape, -1000, np.int16))
    return {
        "amos_0001": "truncated",
        "amos_0002": "CRC",
        "amos_0501": "NaN",
        "amos_0502": "label id 99",
        "amos_0504": "every voxel is -1000",
    }


def test_bad_voxels_cost_only_their_volume_and_are_tried_again(archive, made: Made, tmp_path: Path) -> None:
    out, kept = tmp_path / "set", tmp_path / "kept"
    reasons = _spoil_voxels(archive, kept)
    report = prepare(archive.root, out, CONFIG)
    assert {case: reasons[case] in reason for case, _, reason in report.failed} == dict.fromkeys(reasons, True)
    assert {file for _, file, _ in report.failed} == {
        "imagesTr/amos_0001.nii.gz",
        "labelsVa/amos_0002.nii.gz",
        "imagesTr/amos_0501.nii.gz",
        "labelsVa/amos_0502.nii.gz",
        "imagesTs/amos_0504.nii.gz",
    }
    shards = ShardSet.open(out, verify=True)
    assert set(shards.samples["case_id"].to_pylist()) == {"amos_0003"}
    assert [entry["case_id"] for entry in shards.index["failed"]] == sorted(reasons)

    # Again, with nothing mended: the same failures, the same set.
    before = bytes_of(out)
    assert prepare(archive.root, out, CONFIG).failed == report.failed
    assert bytes_of(out) == before

    # All mended: only those are made, and the set is that of an archive that never was bad.
    good_partial = out / ".partial/amos_0003.bin"
    made_at = good_partial.stat().st_mtime_ns
    for name in ("imagesTr/amos_0001", "labelsVa/amos_0002", "imagesTr/amos_0501", "imagesTs/amos_0504"):
        shutil.copy(kept / f"{name}.nii.gz", archive.root / f"{name}.nii.gz")
    assert [case for case, _, _ in prepare(archive.root, out, CONFIG).failed] == ["amos_0502"]
    assert good_partial.stat().st_mtime_ns == made_at
    shutil.copy(kept / "labelsVa/amos_0502.nii.gz", archive.root / "labelsVa/amos_0502.nii.gz")
    mended = prepare(archive.root, out, CONFIG)
    assert (mended.failed, mended.num_cases) == ((), 6)
    assert bytes_of(out) == bytes_of(made.out)
    assert prepare(archive.root, out, CONFIG).skipped_done


def test_when_all_fail_there_is_no_set(archive, tmp_path: Path) -> None:
    for file in archive.root.glob("images*/*.nii.gz"):
        _truncate(file)
    report = prepare(archive.root, tmp_path / "set", CONFIG)
    assert (len(report.failed), report.num_samples) == (6, 0)
    with pytest.raises(InputProblems, match="unfinished"):
        ShardSet.open(tmp_path / "set")


@pytest.mark.parametrize("stop_after", [2, 6])
def test_after_ctrl_c_the_same_command_goes_on(archive, made: Made, tmp_path: Path, stop_after: int) -> None:
    out = tmp_path / "set"

    def interrupt(done: int, total: int, failed: int) -> None:
        assert total == 6
        assert failed == 0
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(archive.root, out, CONFIG, progress=interrupt)
    with pytest.raises(InputProblems, match="unfinished"):
        ShardSet.open(out)
    (out / ".partial" / "amos_0001.unfinished").write_bytes(b"half a volume")
    partials = {file: file.stat().st_mtime_ns for file in (out / ".partial").glob("*.bin")}
    assert len(partials) >= stop_after
    (cut_short, _) = partials.popitem()
    cut_short.write_bytes(cut_short.read_bytes()[:1000])
    (out / ".partial" / f"{partials.popitem()[0].stem}.json").unlink()
    kept: dict[Path, int] = {}
    prepare(archive.root, out, CONFIG, progress=lambda *_: kept.update({f: f.stat().st_mtime_ns for f in partials}))
    assert kept == partials
    assert bytes_of(out) == bytes_of(made.out)


def test_a_changed_source_or_config_of_an_unfinished_set_is_noticed(archive, made: Made, tmp_path: Path) -> None:
    out, volume = tmp_path / "set", archive.root / "imagesTr/amos_0001.nii.gz"
    image, _ = archive.patient("CT", 77)
    archive.save(volume, image)

    def interrupt(done: int, *_: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(archive.root, out, CONFIG, progress=interrupt)
    assert "size: made with 32, asked for 64" in _refusal(archive.root, out, PrepareConfig(size=64, slice_stride=7))
    shutil.copy(made.root / "imagesTr/amos_0001.nii.gz", volume)
    prepare(archive.root, out, CONFIG)
    assert bytes_of(out) == bytes_of(made.out)


def test_the_index_records_how_the_set_was_made(made: Made) -> None:
    index = json.loads((made.out / "index.json").read_text())
    assert index["label_table"]["names"] == list(AMOS.names)
    assert index["preprocessing"]["hu_window"] == [-256.0, 256.0]
    assert "num_workers" not in index["preprocessing"]
    assert index["source"]["amos_0003"]["label"] is None
    assert str(made.root.parent) not in json.dumps(index)
    assert not (made.out / ".partial").exists()


def test_stored_compression_does_not_matter(archive, made: Made, tmp_path: Path) -> None:
    """An uncompressed .nii gives the same pixels; only the source's checksum differs."""
    file = archive.root / "imagesTs/amos_0003.nii.gz"
    (archive.root / "imagesTs/amos_0003.nii").write_bytes(gzip.decompress(file.read_bytes()))
    file.unlink()
    archive.edit(lambda d: d["test"][0].update(image="./imagesTs/amos_0003.nii"))
    prepare(archive.root, tmp_path / "plain", CONFIG)
    zipped, plain = ShardSet.open(made.out), ShardSet.open(tmp_path / "plain")
    for row, case in enumerate(zipped.samples["case_id"].to_pylist()):
        if case == "amos_0003":
            np.testing.assert_array_equal(zipped.read(row).image_HW, plain.read(row).image_HW)
            assert zipped.meta(row).source_sha256 != plain.meta(row).source_sha256


def test_what_was_recognised_is_said_and_ct_without_offset_costs_its_volume(archive, tmp_path: Path) -> None:
    import nibabel as nib

    image, _ = archive.patient("CT", 1)
    image[:5] = -2000
    archive.save(archive.root / "imagesTr/amos_0001.nii.gz", image)
    lost, _ = archive.patient("CT", 2)
    archive.save(archive.root / "imagesVa/amos_0002.nii.gz", (lost.astype(int) + 1024).clip(0).astype(np.uint16))
    for folder in ("imagesTr", "labelsTr"):
        file = archive.root / folder / "amos_0501.nii.gz"
        stored = nib.load(file)
        metres = nib.Nifti1Image(np.asarray(stored.dataobj), np.diag([0.001, 0.001, 0.001, 1]) @ stored.affine)
        metres.header.set_xyzt_units("meter")
        nib.save(metres, file)
    report = prepare(archive.root, tmp_path / "set", CONFIG)
    assert [(case, "RescaleIntercept" in reason) for case, _, reason in report.failed] == [("amos_0002", True)]
    index = ShardSet.open(tmp_path / "set").index
    assert index["recognised"] == report.recognised
    assert "padding of -2000 HU" in report.recognised["amos_0001"][0]
    assert "metres are converted" in report.recognised["amos_0501"][0]
    assert set(report.recognised) == {"amos_0001", "amos_0501"}
    shown = "\n".join(recognised_lines(report.recognised, index["source"]))
    assert "padding of -2000 HU is taken as air" in shown
    assert "crop it away if that is wrong: 1 volume (imagesTr/amos_0001.nii.gz)" in shown
    # The next call, which tries the failed volume alone, says the same of the others.
    assert prepare(archive.root, tmp_path / "set", CONFIG).recognised == report.recognised
