"""`evaluate` with a program as segmenter, which labels volumes: slices of a case are stacked for it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_support import items_of
from tests_support import write_shapes

from data_shards.ingest.volumes import Volume
from data_shards.labels import AMOS
from data_shards.problems import InputProblems
from data_shards.store.shard_writer import ShardWriter, set_format
from data_shards.store.shards import ShardSet
from segdiff_dist.evaluation.measure.checks import check
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.segmentation.tools import open_tool

QUICK: dict[str, Any] = {"bootstrap_samples": 20, "batch_size": 7, "device": "cpu", "num_workers": 1}
SLICES, SIDE, STEP_MM = 8, 32, 3.0
# Finds spleen and liver of write_shapes by brightness, and writes down what it was given.
TOOL = """
import json, sys
from pathlib import Path
if sys.argv[1] == "--version":
    print("by brightness 7")
    sys.exit()
image, mask, modality, case_id = sys.argv[1:5]
if (Path(__file__).parent / "broken").exists():
    sys.exit("no such organ")
import nibabel as nib, numpy as np
volume = nib.load(image)
values = np.asarray(volume.dataobj)
if modality == "CT":
    ids = np.where(values > 104, 1, np.where(values > -16, 6, 0))
else:
    ids = np.where(values > 190, 1, np.where((values > 45) & (values < 120), 6, 0))
with (Path(__file__).parent / "calls.jsonl").open("a") as stream:
    stream.write(json.dumps([case_id, modality, list(values.shape), volume.affine.tolist()]) + chr(10))
nib.save(nib.Nifti1Image(ids.astype(np.uint8), volume.affine), mask)
"""


@pytest.fixture(scope="module")
def placed_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """write_shapes, its slices 3 mm apart, rows and columns 6 mm."""
    folder = tmp_path_factory.mktemp("placed")
    shards = ShardSet.open(write_shapes(folder / "flat", num_patients=1, slices=SLICES, held_out=1))
    writer = ShardWriter(folder / "set", set_format("webdataset", "raw", 10, size=SIDE, bits=8, soft_edge=False))
    for row in range(len(shards)):
        record = shards.read(row)
        affine = np.array([[0, -6, 0, 90], [-6, 0, 0, 80], [0, 0, 1, STEP_MM * record.meta.slice_index], [0, 0, 0, 1]])
        meta = replace(record.meta, affine=tuple(affine.astype(float).ravel().tolist()))
        writer.write(replace(record, meta=meta))
    about = {"label_table": {"name": AMOS.name, "names": AMOS.names}, "preprocessing": {"size": SIDE, "bits": 8}}
    writer.finish(about)
    return folder / "set"


def write_run(run: Path, placed_set: Path, num: int | None = None) -> Path:
    """Samples of the test split's slices, as they are; the first `num` of them."""
    shards = ShardSet.open(placed_set)
    items = items_of(shards, shards.select(split="test").tolist()[:num])
    job = {"shards": str(placed_set), "shards_digest": shards.digest, "weights_digest": "", "region_size": len(items)}
    store = SampleStore.create(run / "samples", job, pa.Table.from_pylist(items), SIDE)
    records = [shards.read(item["row"]) for item in items]
    store.write_region(0, np.stack([r.image_HW for r in records]), np.stack([r.mask_HW for r in records]))
    return run


def write_tool(folder: Path) -> Path:
    """The description of the stand-in program."""
    folder.mkdir()
    (folder / "tool.py").write_text(TOOL)
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(folder / 'tool.py'))}"
    names = {i: name for i, name in enumerate(AMOS.names) if name != "body"}
    described = {
        "command": f"{program} {{image}} {{mask}} {{modality}} {{case_id}}",
        "version_command": f"{program} --version",
        "names": names,
    }
    (folder / "tool.yaml").write_text(json.dumps(described))
    return folder / "tool.yaml"


def test_a_program_labels_each_volume_once_and_its_labels_are_measured(tmp_path: Path, placed_set: Path) -> None:
    run, tool = write_run(tmp_path / "run", placed_set), write_tool(tmp_path / "tool")
    config = EvaluateConfig(segmenter=tool, **QUICK)
    summary = measure(run, config, progress=False)
    for modality in ("CT", "MR"):
        for pair in ("mask_real", "mask_gen"):
            for organ in ("liver", "spleen"):
                entry = summary["by_modality_organ"][modality][organ][f"dice_{pair}"]
                assert (entry["value"], entry["n"]) == (pytest.approx(1, abs=0.1), SLICES), (modality, organ, pair)
    assert summary["metrics"]["dice_real_gen"]["value"] == 1
    assert "gives no features" in summary["not_available"]["segmenter_frechet"]
    assert summary["body"] == {}
    calls = [json.loads(line) for line in (tool.parent / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 4  # two cases, real and generated
    assert all(shape == [SIDE, SIDE, SLICES] for _, _, shape, _ in calls)
    expected = [[0, -6, 0, 90], [-6, 0, 0, 80], [0, 0, STEP_MM, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(calls[0][3], expected)
    assert summary["provenance"]["segmenter_sha256"] == open_tool(tool).weights_sha256


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    tool = write_tool(tmp_path / "tool")
    (tool.parent / "broken").touch()
    volume = Volume(np.zeros((4, 4, 4), np.int16), 1.0, 0.0, np.eye(4), "")
    with pytest.raises(RuntimeError, match="no such organ"):
        open_tool(tool).label(volume, "CT", "case", tmp_path)


def test_what_makes_no_whole_volumes_is_refused(tmp_path: Path, placed_set: Path, shapes: Path) -> None:
    tool = write_tool(tmp_path / "tool")

    def refused(run: Path) -> str:
        with pytest.raises(InputProblems) as caught:
            check(run, EvaluateConfig(segmenter=tool, **QUICK))
        [one] = caught.value.problems
        return str(one)

    assert f"{SLICES - 1} of {SLICES} slices; it labels whole" in refused(
        write_run(tmp_path / "part", placed_set, SLICES - 1)
    )
    assert "6 slices; it labels volumes" in refused(write_run(tmp_path / "thin", shapes))
    tool.write_text(json.dumps(json.loads(tool.read_text()) | {"names": {"1": "liver"}}))
    assert "it does not label 14 of the masks' 15 organs" in refused(write_run(tmp_path / "whole", placed_set))


def test_totalsegmentator_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputProblems, match="pip install TotalSegmentator"):
        open_tool(Path("totalsegmentator"))
