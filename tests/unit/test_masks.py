"""A case's mask: whose organs win, other grids, and what is wrong with a folder of whole-body masks."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_shards.ingest.cases import Case
from data_shards.ingest.masks import annotation_record, find_wholebody_problems, read_case_mask, resampled_to_grid
from data_shards.ingest.volumes import UnreadableVolume, Volume, read_volume
from data_shards.labels import AMOS, FROM_EXPERTS, LABEL_TABLES, MERGED, WHOLEBODY, LabelTable

SHAPE = (12, 10, 8)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
LIVER, SPLEEN, BLADDER, HEART, BODY = (
    WHOLEBODY.names.index(n) for n in ("liver", "spleen", "urinary_bladder", "heart", "body")
)
AMOS_LIVER, AMOS_SPLEEN = AMOS.names.index("liver"), AMOS.names.index("spleen")


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """An image whose expert label has a liver at i = 2..4 and no spleen."""
    label = np.zeros(SHAPE, np.uint8)
    label[2:5] = AMOS_LIVER
    image = save(tmp_path / "image.nii.gz", np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE))
    return Case("amos_0001", "CT", "train", image, save(tmp_path / "label.nii.gz", label))


@pytest.fixture
def wholebody(tmp_path: Path) -> Path:
    """A folder with the case's whole-body mask: liver at i = 3..6, spleen at i = 7, heart at i = 1..2, bladder at 9."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:7], mask[7], mask[1:3], mask[9] = LIVER, SPLEEN, HEART, BLADDER
    save(tmp_path / "whole" / "amos_0001.nii.gz", mask)
    return tmp_path / "whole"


def along_i(volume: Volume | None) -> list[int]:
    """The mask's ids along the first axis, the same in every line."""
    assert volume is not None
    assert volume.voxels_IJK.dtype == np.uint8
    assert (volume.voxels_IJK == volume.voxels_IJK[:, :1, :1]).all()
    return volume.voxels_IJK[:, 0, 0].tolist()


def test_the_experts_organs_win_and_their_outline_is_the_organs_outline(case: Case, wholebody: Path) -> None:
    found = read_case_mask(case, read_volume(case.image), "merged", wholebody)
    assert found.source == "merged"
    # The expert's liver at 2..4; the tool's liver beyond it is body; spleen, heart and bladder are the tool's.
    assert along_i(found.volume) == [0, HEART, LIVER, LIVER, LIVER, BODY, BODY, SPLEEN, 0, BLADDER, 0, 0]


def test_amos_and_wholebody_alone(case: Case, wholebody: Path) -> None:
    image = read_volume(case.image)
    amos = read_case_mask(case, image, "amos", None)
    assert (amos.source, along_i(amos.volume)) == ("expert", [0, 0, 6, 6, 6, 0, 0, 0, 0, 0, 0, 0])
    whole = read_case_mask(case, image, "wholebody", wholebody)
    expected = [0, HEART, HEART, LIVER, LIVER, LIVER, LIVER, SPLEEN, 0, BLADDER, 0, 0]
    assert (whole.source, along_i(whole.volume)) == ("wholebody", expected)


def test_merged_takes_what_there_is(case: Case, wholebody: Path) -> None:
    image = read_volume(case.image)
    expert = read_case_mask(replace(case, case_id="amos_0002"), image, "merged", wholebody)
    assert (expert.source, along_i(expert.volume)) == ("expert", [0, 0, LIVER, LIVER, LIVER, 0, 0, 0, 0, 0, 0, 0])
    whole = read_case_mask(replace(case, label=None), image, "merged", wholebody)
    assert (whole.source, along_i(whole.volume)[7]) == ("wholebody", SPLEEN)
    nothing = replace(case, case_id="amos_0002", label=None)
    for label_set in ("merged", "wholebody", "amos"):
        assert read_case_mask(nothing, image, label_set, wholebody) == read_case_mask(nothing, image, label_set, None)
        assert read_case_mask(nothing, image, label_set, wholebody).source == "none"


def test_every_organ_of_amos_lands_on_its_own_name(case: Case, tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label.ravel()[:16] = np.arange(16)
    save(case.label, label)
    found = read_case_mask(case, read_volume(case.image), "merged", None)
    names = [MERGED.names[i] for i in np.ravel(found.volume.voxels_IJK, order="C")[:16]]
    assert names == list(AMOS.names[:16])


def test_a_mask_in_another_orientation_lands_where_it_belongs(case: Case, wholebody: Path) -> None:
    file = wholebody / "amos_0001.nii.gz"
    stored = nib.load(file)
    flipped = stored.as_reoriented(nib.io_orientation(stored.affine) * [1, -1])
    turned = flipped.as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
    nib.save(turned, file)
    assert nib.aff2axcodes(turned.affine) != ("R", "A", "S")
    found = read_case_mask(case, read_volume(case.image), "merged", wholebody)
    assert along_i(found.volume) == [0, HEART, LIVER, LIVER, LIVER, BODY, BODY, SPLEEN, 0, BLADDER, 0, 0]


def ids_by_place(points_N3: np.ndarray) -> np.ndarray:
    """An id for every 4 mm cube of the world, neighbours' ids differing."""
    cubes = np.floor(points_N3 / 4.0).astype(np.int64)
    return ((cubes @ [1, 7, 29]) % 19 + 1).astype(np.uint8)


def centres(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World coordinates [N, 3] of a grid's voxel centres, in C order."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    return indices @ affine[:3, :3].T + affine[:3, 3]


def oblique(angles_deg: tuple[float, float, float], spacing: tuple[float, float, float]) -> np.ndarray:
    a, b, c = np.deg2rad(angles_deg)
    turns = [
        np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]),
        np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]),
        np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]]),
    ]
    affine = np.eye(4)
    affine[:3, :3] = turns[0] @ turns[1] @ turns[2] @ np.diag(spacing)
    return affine


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.0, 0.0, 30.0), (12.0, -20.0, 37.0)])
@pytest.mark.parametrize("shear", [0.0, 0.15])
def test_a_mask_on_any_grid_gives_the_voxel_nearest_in_its_own_axes(angles, shear: float) -> None:
    shape, affine = (18, 16, 9), oblique((3.0, 5.0, -4.0), (2.0, 2.5, 4.0))
    affine[:3, 3] = (-17.0, 12.0, 40.0)
    mask_affine = oblique(angles, (1.3, 1.6, 1.1)) @ np.array(
        [[1, shear, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )
    # A mask grid centred on the image's, large enough to hold all of it.
    mask_shape = (90, 90, 110)
    middle = centres(shape, affine).mean(0)
    mask_affine[:3, 3] = middle - mask_affine[:3, :3] @ (np.array(mask_shape) / 2)
    stored = ids_by_place(centres(mask_shape, mask_affine)).reshape(mask_shape)
    result = resampled_to_grid(Volume(stored, 1.0, 0.0, mask_affine, ""), shape, affine, Path("m"))
    points = centres(shape, affine)
    index = np.rint((points - mask_affine[:3, 3]) @ np.linalg.inv(mask_affine[:3, :3]).T).astype(int)
    expected = stored[tuple(index.T)].reshape(shape)
    assert np.array_equal(result.voxels_IJK, expected)
    # And that is the right place in the world, within half a mask voxel: most image voxels lie inside a cube.
    assert (result.voxels_IJK == ids_by_place(points).reshape(shape)).mean() > 0.5
    assert np.array_equal(result.affine, affine)


@pytest.mark.parametrize(
    ("num_planes", "shift_mm", "cover"), [(8, 0.0, None), (4, 0.0, "50.0"), (8, 6.0, "75.0"), (8, 1e4, "0.0")]
)
def test_a_mask_that_covers_too_little_is_refused(num_planes: int, shift_mm: float, cover: str | None) -> None:
    mask_affine = np.diag([1.0, 1.0, 3.0, 1.0])
    # Twice as fine in the plane: its outermost centres lie half an image voxel further out than the image's.
    mask_affine[:3, 3] = (-0.5, -0.5, shift_mm)
    mask = Volume(np.full((24, 20, num_planes), LIVER, np.uint8), 1.0, 0.0, mask_affine, "")
    if cover is None:
        assert (resampled_to_grid(mask, SHAPE, AFFINE, Path("mask.nii.gz")).voxels_IJK == LIVER).all()
        return
    with pytest.raises(UnreadableVolume, match=f"holds {cover} % of the image's voxels; at least 95 %") as refusal:
        resampled_to_grid(mask, SHAPE, AFFINE, Path("mask.nii.gz"))
    assert refusal.value.file == "mask.nii.gz"


def test_what_a_covering_mask_leaves_over_is_background() -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    mask = Volume(np.full((40, 40, 39), HEART, np.uint8), 1.0, 0.0, affine, "")
    result = resampled_to_grid(mask, (40, 40, 40), affine, Path("m")).voxels_IJK
    assert (result[:, :, :39] == HEART).all()
    assert (result[:, :, 39] == 0).all()


def test_placing_works_plane_by_plane() -> None:
    shape = (160, 160, 40)
    mask = Volume(np.ones((80, 80, 41), np.uint8), 1.0, 0.0, np.diag([2.0, 2.0, 1.0, 1.0]), "")
    tracemalloc.start()
    resampled_to_grid(mask, shape, np.eye(4), Path("m"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The result, and some floats and integers a voxel of one plane; whole coordinates would be 24 bytes a voxel.
    assert peak < np.prod(shape) + 80 * shape[0] * shape[1]


@pytest.mark.parametrize(
    ("wrong_id", "words"), [(73, "label id 73"), (200, "label id 200"), (20, "label id 20 is not a class")]
)
def test_ids_outside_the_table_are_refused_with_id_and_file(
    case: Case, wholebody: Path, wrong_id: int, words: str
) -> None:
    file = wholebody / "amos_0001.nii.gz"
    mask = np.zeros(SHAPE, np.uint8)
    mask[3, 3, 3] = wrong_id
    save(file, mask)
    with pytest.raises(UnreadableVolume, match=words) as refusal:
        read_case_mask(case, read_volume(case.image), "wholebody", wholebody)
    assert refusal.value.file == str(file)


def test_a_good_folder_has_no_problems(case: Case, wholebody: Path) -> None:
    others = [replace(case, case_id=f"amos_{n:04d}") for n in (2, 3)]
    assert find_wholebody_problems([case, *others], "merged", wholebody) == []
    assert find_wholebody_problems([case], "amos", None) == []
    assert annotation_record(wholebody) is None


def test_each_fault_of_a_folder_is_named(case: Case, wholebody: Path, tmp_path: Path) -> None:
    def problems_with(label_set: str, folder: Path | None, cases: tuple[Case, ...] = (case,)) -> list[str]:
        return [str(p) for p in find_wholebody_problems(cases, label_set, folder)]

    assert "label_set is merged" in problems_with("merged", None)[0]
    assert "label_set is wholebody" in problems_with("wholebody", None)[0]
    assert "not used by label_set amos" in problems_with("amos", wholebody)[0]
    assert "not a folder" in problems_with("merged", tmp_path / "nowhere")[0]
    assert "none for any case" in problems_with("merged", wholebody, (replace(case, case_id="amos_0009"),))[0]
    mask = nib.load(wholebody / "amos_0001.nii.gz")
    nib.save(mask, wholebody / "amos_0001.nii")
    assert "both amos_0001.nii.gz and amos_0001.nii" in problems_with("merged", wholebody)[0]
    (wholebody / "amos_0001.nii").unlink()
    save(wholebody / "amos_0001.nii.gz", np.zeros((4, 4, 4, 3), np.uint8))
    assert "dimensions: 4-D" in problems_with("merged", wholebody)[0]
    (wholebody / "amos_0001.nii.gz").write_bytes(b"no NIfTI")
    assert "not NIfTI" in problems_with("merged", wholebody)[0]


def test_a_mask_that_may_be_mirrored_is_refused(case: Case, wholebody: Path) -> None:
    """The image states sides, and the mask none: by a guess its voxels run the other way."""
    file = wholebody / "amos_0001.nii.gz"
    mask = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), None)
    mask.header.set_zooms(nib.load(case.image).header.get_zooms())
    nib.save(mask, file)
    (found,) = find_wholebody_problems([case], "merged", wholebody)
    assert (found.field, found.value.split(",")[0]) == ("orientation", "LAS")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not a record of annotations"), ("[]", "not a record"), ('{"format_version": 1}', "not a record"),
     ('{"format_version": 99, "cases": {}}', "format_version: 99")],
)  # fmt: skip
def test_a_broken_or_newer_record_is_refused(case: Case, wholebody: Path, content: str, words: str) -> None:
    (wholebody / "annotations.json").write_text(content)
    (found,) = find_wholebody_problems([case], "merged", wholebody)
    assert words in str(found)


def test_who_made_the_masks_can_be_read(wholebody: Path) -> None:
    record = {
        "format_version": 1,
        "tool": "t",
        "tool_version": "2.4",
        "command": "t {image}",
        "cases": {"amos_0001": {}},
    }
    (wholebody / "annotations.json").write_text(json.dumps(record))
    assert annotation_record(wholebody) == {"tool": "t", "tool_version": "2.4", "command": "t {image}"}


def test_a_label_set_from_the_experts_masks_needs_a_table_and_its_ids_alone(
    case: Case, wholebody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/add_a_label_table.md promises."""
    ids = tuple({"liver": 1, "spleen": 2}.get(name, 0) for name in AMOS.names[:-1])
    monkeypatch.setitem(LABEL_TABLES, "large", LabelTable("large", ("background", "liver", "spleen", "body")))
    monkeypatch.setitem(FROM_EXPERTS, "large", ids)
    found = read_case_mask(case, read_volume(case.image), "large", None)
    assert (found.source, along_i(found.volume)) == ("expert", [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert find_wholebody_problems([case], "large", None) == []
    assert [problem.value for problem in find_wholebody_problems([case], "large", wholebody)] == [
        "not used by label_set large"
    ]
