"""`segdiff plan` and `segdiff run`: from somebody's folder and some hours to a report and a synthetic data set."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from layouts_support import write_folder, write_nnunet

from data_shards.host_memory import HostMemory
from data_shards.ingest.prepare import PrepareConfig, check
from data_shards.problems import InputProblems
from segdiff_dist import cli
from segdiff_dist.budget import choose as choose_module
from segdiff_dist.budget.choose import BudgetRequest, Machine, Networks, Speed, choose, measured
from segdiff_dist.budget.data_set import DataSet
from segdiff_dist.budget.lengths import Length, fit, least_seconds
from segdiff_dist.budget.rows import rows_of
from segdiff_dist.budget.speed import pass_s, training_s
from segdiff_dist.planning.memory import Capacity
from segdiff_dist.stages.plan import PlanRun
from segdiff_dist.stages.run import Run

GIB = 2**30
SPEED = Speed(segmenter=0.06, denoiser=0.15, segmenter_pass=0.03, denoiser_pass=0.06)
MACHINE = Machine(torch.device("cpu"), 2, Capacity(HostMemory(16 * GIB, 16 * GIB)), 100 * GIB)
FLAGS = ("--prepare.channel", "1", "--prepare.fold", "1", "--prepare.labels", "amos", "--tracking.no-enabled")


@pytest.fixture(scope="module", autouse=True)
def of_known_speed() -> Iterator[None]:
    """Plans are made for MACHINE: on one that is busy the hours would not do, and memory might not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_module, "training_s", lambda *_: SPEED.denoiser)
        patch.setattr(choose_module, "pass_s", lambda *_: SPEED.denoiser_pass)
        patch.setattr(Machine, "here", classmethod(lambda cls, free_bytes: MACHINE))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw") / "Dataset007_Liver"
    write_nnunet(root)
    return root


@pytest.fixture(scope="module")
def task(data: Path) -> BudgetRequest:
    """Eight hours on two cores with 16 GiB, for the recipe of small machines."""
    config = PrepareConfig(channel=1, fold=1, labels="amos")
    data_set = DataSet.of(check(data, data.parent / "set", config))
    paths = {"amos_root": str(data), "data": str(data.parent / "set"), "run": str(data.parent / "run")}
    return BudgetRequest(data_set, MACHINE, 8.0, paths, {}, "amos_small")


def test_volumes_of_a_plain_folder_are_volumes_and_files_of_one_plane_are_pictures(tmp_path: Path) -> None:
    """Both may be in such a folder: the headers say which they are, for the export and for the number of slices."""
    config = PrepareConfig(**write_folder(".nii.gz")(tmp_path / "volumes"))
    volumes = DataSet.of(check(tmp_path / "volumes", tmp_path / "set", config))
    assert volumes.export_format == "nifti"
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            file = tmp_path / "planes" / split / folder / f"{split}_1.nii.gz"
            file.parent.mkdir(parents=True)
            voxels = np.full((32, 32, 1), 1, np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 5.0, 1.0])), file)
    planes = DataSet.of(check(tmp_path / "planes", tmp_path / "set", config))
    assert (planes.export_format, planes.cost(config)) == ("png", (2, 2))


def speed(*_: Any) -> Speed:
    return SPEED


def test_the_time_is_shared_and_a_stage_at_its_end_leaves_the_rest_to_the_others() -> None:
    lengths = {"a": Length(10, 1000, 0.25, 1.0), "b": Length(10, 10_000, 0.75, 0.5)}
    assert least_seconds(lengths) == 15
    assert fit(14, lengths) is None
    assert fit(15, lengths) == {"a": 10, "b": 10}
    assert fit(400, lengths) == {"a": 100, "b": 600}
    assert fit(4000, lengths) == {"a": 1000, "b": 6000}
    assert fit(5500, lengths) == {"a": 1000, "b": 9000}, "a has enough, and b gets what it leaves"
    assert fit(1e6, lengths) == {"a": 1000, "b": 10_000}


def test_the_speed_of_this_machine_is_measured(task: BudgetRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "training_s", training_s)
    monkeypatch.setattr(choose_module, "pass_s", pass_s)
    _, experiment = choose(replace(task, recipe="smoke", given={"prepare": {"size": 32}}), speed)
    networks = Networks.of(experiment, task.data_set, MACHINE.device)
    found = measured(experiment, networks, MACHINE.device)
    assert min(found.denoiser_pass, found.denoiser) > 0
    assert min(found.segmenter_pass, found.segmenter) > 0


def test_more_hours_make_longer_trainings_within_the_hours(task: BudgetRequest) -> None:
    shorter, longer = (choose(replace(task, hours=hours), speed) for hours in (0.5, 1.0))
    assert longer[1].train.num_images > 1.5 * shorter[1].train.num_images
    for hours, (candidate, experiment) in ((0.5, shorter), (1.0, longer)):
        rows = rows_of(candidate, experiment)
        assert 0.7 * hours * 3600 < sum(row.seconds for row in rows) < hours * 3600
        assert [row.stage for row in rows] == [
            *("prepare", "train-segmenter", "train", "sample", "evaluate", "report", "export")
        ]
        assert experiment.train.problems("train") == []
        assert experiment.train.num_images % experiment.train.global_batch_size == 0
    assert longer[1].export.format == "nnunet"
    assert longer[1].sample.cross_modality_masks == 0, "the set has CT alone"


def test_less_memory_makes_smaller_batches_and_none_at_all_is_refused(task: BudgetRequest) -> None:
    def with_memory(gib: float) -> Any:
        memory = Capacity(HostMemory(int(gib * GIB), int(gib * GIB)))
        given = {"prepare": {"size": 256}}
        return choose(replace(task, given=given, machine=replace(task.machine, capacity=memory)), speed)[1]

    large, small = with_memory(64), with_memory(2.2)
    assert small.train.micro_batch_size < large.train.micro_batch_size == 8
    assert small.train.global_batch_size == large.train.global_batch_size
    with pytest.raises(InputProblems, match="memory"):
        with_memory(0.3)


def test_too_few_hours_are_refused_with_the_least_that_works(task: BudgetRequest) -> None:
    with pytest.raises(InputProblems, match="the least that is of use") as error:
        choose(replace(task, hours=0.02), speed)
    [hours] = re.findall(r"give --hours ([\d.]+)", str(error.value))
    candidate, _ = choose(replace(task, hours=float(hours)), speed)
    assert candidate.recipe == "amos_small"
    # Without a recipe a slower, better one counts as soon as its own length fits.
    assert choose(replace(task, recipe=None, hours=float(hours)), speed)[0].recipe == "amos_small"
    assert choose(replace(task, recipe=None), speed)[0].recipe == "starter"


@pytest.mark.parametrize(("split", "missing"), [("test", "train"), ("train", "val")])
def test_a_run_needs_masks_to_train_on_and_masks_to_sample(task: BudgetRequest, split: str, missing: str) -> None:
    assert task.data_set.split_problems() == []
    alone = replace(task.data_set, cases=tuple(replace(case, split=split) for case in task.data_set.cases))
    (problem,) = alone.split_problems()
    assert f"split {missing}" in str(problem)
    assert "--prepare.split" in str(problem)
    (problem,) = alone.split_problems("val")
    assert "sample.split" in str(problem), "the configuration names a split without masks"


def test_what_is_given_is_kept(task: BudgetRequest) -> None:
    given = {
        "train": {"num_images": 800, "lr": 0.5},
        "sample": {"num": 2},
        "prepare": {"axes": ["coronal"], "size": 32},
    }
    _, experiment = choose(replace(task, given=given), speed)
    assert (experiment.train.num_images, experiment.train.lr, experiment.sample.num) == (800, 0.5, 2)
    assert (experiment.prepare.size, experiment.loader.axes) == (32, ("coronal",))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hours", "0"), "--hours: 0"),
        (("--hours", "nan"), "--hours: nan"),
        (("--recipe", "amos_smal"), "--recipe: amos_smal"),
        (("--prepare.channel", "7"), "channel"),
    ],
)
def test_bad_flags_are_refused_before_work(
    flags: tuple[str, ...], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plan", "run"):
        assert cli.main([name, str(data), *FLAGS, *flags, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of a few steps, in its folder, and what `plan` and `run` printed."""
    import io
    from contextlib import redirect_stdout

    folder = tmp_path_factory.mktemp("own")
    kept = {
        "prepare": {"slice_stride": 1, "spacing_mm": 4.0, "num_workers": 1},
        "segmenter": {"train": {"num_images": 32}},
        "train": {"num_images": 16},
        "validation": {"num_images": 4, "num_pictures": 0},
        "sample": {"num": 4, "samples_per_mask": 1, "num_workers": 1},
        "evaluate": {"num_workers": 1, "bootstrap_samples": 20},
    }
    (folder / "kept.yaml").write_text(yaml.safe_dump(kept))
    flags = (*FLAGS, "--recipe", "smoke", "--config", str(folder / "kept.yaml"), "--hours", "0.2")
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["plan", str(data), *flags, "--out", str(folder / "out")]) == 0
    (folder / "plan.txt").write_text(printed.getvalue())
    next_command = shlex.split(re.findall("^next: segdiff (.*)$", printed.getvalue(), re.MULTILINE)[0])
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.main(next_command) == 0
    (folder / "run.txt").write_text(printed.getvalue())
    return folder


def test_the_plan_is_a_table_and_a_configuration(finished: Path) -> None:
    printed = (finished / "plan.txt").read_text()
    assert "layout: nnunet" in printed
    assert re.search(
        r"^train +0\.\d M parameters, 16 images, 4 at once, \w+ +\d+ s +[\d.]+ [MG]B", printed, re.MULTILINE
    )
    plan = yaml.safe_load((finished / "out" / "run.yaml").read_text())
    assert plan["train"]["num_images"] == 16
    assert plan["prepare"]["channel"] == 1


def test_one_line_goes_from_the_folder_to_a_report_and_a_data_set(finished: Path) -> None:
    out, printed = finished / "out", (finished / "run.txt").read_text()
    assert f"report: {(out / 'run/evaluation/report.html').resolve()}" in printed
    assert (out / "run" / "evaluation" / "report.html").is_file()
    made = json.loads((out / "Dataset900_Synthetic" / "dataset.json").read_text())
    assert {"background", "liver", "spleen"} <= set(made["labels"])
    assert len(list((out / "Dataset900_Synthetic" / "imagesTr").iterdir())) == 4
    assert f"synthetic data set (nnunet): {(out / 'Dataset900_Synthetic').resolve()}" in printed
    [line] = re.findall("^next: segdiff (.*)$", printed, re.MULTILINE)
    assert cli.main([*shlex.split(line), "--dry-run"]) == 0


def test_the_same_line_again_does_nothing_that_is_done(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished / "out"
    watched = [p for p in out.rglob("*") if p.suffix in (".tar", ".safetensors", ".gz") or p.name == "summary.json"]
    before = {path: path.stat().st_mtime_ns for path in watched}
    assert cli.main(["run", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 5
    assert before == {path: path.stat().st_mtime_ns for path in watched}
    assert cli.main(["run", str(data.parent), "--out", str(out)]) == 2
    assert "give another --out" in capsys.readouterr().err
    assert cli.main(["plan", str(data), *FLAGS, "--out", str(out)]) == 2
    assert "the work by this plan has begun" in capsys.readouterr().err


@pytest.fixture(scope="module")
def planned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a plan, and the flags that it was made with."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "kept.yaml").write_text(yaml.safe_dump({"train": {"lr": 0.001}, "prepare": {"spacing_mm": 4}}))
    flags = [str(data), *FLAGS, "--recipe", "smoke", "--config", str(folder / "kept.yaml"), "--hours", "0.2"]
    assert cli.main(["plan", *flags, "--out", str(folder / "out")]) == 0
    return folder / "out", flags


def test_the_same_line_goes_on_by_the_plan_also_where_it_was_made_before_hours_were_recorded(
    planned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = planned
    assert cli.main(["run", *flags, "--out", str(out), "--dry-run"]) == 0
    assert cli.main(["run", "--config", str(out / "run.yaml"), "--dry-run"]) == 0
    capsys.readouterr()
    lines = [line for line in (out / "run.yaml").read_text().splitlines() if not line.startswith(("hours:", "recipe:"))]
    (tmp_path / "old.yaml").write_text("\n".join(lines))
    assert cli.main(["run", "--config", str(tmp_path / "old.yaml"), "--hours", "3", "--dry-run"]) == 0
    assert "--hours and --recipe count for a new plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prepare.size", "24"), "--prepare.size: 24, and 32 in the plan"),
        (("--prepare.modality", "MR"), "--prepare.modality: MR, and None in the plan"),
        (("--hours", "3"), "--hours: 3.0, and 0.2 in the plan"),
        (("--recipe", "amos_small"), "--recipe: amos_small, and smoke in the plan"),
    ],
)
def test_flags_that_contradict_the_plan_are_refused(
    flags: tuple[str, str], message: str, planned: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = planned
    for of in (("--out", str(out)), ("--config", str(out / "run.yaml"))):
        assert cli.main(["run", *of, *flags]) == 2
        refused = capsys.readouterr().err
        assert message in refused
        assert f"leave it out to go on by {out / 'run.yaml'}, " in refused
        assert ("change that file" in refused) == flags[0].startswith("--prepare")


def test_a_configuration_that_contradicts_the_plan_is_refused_value_by_value(
    planned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = planned
    other = tmp_path / "other.yaml"
    other.write_text("train: {lr: 0.5}\nsample: {seed: 4}\nprepare: {spacing_mm: 4.0}\ndata: elsewhere\n")
    assert cli.main(["run", "--out", str(out), "--config", str(other)]) == 2
    refused = capsys.readouterr().err
    assert f"{other}: train.lr: 0.5, and 0.001 in the plan" in refused
    assert f"{other}: sample.seed: 4, and 0 in the plan" in refused
    assert "2 problems" in refused


def test_a_plan_of_another_folder_is_refused(
    planned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder was moved or copied: its plan would begin anew in the old place."""
    out, _ = planned
    moved = Path(shutil.copytree(out, tmp_path / "moved"))
    for flags in (("--out", str(moved)), ("--config", str(out / "run.yaml"), "--out", str(moved))):
        assert cli.main(["run", *flags]) == 2
        assert f"is the plan for {out}" in capsys.readouterr().err


def test_a_new_plan_keeps_the_one_that_was_edited(
    planned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("edited: by hand\n")
    assert cli.main(["plan", *planned[1], "--out", str(tmp_path)]) == 0
    assert f"the plan before: {(tmp_path / 'run.yaml.before').resolve()}" in capsys.readouterr().out
    assert (tmp_path / "run.yaml.before").read_text() == "edited: by hand\n"
    assert "num_images" in (tmp_path / "run.yaml").read_text()


def test_two_commands_that_plan_at_once_do_not_replace_each_others_plan(
    planned: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, flags = planned
    late = [
        kind.parse(name, [*flags, "--out", str(tmp_path)]).check() for name, kind in (("run", Run), ("plan", PlanRun))
    ]
    (tmp_path / "run.yaml").write_text("of: another\n")
    (tmp_path / "shards").mkdir()
    for one, message in zip(late, ("made by another command", "has begun"), strict=True):
        with pytest.raises(InputProblems, match=message):
            one.start()
    assert (tmp_path / "run.yaml").read_text() == "of: another\n"
