"""Case ids are names and no paths, wherever one enters: nothing is written outside the folder that is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sampling_support import make_here, write_weights
from tests_support import write_shapes

from data_shards.ingest import archive
from data_shards.problems import InputProblems
from data_shards.records import LONGEST_CASE_ID, is_case_id, is_path_inside
from data_shards.store.codecs import crc32c
from data_shards.store.config import ConvertConfig
from data_shards.store.convert import convert
from data_shards.store.samples_table import write as write_table
from data_shards.store.set_index import file_crc32c, file_sha256, parse_index
from data_shards.store.shards import ShardSet
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.job import export_samples
from segdiff_dist.sampling.mask_folder import case_id_of
from segdiff_dist.sampling.store import SampleStore

GOOD = ["amos_0001", "BRATS_012", "a.b-c", "0", "-x", "x" * LONGEST_CASE_ID, "a..b"]
BAD = ["../../x", "/abs/x", "a/b", "..", ".", ".hidden", "", "a b", "a\n", "a\0", "a\\b", "é", "٣", "x" * 73, None, 7]


def test_the_rule() -> None:
    assert all(is_case_id(value) for value in GOOD)
    assert not any(is_case_id(value) for value in BAD)
    assert all(is_path_inside(path) for path in ("shards/train-000000.tar", "shards/train/image/c/0/0/0", "zarr.json"))
    for path in ("/a", "a/../b", "../a", "a//b", "./a", "a\\b", "", "a::file:///b", "%2e%2e/a", ".a/b", "a/", None):
        assert not is_path_inside(path)


@pytest.mark.parametrize("change", [{"case_id": "../x"}, {"axis": "../x"}, {"split": "../x"}, {"modality": "/x"}])
def test_a_slice_has_no_path_in_its_meta(shapes: Path, change: dict[str, str]) -> None:
    with pytest.raises(InputProblems, match=next(iter(change.values()))):
        replace(ShardSet.open(shapes).meta(0), **change)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shards", num_patients=1, slices=2, held_out=1)


def renamed(shapes: Path, root: Path, ids: dict[str, str]) -> Path:
    """The set with other case ids in its table, and an index that fits."""
    shutil.copytree(shapes, root)
    table = pa.ipc.open_file(str(root / "samples.arrow")).read_all()
    column = table.schema.get_field_index("case_id")
    new = pa.array([ids.get(one, one) for one in table["case_id"].to_pylist()]).dictionary_encode()
    write_table(table.set_column(column, table.schema.field(column), new), root / "samples.arrow")
    index = json.loads((root / "index.json").read_text())
    file = root / "samples.arrow"
    about = {"bytes": file.stat().st_size, "sha256": file_sha256(file), "crc32c": file_crc32c(file)}
    index["samples"] |= about
    (root / "index.json").write_text(json.dumps(index))
    return root


@pytest.mark.parametrize("bad", [value for value in BAD if isinstance(value, str)])
def test_a_shard_set_with_paths_for_ids_is_refused(shapes: Path, tmp_path: Path, bad: str) -> None:
    with pytest.raises(InputProblems, match=r"samples\.arrow.*case id.*an id has letters"):
        ShardSet.open(renamed(shapes, tmp_path / "set", {"amos_0001": bad}))


@pytest.mark.parametrize("file", ["../x.tar", "/x.tar", "shards/a\\b", "shards/.x", "a::file:///x", 7, ["a"]])
def test_files_of_an_index_are_inside_its_folder(shapes: Path, file: object) -> None:
    index = json.loads((shapes / "index.json").read_text())
    index["shards"][0]["file"] = file
    with pytest.raises(InputProblems, match=r"do not use this set|not a shard set's index"):
        parse_index(json.dumps(index).encode(), "index.json")


def test_ids_with_dots_go_into_zarr_but_not_into_tars(tmp_path: Path, shapes: Path) -> None:
    """WebDataset splits a member's name at the first dot."""
    dotted = renamed(shapes, tmp_path / "set", {"amos_0001": "a.1"})
    with pytest.raises(InputProblems, match=r"'a\.1'.*without dots.*zarr"):
        convert(dotted, tmp_path / "tars", ConvertConfig(store="webdataset", codec="zstd"))
    assert not (tmp_path / "tars").exists()


@pytest.mark.parametrize("path", ["../images/amos_0001.nii.gz", "/x/amos_0001.nii.gz", "imagesTr/amos_٣.nii.gz"])
@pytest.mark.parametrize("of", ["image", "label"])
def test_an_archive_names_files_of_its_own_folder(tmp_path: Path, path: str, of: str) -> None:
    entry = {"image": "imagesTr/amos_0001.nii.gz", "label": "labelsTr/amos_0001.nii.gz"} | {of: path}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry], "validation": [], "test": []}))
    found = archive.find_problems(tmp_path)
    remedies = ("inside the archive", "letters, digits", "same file name")
    assert any(remedy in found[0].remedy for remedy in remedies)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    folder = write_weights(tmp_path_factory.mktemp("run"))
    make_here(folder, shapes, num=2, diverse_masks=0, cross_modality_masks=0)
    return folder


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("case_id", bad) for bad in ("../../../outside/x", "/outside/x", ".x", "")),
        ("axis", "../axial"),
        ("target_modality", "/CT"),
        ("source_modality", "../MR"),
    ],
)
def test_a_job_with_paths_for_names_is_refused(run: Path, tmp_path: Path, column: str, value: str) -> None:
    """Its checksums fit: whoever made the folder wrote them as well."""
    shutil.copytree(run / "samples", tmp_path / "run" / "samples")
    items, layout = (tmp_path / "run" / "samples" / name for name in ("items.parquet", "layout.json"))
    table = pq.read_table(items)
    values = [value, *table[column].to_pylist()[1:]]
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, column, pa.array(values)), items)
    layout.write_text(json.dumps(json.loads(layout.read_text()) | {"items.parquet": crc32c(items.read_bytes())}))
    for form in ("png", "nifti", "shards", "nnunet"):
        with pytest.raises(InputProblems, match=r"items\.parquet.*sample again"):
            export_samples(tmp_path / "run", tmp_path / "Dataset701_x", ExportConfig(form))
    assert {file.name for file in tmp_path.iterdir()} == {"run"}


def test_a_layout_names_files_of_its_own_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "samples", tmp_path / "samples")
    file = tmp_path / "samples" / "layout.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"/dev/zero": 0}))
    with pytest.raises(InputProblems, match=r"layout\.json.*damaged"):
        SampleStore.open(tmp_path / "samples")


def test_ids_of_masks_in_a_folder_are_valid_and_unique(run: Path, shapes: Path, tmp_path: Path) -> None:
    names = ["a.png", "deep/b.1.png", "Müller 1.png", "Muller 1.png", "M ller 1.png", f"{'x' * 80}.png"]
    ids = [case_id_of(Path(name)) for name in names]
    assert ids[:2] == ["a", "deep_b_1"], "as ever"
    assert all(is_case_id(one) for one in ids)
    assert len(set(ids)) == len(names)
    for name in names:
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32), 6, np.uint8)).save(tmp_path / "masks" / name)
    with pytest.warns(UserWarning, match=r"4 masks .* have names that no id can hold: .* is M"):
        store = make_here(
            write_weights(tmp_path / "run"),
            shapes,
            masks=tmp_path / "masks",
            target_modality="CT",
            diverse_masks=0,
            cross_modality_masks=0,
        )
    assert set(store.items["mask_file"].to_pylist()) == set(names)
    assert set(store.items["case_id"].to_pylist()) == set(ids)
