"""The contract of a stage, as the command line shows it: one file a command, help, suggestions, dry runs, frames."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests_support import bytes_of

from segdiff_dist import stages
from segdiff_dist.cli import main
from segdiff_dist.experiment import Experiment
from segdiff_dist.shipped import shipped_config, shipped_names
from segdiff_dist.stages.base import Stage
from segdiff_dist.stages.cost import Cost

# Modules of the package that are no command.
SHARED = {
    "evaluate_downstream",
    "base",
    "configured",
    "flags",
    "completion",
    "training_plan",
    "training_setup",
    "cost",
    "resources",
    "model_extras",
}
SHARED |= {"budgeted", "chain"}
MOST_FRAMES = 6


def test_every_module_is_a_command_and_every_command_a_class_of_its_own() -> None:
    modules = {one.name for one in pkgutil.iter_modules(stages.__path__)} - SHARED
    assert modules == {name.replace("-", "_") for name in stages.NAMES}
    classes = [stages.load(name) for name in stages.NAMES]
    assert len(set(classes)) == len(classes)
    assert all(issubclass(one, Stage) for one in classes)
    assert all(stages.summary(name).endswith(".") for name in stages.NAMES)


def assert_most_needed_first(text: str, essential: tuple[str, ...]) -> None:
    """Flags of a section, and the sections, are in the order of `essential`; --dry-run is the last one of its
    section."""
    firsts = []
    for section in re.split(r"\n \S.*options\n", text)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("  -")]
        flags = [flag for line in lines for flag in re.findall(r"--[\w.-]+", line)]
        places = [essential.index(flag) for flag in flags if flag in essential]
        assert places == sorted(places)
        assert "--dry-run" not in flags[:-1]
        firsts += places[:1]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", stages.NAMES)
def test_help_shows_the_main_flags_and_help_all_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for asked in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([name, asked])
        texts.append(capsys.readouterr().out)
    short, whole = texts
    for flag in (*stages.load(name).essential, "--dry-run"):
        assert flag in whole
        assert flag in short, "an essential flag that does not exist, or is not shown"
    for flag in re.findall(r"--[\w.-]+", stages.load(name).less_memory):
        assert flag in whole
    if stages.load(name).essential:
        assert len(short.splitlines()) < len(whole.splitlines())
        assert "more flags: --help-all" in short
        assert_most_needed_first(short, stages.load(name).essential)
    assert not re.search(r"\bnull\b", whole), "a flag takes None; null is a word of YAML"
    positional = re.split(r"\n.* options ", whole.partition("positional arguments")[2])[0]
    assert "default: None" not in positional, "the place of an argument has no default"


def test_help_shows_the_range_of_a_flag_and_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sample", "--help"])
    flags = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "--sample.samples-per-mask INT (1 or more)" in flags
    assert "--num INT|None (1 or more), --sample.num INT|None (1 or more)" in flags
    assert "--sample.sampler.guidance FLOAT (0 or more)" in flags
    assert "--sample.target-modality {same,other}|STR (letters, digits and -)" in flags
    assert "--config STR|None" in flags, "a flag without a range keeps the name of its type"
    with pytest.raises(SystemExit, match="0"):
        main(["paint", "--help"])
    assert "ending: a folder with a DICOM series" in capsys.readouterr().out, "lines break where the help's end"


def test_what_is_mistyped_is_answered_with_what_was_meant(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["evalute"]) == 2
    assert "'evalute' is not a command; did you mean 'evaluate'?" in capsys.readouterr().err
    assert main(["train", "--config", "smok"]) == 2
    said = capsys.readouterr().err
    assert "did you mean smoke?" in said
    assert "best_ct_mr" in said
    for wrong, named in (
        (["--train.num-image", "4"], "--train.num-image, 4; did you mean --train.num-images"),
        (["--train.lr", "x"], "--train.lr: could not convert string to float: 'x'; `segdiff train --help-all`"),
        (["--train.precision", "fp8"], "invalid choice 'fp8' for argument '--train.precision'"),
    ):
        assert main(["train", *wrong]) == 2
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("error: command line: flags: ")
        assert named in first
        assert last == "1 problem; nothing was started"
    for args, named in (
        (["paint", "mask.png"], "mask.png; give -i mask.png; "),
        (["paint", "--guidance", "high"], "--guidance: 'high' is not FLOAT or None; "),
        (["train", "--train.micro-batch-size", "many"], "'many' is not INT or auto; "),
        (["sample", "--num", "many"], "--sample.num: 'many' is not INT or None; "),
        (["paint", "-i", "mask.png", "ct.png"], "ct.png; give -o ct.png; "),
        (["train", "runs/a"], "runs/a; give --data runs/a or --run runs/a; "),
        (["reproduce"], "Missing from segdiff reproduce: table1; "),
    ):
        assert main(args) == 2
        assert named in capsys.readouterr().err
    file = tmp_path / "f.yaml"
    file.write_text("train: {num_image: 4}\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "num_images" in capsys.readouterr().err


def test_a_shipped_configuration_goes_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    link = Path(__file__).parents[2] / "launch" / "configs" / "smoke.yaml"
    for given in ("smoke", str(shipped_config("smoke")), str(link)):
        main(["train", "--config", given, "--dry-run"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1] == printed[2]
    assert {"smoke", "demo", "best_ct_mr"} <= set(shipped_names())


@pytest.mark.parametrize(("pairs", "mix"), [(["CT", "1", "MR/axial", "0.5"], {"CT": 1.0, "MR/axial": 0.5}), ([], {})])
def test_pairs_replace_those_of_a_configuration(
    pairs: list[str], mix: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "--config", "best_ct_mr", "--loader.mix", *pairs, "--dry-run"])
    assert yaml.safe_load(capsys.readouterr().out)["loader"]["mix"] == mix
    for wrong in (["CT"], ["CT", "much"]):
        assert main(["train", "--config", "best_ct_mr", "--loader.mix", *wrong, "--dry-run"]) == 2
        assert "--loader.mix" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--config=smoke"],
        ["--config", "demo", "--config", "smoke"],
        ["--config=demo", "--train.seed", "3", "--config=smoke"],
    ],
)
def test_config_is_found_however_it_is_written(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *args, "--dry-run"])
    asked = yaml.safe_load(shipped_config("smoke").read_text())
    assert yaml.safe_load(capsys.readouterr().out)["train"]["num_images"] == asked["train"]["num_images"]


def test_the_package_is_a_command_and_completes_in_a_shell() -> None:
    run = [sys.executable, "-m", "segdiff_dist"]
    said = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("segdiff ")
    # As DeepSpeed's launcher starts a module.
    ended = subprocess.run([*run, "--local_rank=0", "train"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "--run: not given" in ended.stderr
    script = subprocess.run([*run, "--tyro-print-completion", "bash"], capture_output=True, text=True, check=True)
    assert "--train.num-images" in script.stdout
    assert "train-segmenter" in script.stdout


def test_the_classes_of_all_commands_load_no_heavy_library() -> None:
    heavy = {"torch", "diffusers", "monai", "deepspeed", "ray", "mlflow", "matplotlib", "pandas", "pyarrow", "scipy"}
    # Not `reproduce`, whose steps are resolved with the recipes.
    code = (
        "import sys; from segdiff_dist import stages\n"
        "[stages.load(name) for name in stages.NAMES if name != 'reproduce']; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert heavy.isdisjoint(loaded)


def test_costs_are_lines_for_a_person() -> None:
    cost = Cost(images=1200, seconds=5400.0, num_bytes=3_000_000, notes=("volumes: 6",))
    assert cost.lines() == ["images: 1,200", "time: 1.5 h", "disk: at most 3.0 MB", "volumes: 6"]
    assert Cost().lines() == ["cost: not known before it runs"]


def test_a_dry_run_of_a_training_says_what_it_takes_and_writes_nothing(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", "smoke", "--data", str(shapes), "--run", str(tmp_path / "run"), "--dry-run"]
    for name in ("train", "train-segmenter", "train-autoencoder"):
        assert main([name, *flags]) == 0
        said = capsys.readouterr().out
        for word in ("# images: ", "# time: ", "# disk: at most ", "# memory: about ", "# parameters: "):
            assert word in said, (name, word)
        assert yaml.safe_load(said)["run"] == str(tmp_path / "run")
    assert main(["convert", str(shapes), str(tmp_path / "new"), "--dry-run"]) == 0
    assert main(["inspect", str(shapes), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_stage_of_the_how_to_page_works(shapes: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add_a_stage.md").read_text()
    module = types.ModuleType("count_stage")
    # Read by the dataclass machinery, which looks the module up by its name.
    sys.modules[module.__name__] = module
    exec(compile(page.split("```python\n")[1].split("```")[0], "add_a_stage.md", "exec"), vars(module))
    experiment = replace(Experiment(), data=str(shapes))
    result = module.Count.of(experiment).over(experiment).check().start()
    assert [line.split(":")[0] for line in result.message] == ["train", "val", "test"]
    assert result.next_command == f"segdiff inspect {shapes}"


def test_few_frames_of_ours_lie_between_the_command_and_the_optimizer(shapes: Path, tmp_path: Path) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    frames: list[str] = []

    def stop(*_: Any) -> None:
        ours = Path(stages.__file__).parents[1]
        found = [frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(ours)]
        frames.extend(f"{Path(frame.filename).name}:{frame.function}" for frame in reversed(found))
        raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(stop)
    flags = ["--config", "smoke", "--data", str(shapes), "--run", str(tmp_path / "run"), "--tracking.no-enabled"]
    try:
        assert main(["train", *flags, "--train.zero-stage", "0", "--train.device", "cpu"]) == 130
    finally:
        hook.remove()
    assert frames[0] == "cli.py:main"
    assert len(frames) <= MOST_FRAMES, frames


def test_a_check_writes_nothing_and_is_made_once(
    archive: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tool that annotates is asked for its version once."""
    asked = tmp_path / "asked"
    tool = tmp_path / "tool.sh"
    tool.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo x >> {asked}; echo tool 1; exit; fi\ncp "$1" "$2"\n'
    )
    tool.chmod(0o755)
    flags = ["--annotate.tool", "command", "--annotate.command", f"{tool} {{image}} {{mask}}"]
    flags += ["--annotate.version-command", f"{tool} --version", "--tracking.no-enabled"]
    out = tmp_path / "new"
    before = bytes_of(archive.root)
    assert main(["annotate", str(archive.root), str(out), *flags, "--dry-run"]) == 0
    assert "# volumes: " in capsys.readouterr().out
    assert not out.exists()
    assert bytes_of(archive.root) == before
    asked.unlink()
    main(["annotate", str(archive.root), str(out), *flags])  # its masks are no masks: that costs the volumes
    assert asked.read_text() == "x\n"
