"""What prepare does when a worker is killed, the disk is full or masks are missing; and that its memory is bounded."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import pytest
from archive_support import write_archive
from tests_support import actors_of, bytes_of

from data_shards.ingest.archive import read_archive
from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.partials import write_partial
from data_shards.ingest.prepare import PrepareConfig, find_problems, prepare
from data_shards.labels import AMOS, AMOS_TO_WHOLEBODY, MERGED, WHOLEBODY
from data_shards.problems import InputProblems, OutOfSpace
from data_shards.records import SliceMeta
from data_shards.store.shard_writer import Payloads
from data_shards.store.shards import ShardSet

CONFIG = PrepareConfig(size=32, slice_stride=3, samples_per_shard=16, num_workers=2)


pytestmark = pytest.mark.usefixtures("ray")


class Clean(NamedTuple):
    """A set that nothing disturbed, and how many bytes waited in .partial as each volume was done."""

    out: Path
    waiting: list[int]


@pytest.fixture(scope="module")
def clean(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[PrepareConfig], Clean]:
    """Called with a config: what it makes of an archive without faults, made once."""
    root = write_archive(tmp_path_factory.mktemp("clean") / "amos")
    made: dict[str, Clean] = {}

    def find(config: PrepareConfig) -> Clean:
        if str(config) not in made:
            out, waiting = tmp_path_factory.mktemp("clean") / "set", []
            one = replace(config, num_workers=1)
            prepare(root, out, one, progress=lambda *_: waiting.append(_folder_bytes(out / ".partial")))
            made[str(config)] = Clean(out, waiting)
        return made[str(config)]

    return find


def test_killed_workers_cost_nothing_but_their_volumes(
    archive, clean: Callable[[PrepareConfig], Clean], tmp_path: Path
) -> None:
    killed = []

    def kill_one(*_: int) -> None:
        # Not a third: where all three had the same volume, it would rightly count as what kills them.
        actors = actors_of([psutil.Process()])
        if actors and len(killed) < 2:
            actors[0].kill()
            killed.append(actors[0].pid)

    report = prepare(archive.root, tmp_path / "set", CONFIG, progress=kill_one)
    assert len(killed) == 2
    assert (report.num_cases, report.failed) == (6, ())
    assert bytes_of(tmp_path / "set") == bytes_of(clean(CONFIG).out)


# Volumes are cut alike whatever the store.
@pytest.mark.parametrize(
    ("during", "store"), [("cutting", "webdataset"), ("writing", "webdataset"), ("writing", "zarr")]
)
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    archive,
    clean: Callable[[PrepareConfig], Clean],
    disk_of: Callable[[int], Path],
    store: Literal["webdataset", "zarr"],
    during: str,
) -> None:
    """Room for half of the volumes' slices ends the cutting of volumes; for them and half of the set, the writing."""
    config = PrepareConfig(size=48, slice_stride=2, samples_per_shard=64, store=store, num_workers=2)
    undisturbed, waiting = clean(config)
    small_disk = disk_of(64)
    room = 0.5 * waiting[-1] if during == "cutting" else waiting[-1] + 0.5 * _folder_bytes(undisturbed)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(max(0, int(shutil.disk_usage(small_disk).free - room))))
    out = small_disk / "set"
    with pytest.raises(OutOfSpace, match="make room and start the same command again"):
        prepare(archive.root, out, config)
    with pytest.raises(InputProblems, match="unfinished"):
        ShardSet.open(out)
    filler.unlink()
    report = prepare(archive.root, out, config)
    assert (report.num_cases, report.failed) == (6, ())
    assert bytes_of(out) == bytes_of(undisturbed)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "options", [{}, {"label_set": "merged"}, {"mask_resize": "soft", "soft_edge": True, "bits": 16}], ids=str
)
def test_a_volume_s_slices_are_never_in_memory_together(archive, tmp_path: Path, options: dict[str, Any]) -> None:
    """The peak of making all slices of a volume stays below four times the volume, though the slices are more."""
    shape = (192, 192, 90)
    image, label = archive.patient("CT", 1, shape)
    affine = np.diag([2.0, 2.0, 2.5, 1.0])
    archive.save(archive.root / "imagesTr/amos_0001.nii.gz", image, affine)
    archive.save(archive.root / "labelsTr/amos_0001.nii.gz", label, affine)
    case = next(case for case in read_archive(archive.root) if case.case_id == "amos_0001")
    config = PrepareConfig(slice_stride=2, **options)
    masks = None
    if config.label_set == "merged":
        masks = tmp_path / "masks"
        archive.save(masks / "amos_0001.nii.gz", np.where(label, AMOS_TO_WHOLEBODY[6], 66).astype(np.uint8), affine)
    format = config.format
    list(slices_of(case, replace(config, axes=("axial",), slice_stride=100), masks))  # imports are not the volume's
    num_bytes = 0

    def samples() -> Iterator[tuple[SliceMeta, Payloads]]:
        nonlocal num_bytes
        for record in slices_of(case, config, masks):
            payloads = format.payloads(record)
            num_bytes += sum(len(payload) for payload in payloads.values())
            yield record.meta, payloads

    tracemalloc.start()
    write_partial(tmp_path / "case", samples(), "stamp")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes > 7 * image.nbytes
    assert peak < 4 * image.nbytes


def _write_wholebody(archive, folder: Path, cases: tuple[str, ...]) -> Path:
    """Whole-body masks in which liver and spleen are a voxel too large, and the rest of the patient is muscle."""
    from scipy import ndimage

    muscle = WHOLEBODY.names.index("muscle")
    for case_id in cases:
        image, label = archive.patient("CT" if int(case_id[-4:]) <= 500 else "MR", int(case_id[-4:]))
        mask = np.where(image > -500 if image.min() < -500 else image > 60, muscle, 0).astype(np.uint8)
        for organ in (6, 1):
            mask[ndimage.binary_dilation(label == organ)] = AMOS_TO_WHOLEBODY[organ]
        archive.save(folder / f"{case_id}.nii.gz", mask)
    return folder


CASES = ("amos_0001", "amos_0002", "amos_0003", "amos_0501", "amos_0502", "amos_0504")


def test_whole_body_and_merged_masks_reach_the_slices(archive, tmp_path: Path) -> None:
    masks = _write_wholebody(archive, tmp_path / "masks", CASES[:-1])
    pixels = {}
    for label_set in ("wholebody", "merged"):
        config = PrepareConfig(label_set=label_set, size=32, axes=("axial",), num_workers=1)
        report = prepare(archive.root, tmp_path / label_set, config, wholebody=masks)
        shards = ShardSet.open(tmp_path / label_set, verify=True)
        assert shards.label_table == (WHOLEBODY if label_set == "wholebody" else MERGED)
        by_case = {shards.meta(row).case_id: shards.meta(row) for row in range(len(shards))}
        # amos_0003 has no expert label, amos_0504 no whole-body mask.
        if label_set == "merged":
            sources = dict.fromkeys(CASES, "merged") | {"amos_0003": "wholebody", "amos_0504": "expert"}
        else:
            sources = dict.fromkeys(CASES, "wholebody") | {"amos_0504": "none"}
        assert {case: meta.mask_source for case, meta in by_case.items()} == sources
        assert report.masks == {s: list(sources.values()).count(s) for s in sorted(set(sources.values()))}
        rows = [row for row in range(len(shards)) if shards.meta(row).case_id == "amos_0001"]
        counts = np.sum([np.bincount(shards.read_mask(row).ravel(), minlength=74) for row in rows], axis=0)
        pixels[label_set] = {name: int(counts[i]) for i, name in enumerate(shards.label_table.names) if counts[i]}
        alone = [row for row in range(len(shards)) if shards.meta(row).case_id == "amos_0504"]
        present = set().union(*(np.unique(shards.read_mask(row)).tolist() for row in alone)) - {0}
        expert = {AMOS_TO_WHOLEBODY[6], AMOS_TO_WHOLEBODY[1]}
        assert present == {73} | (expert if label_set == "merged" else set())
    # The expert's outlines are smaller; what they leave of the tool's liver and spleen is the rest of the body.
    assert pixels["merged"]["liver"] < pixels["wholebody"]["liver"]
    assert pixels["merged"]["muscle"] == pixels["wholebody"]["muscle"]
    assert pixels["merged"].get("body", 0) > pixels["wholebody"].get("body", 0)


def test_the_set_says_where_its_masks_came_from_and_other_masks_are_another_set(archive, tmp_path: Path) -> None:
    masks = _write_wholebody(archive, tmp_path / "masks", CASES)
    config = PrepareConfig(label_set="merged", size=32, slice_stride=20, num_workers=1)
    prepare(archive.root, tmp_path / "set", config, wholebody=masks)
    index = ShardSet.open(tmp_path / "set").index
    assert index["source"]["amos_0001"]["wholebody"][0] == "amos_0001.nii.gz"
    assert index["mask_sources"] == {"wholebody": 1, "merged": 5}
    (masks / "amos_0002.nii.gz").unlink()
    with pytest.raises(InputProblems, match="source of amos_0002"):
        prepare(archive.root, tmp_path / "set", config, wholebody=masks)


def test_a_label_set_without_its_masks_is_refused_before_work_starts(archive, tmp_path: Path) -> None:
    (found,) = find_problems(archive.root, tmp_path / "set", PrepareConfig(label_set="merged"))
    assert "wholebody" in str(found)
    assert not (tmp_path / "set").exists()
    assert AMOS.body_id == 16
