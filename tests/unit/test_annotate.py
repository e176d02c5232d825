"""Whole-body masks by a tool: a real program is run on every volume; TotalSegmentator itself is played by a script.

That script writes a NIfTI with the names of its classes in the header, as the real one does with --ml (its
nifti_ext_header.py). What the real one sees in an image cannot be tested here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from annotate_support import FAKE_TOTALSEGMENTATOR, TOOL, Tool
from archive_support import write_archive

from data_shards.ingest.annotate import annotate, annotation_record, check
from data_shards.ingest.annotate_config import AnnotateConfig
from data_shards.ingest.archive import read_archive
from data_shards.ingest.masks import find_wholebody_problems
from data_shards.ingest.totalsegmentator import wholebody_id
from data_shards.labels import WHOLEBODY
from data_shards.problems import InputProblems, OutOfSpace, Problem
from segdiff_dist.cli import main

LIVER, HEART = WHOLEBODY.names.index("liver"), WHOLEBODY.names.index("heart")


@pytest.fixture(scope="module", autouse=True)
def bin_on_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder on PATH."""
    folder = tmp_path_factory.mktemp("bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield folder


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path / "a tool")


@pytest.fixture(scope="module")
def made(bin_on_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tool, Path]:
    """A tool, and the masks that it made of the CT of an archive."""
    folder = tmp_path_factory.mktemp("made")
    tool = Tool(folder / "a tool")
    annotate(write_archive(folder / "amos"), folder / "whole", tool.config)
    return tool, folder / "whole"


@pytest.fixture
def annotated(made: tuple[Tool, Path], tmp_path: Path) -> tuple[Tool, Path]:
    """The same, with masks to spoil; and the tool has not been called since."""
    tool, whole = made
    tool.calls()
    return tool, Path(shutil.copytree(whole, tmp_path / "whole"))


def record_of(wholebody: Path) -> dict:
    return json.loads((wholebody / "annotations.json").read_text())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_case_gets_a_mask_and_a_record(archive, tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    report = annotate(archive.root, out, replace(tool.config, modalities=("CT", "MR"), num_workers=2))
    assert (report.num_masks, report.num_kept, report.failed, report.tool_version) == (6, 0, (), "thresholder 1.2")
    assert "amos_0501 MR" in tool.calls()
    cases = read_archive(archive.root)
    assert find_wholebody_problems(cases, "merged", out) == []
    for case in cases:
        mask = np.asarray(nib.load(out / f"{case.case_id}.nii.gz").dataobj)
        assert np.array_equal(mask == LIVER, np.asarray(nib.load(case.image).dataobj) > 60)
        entry = record_of(out)["cases"][case.case_id]
        assert entry["image_sha256"] == sha256(case.image)
        assert entry["mask_sha256"] == sha256(out / f"{case.case_id}.nii.gz")
        assert entry["seconds"] > 0
    assert annotation_record(out) == {
        "tool": "command",
        "tool_version": "thresholder 1.2",
        "command": tool.config.command,
    }
    assert sorted(p.name for p in out.iterdir()) == [*(f"{c.case_id}.nii.gz" for c in cases), "annotations.json"]


def test_the_same_again_does_nothing_and_a_new_image_is_done_anew(archive, annotated: tuple[Tool, Path]) -> None:
    tool, out = annotated
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    report = annotate(archive.root, out, tool.config)
    assert (report.num_masks, report.num_kept) == (3, 3)
    assert tool.calls() == []
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    image, _ = archive.patient("CT", 77)
    archive.save(archive.root / "imagesTr/amos_0001.nii.gz", image)
    report = annotate(archive.root, out, tool.config)
    assert (tool.calls(), report.num_kept) == (["amos_0001 CT"], 2)
    assert (np.asarray(nib.load(out / "amos_0001.nii.gz").dataobj) > 0).sum() == (image > 60).sum()


FAILURES = {
    "amos_0001": ("fail", "ended with code 3; it said: 2 | no such organ"),
    "amos_0002": ("nothing", "wrote no mask; it said nothing"),
    "amos_0003": ("empty", "it labels nothing"),
    "amos_0501": ("id 73", "label id 73 is outside the table"),
    "amos_0502": ("id 20", "label id 20 is not a class"),
    "amos_0504": ("half", "holds 50.0 % of the image's voxels"),
}


def test_a_volume_that_fails_costs_only_itself(archive, tool: Tool, tmp_path: Path) -> None:
    out, config = tmp_path / "whole", replace(tool.config, modalities=("CT", "MR"), num_workers=2)
    for case_id, (order, _) in FAILURES.items():
        tool.order(case_id, order)
    before = check(archive.root, out, replace(config, timeout_s=5.0))
    assert (before.num_missing, before.seconds, before.most_seconds) == (6, None, 15.0)
    report = annotate(archive.root, out, config)
    assert (report.num_masks, len(report.failed)) == (0, 6)
    for case_id, reason in report.failed:
        assert FAILURES[case_id][1] in reason
    assert list(out.glob("*.nii.gz")) == []
    for case_id in FAILURES:
        tool.order(case_id, "sleep" if case_id == "amos_0002" else None)
    report = annotate(archive.root, out, replace(config, timeout_s=5.0))
    assert report.num_masks == 5
    ((case_id, reason),) = report.failed
    assert case_id == "amos_0002"
    assert "took longer than 5 s and was stopped" in reason
    assert sorted(record_of(out)["cases"]) == sorted(FAILURES.keys() - {"amos_0002"})
    after = check(archive.root, out, config)
    took = [one["seconds"] for one in record_of(out)["cases"].values()]
    assert (after.num_missing, after.seconds) == (1, pytest.approx(sum(took) / 5 / 2))
    tool.order("amos_0002", None)
    tool.calls()
    report = annotate(archive.root, out, config)
    assert (report.failed, report.num_kept, tool.calls()) == ((), 5, ["amos_0002 CT"])
    assert not (out / ".partial").exists()


def test_a_mask_that_was_corrected_by_hand_is_not_overwritten(archive, annotated: tuple[Tool, Path]) -> None:
    tool, out = annotated
    mask = nib.load(out / "amos_0002.nii.gz")
    nib.save(nib.Nifti1Image(np.full(mask.shape, HEART, np.uint8), mask.affine), out / "amos_0002.nii.gz")
    corrected = (out / "amos_0002.nii.gz").read_bytes()
    report = annotate(archive.root, out, tool.config)
    assert report.failed[0][0] == "amos_0002"
    assert "changed since it was made" in report.failed[0][1]
    assert (out / "amos_0002.nii.gz").read_bytes() == corrected


def test_a_mask_whose_record_was_not_yet_written_down_is_taken_up(archive, annotated: tuple[Tool, Path]) -> None:
    """As after a kill between the mask's rename and the record's."""
    tool, out = annotated
    content = record_of(out)
    (out / ".partial").mkdir()
    (out / ".partial/amos_0003.json").write_text(json.dumps(content["cases"].pop("amos_0003")))
    (out / "annotations.json").write_text(json.dumps(content))
    report = annotate(archive.root, out, tool.config)
    assert (report.num_kept, tool.calls()) == (3, [])
    assert len(record_of(out)["cases"]) == 3


def test_a_full_disk_is_reported_and_the_same_command_goes_on(archive, tool: Tool, tmp_path: Path) -> None:
    """The disk is full for whatever is longer than the mask: played by the system's limit on a file's length."""
    out = tmp_path / "whole"
    annotate(archive.root, out, replace(tool.config, modalities=("CT",)))
    longest = (out / "annotations.json").stat().st_size
    script = (
        "import resource, signal; from pathlib import Path; from data_shards.ingest.annotate import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({longest - 1}, {longest - 1}))\n"
        f"annotate(Path({str(archive.root)!r}), Path({str(out)!r}), {tool.config!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert b"OutOfSpace" in done.stderr
    assert b"make room and start the same command again" in done.stderr
    assert len(record_of(out)["cases"]) == 3
    assert annotate(archive.root, out, tool.config).num_kept == 3


def test_a_tool_whose_disk_is_full_ends_the_command_and_leaves_nothing(archive, tool: Tool, tmp_path: Path) -> None:
    command = "sh -c 'cat {image} > {mask}; echo No space left on device; exit 1'"
    with pytest.raises(OutOfSpace, match="make room and start the same command again"):
        annotate(archive.root, tmp_path / "whole", replace(tool.config, command=command))
    assert not list((tmp_path / "whole").rglob("made.nii.gz"))


def test_ctrl_c_stops_the_tools_and_the_same_command_goes_on(archive, tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    tool.order("amos_0003", "sleep")
    # Where the tests run in a shell's background, SIGINT is ignored, and a child inherits that.
    script = (
        "import signal; from pathlib import Path; from data_shards.ingest.annotate import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"annotate(Path({str(archive.root)!r}), Path({str(out)!r}), {tool.config!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    marker, calls = f"{tool.folder / 'tool.py'}\0", tool.folder / "calls.txt"
    try:
        deadline = time.monotonic() + 60
        while not calls.exists() or "amos_0003" not in calls.read_text():
            assert time.monotonic() < deadline, "the tool was never started"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert b"KeyboardInterrupt" in words
    deadline = time.monotonic() + 20
    while any(marker in command for command in commands_running()):
        assert time.monotonic() < deadline, "a tool outlived its command"
        time.sleep(0.1)
    assert sorted(record_of(out)["cases"]) == ["amos_0001", "amos_0002"]
    tool.calls()
    tool.order("amos_0003", None)
    report = annotate(archive.root, out, tool.config)
    assert (report.num_masks, report.num_kept, tool.calls()) == (3, 2, ["amos_0003 CT"])


def commands_running() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_text(errors="replace"))
        except OSError:
            continue  # ended since
    return found


@pytest.fixture
def install_totalsegmentator(bin_on_path: Path) -> Iterator[Callable[..., None]]:
    """Put the script that plays TotalSegmentator on PATH."""
    script = bin_on_path / "TotalSegmentator"

    def install(*, unknown: bool = False, named: bool = True) -> None:
        script.write_text(FAKE_TOTALSEGMENTATOR.format(python=sys.executable, unknown=unknown, named=named))
        script.chmod(0o755)

    yield install
    script.unlink()


def test_totalsegmentators_classes_are_mapped_by_name(archive, tmp_path: Path, install_totalsegmentator) -> None:
    install_totalsegmentator()
    report = annotate(archive.root, tmp_path / "whole", AnnotateConfig())
    assert (report.failed, report.num_masks, report.tool_version) == ((), 6, "2.4.0")
    lines = {}
    for case_id in ("amos_0001", "amos_0501"):
        image = nib.load(tmp_path / "whole" / f"{case_id}.nii.gz")
        assert image.get_data_dtype() == np.uint8
        lines[case_id] = [WHOLEBODY.names[i] for i in np.asarray(image.dataobj)[:9, 0, 0]]
    assert lines["amos_0001"] == [
        "spleen", "liver", "intestine", "intestine", "kidney_left", "vertebra_body", "heart", "background",
        "bone_other",
    ]  # fmt: skip
    assert lines["amos_0501"][:5] == ["liver", "lung_lower_lobe_left", "vertebra_body", "IVD", "heart"]
    assert find_wholebody_problems(read_archive(archive.root), "wholebody", tmp_path / "whole") == []


@pytest.mark.parametrize(
    ("how", "words"), [({"unknown": True}, "id 29 is 'left_horn'"), ({"named": False}, "no class names in its header")]
)
def test_classes_of_another_totalsegmentator_are_refused(
    archive, tmp_path: Path, install_totalsegmentator, how, words
) -> None:
    install_totalsegmentator(**how)
    report = annotate(archive.root, tmp_path / "whole", AnnotateConfig(modalities=("CT",)))
    assert report.num_masks == 0
    assert all(words in reason for _, reason in report.failed)


def test_names_of_totalsegmentator_have_a_place_in_the_table() -> None:
    def placed(name: str) -> str | None:
        found = wholebody_id(name)
        return None if found is None else WHOLEBODY.names[found]

    assert placed("kidney_cyst_right") == "kidney_right"
    assert placed("vertebrae_S1") == "sacrum"
    assert placed("vertebrae_T12") == placed("vertebrae_L5") == "vertebra_body"
    assert placed("rib_right_12") == placed("skull") == "bone_other"
    assert placed("lung_upper_lobe_left") == "lung_upper_lobe_left"
    assert placed("brain") == "background"
    assert [placed(name) for name in ("unused", "body", "background", "left_horn")] == [None] * 4


def test_a_missing_tool_is_reported_before_work_starts(archive, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputProblems, match="no TotalSegmentator on PATH; pip install TotalSegmentator"):
        annotate(archive.root, tmp_path / "whole", AnnotateConfig())
    with pytest.raises(InputProblems, match="no my_tool on PATH"):
        annotate(archive.root, tmp_path / "whole", AnnotateConfig("command", "my_tool {image} {mask}"))
    assert not (tmp_path / "whole").exists()


def test_the_command_line_reports_the_outcome(archive, tool: Tool, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "whole")
    assert main(["annotate", str(archive.root), out, "--tracking.no-enabled"]) == 2
    assert "TotalSegmentator on PATH" in capsys.readouterr().err
    tool.order("amos_0002", "fail")
    args = ["annotate", str(archive.root), out, "--annotate.tool", "command", "--annotate.modalities", "CT"]
    args += ["--annotate.command", str(tool.config.command), "--tracking.no-enabled"]
    assert main(args) == 1
    text = capsys.readouterr().out
    assert "2 whole-body masks in" in text
    assert "failed: amos_0002" in text
    assert "no such organ" in text
    assert "--annotate.version-command" in text
    tool.order("amos_0002", None)
    assert main(args) == 0
    assert "3 whole-body masks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (AnnotateConfig("magic"), "tool", "magic"),
        (AnnotateConfig("command"), "command", "None"),
        (AnnotateConfig(command="x {image} {mask}"), "command", "x {image}"),
        (AnnotateConfig("command", "x {image}"), "command", "x {image}"),
        (AnnotateConfig("command", "x {image} {mask} {size}"), "command", "{size}"),
        (AnnotateConfig("command", "x {image} {mask} {image.parent}"), "command", "{image.parent}"),
        (AnnotateConfig("command", "x '{image} {mask}"), "command", "'{image}"),
        (AnnotateConfig("command", "x {image {mask}"), "command", "x {image"),
        (AnnotateConfig("command", "x {image} {mask}", "x {image}"), "version_command", "{image}"),
        (AnnotateConfig(modalities=("P E T",)), "modalities", "P E T"),
        (AnnotateConfig(num_workers=0, timeout_s=0.0), "timeout_s", "0.0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: AnnotateConfig, field: str, value: str) -> None:
    assert any(p.field == field and value in p.value for p in config.problems())


def problems_of(root: Path, out: Path, config: AnnotateConfig) -> tuple[Problem, ...]:
    with pytest.raises(InputProblems) as error:
        check(root, out, config)
    return error.value.problems


def test_another_tool_or_strangers_masks_are_not_mixed(archive, tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    annotate(archive.root, out, tool.config)
    other = replace(tool.config, command=f"{tool.config.command} more")
    (found,) = problems_of(archive.root, out, other)
    assert (found.field, "asked for" in found.value) == ("command", True)
    (tool.folder / "tool.py").write_text(TOOL.replace("1.2", "1.3"))
    (found,) = problems_of(archive.root, out, tool.config)
    assert found.value == "made with 'thresholder 1.2', asked for 'thresholder 1.3'"
    (out / "annotations.json").unlink()
    (found,) = problems_of(archive.root, out, tool.config)
    assert "3 that annotations.json does not name: amos_0001, amos_0002, amos_0003" in found.value
    broken = replace(tool.config, version_command=f"{shlex.quote(sys.executable)} -c 'import no_such_thing'")
    found = problems_of(archive.root, tmp_path / "new", broken)
    assert "No module named 'no_such_thing'" in found[0].value
