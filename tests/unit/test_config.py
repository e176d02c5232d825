"""Configuration: YAML, flags and run folders, what wins, and what is refused with which words."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_shards.field_source import FROM_A_PERSON
from data_shards.locks import locked
from data_shards.problems import InputProblems
from segdiff_dist.cli import main
from segdiff_dist.config import as_dict, differences, merge, to_yaml
from segdiff_dist.experiment import Experiment, load_experiment, refuse_another_config, save_experiment

CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("*.yaml"))


def dry_run(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main([*args, "--dry-run"]) == 2  # after the settings it says that there is no shard set
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_whole(path: Path) -> None:
    experiment = load_experiment(path, None)
    size = experiment.loader.crop_size or experiment.prepare.size
    found = [
        *experiment.phantom.problems(),
        *experiment.prepare.problems(),
        *experiment.loader.problems(),
        *experiment.denoiser.problems(size),
        *experiment.diffusion.problems(),
        *experiment.train.problems("train"),
        *experiment.segmenter.problems(size),
        *experiment.sample.problems(),
        *experiment.evaluate.problems(),
    ]
    assert [str(p) for p in found] == []


def test_a_dry_run_prints_a_config_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = dry_run(capsys, "train", "--train.zero-stage", "2", "--denoiser.block-out-channels", "32", "64")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(values))
    again = load_experiment(tmp_path / "again.yaml", None)
    assert again.train.zero_stage == 2
    assert again.denoiser.block_out_channels == (32, 64)
    assert as_dict(again) == values


def test_later_sources_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", tmp_path / "f.yaml"
    run.mkdir()
    (run / "config.yaml").write_text("train: {lr: 1.0, seed: 1, num_images: 11}\n")
    file.write_text(f"run: {run}\ntrain: {{lr: 2.0, seed: 2}}\n")
    values = dry_run(capsys, "train", "--config", str(file), "--train.lr", "3")["train"]
    assert (values["lr"], values["seed"], values["num_images"], values["zero_stage"]) == (3.0, 2, 11, 1)


def test_short_flags_of_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    values = dry_run(capsys, "sample", "--run", "r", "--data", "d", "--split", "val", "--num", "7")
    assert (values["run"], values["data"], values["sample"]["split"], values["sample"]["num"]) == ("r", "d", "val", 7)


def test_all_wrong_keys_and_values_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("trian: {}\ntrain: {lr: fast, zero_stag: 1}\ndenoiser: {mask_encoding: rgb}\nloader:\n")
    assert main(["train", "--config", str(file)]) == 2
    text = capsys.readouterr().err
    for words in ("trian: unknown key", "train.lr", "'fast'", "train.zero_stag: unknown key", "denoiser.mask_encoding"):
        assert words in text
    assert "loader: None; give keys of this section" in text
    assert "5 problems" in text
    assert str(file) in text


def test_what_is_missing_is_said_before_work_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "none")]) == 2
    assert "not a folder" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["train"]) == 2
    text = capsys.readouterr().err
    assert "run: not given" in text
    assert "data: not given" in text
    assert main(["tarin"]) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_on_this_machine(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pathlib makes one slash of two: a run in the folder `s3:` here is not what was asked for."""
    monkeypatch.chdir(tmp_path)
    for command in ("train", "sample"):
        assert main([command, "--run", "s3://bucket/run", "--data", str(shapes), "--dry-run"]) == 2
        assert "--run: s3://bucket/run; give a folder on this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--train.device", "cuda"], "no CUDA GPU"),
        (["--denoiser.attention", "xformers"], "xformers needs a CUDA GPU"),
        (["--train.zero-stage", "7"], "train.zero_stage: 7"),
        (["--train.global-batch-size", "7", "--train.micro-batch-size", "2"], "multiple of micro_batch_size"),
        (["--loader.crop-size", "4096"], "loader.crop_size: 4096"),
        (["--diffusion.zero-terminal-snr"], "prediction_type v or x0"),
    ],
)
def test_values_out_of_range(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    assert main(["train", "--run", str(tmp_path / "run"), "--data", str(shapes), *args]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_keeps_its_config(tmp_path: Path) -> None:
    base = load_experiment(None, None)
    experiment = Experiment(**{**base.__dict__, "run": tmp_path})
    save_experiment(experiment, ("train",))
    started = tmp_path / "checkpoints"
    other = Experiment(
        **{**experiment.__dict__, "train": type(base.train)(lr=5.0, seed=9, device="cpu", keep_checkpoints=9)}
    )
    refuse_another_config(other, started, ("train",))  # nothing has begun yet
    started.mkdir()
    refuse_another_config(experiment, started, ("train", "denoiser"))
    with pytest.raises(InputProblems) as error:
        refuse_another_config(other, started, ("train",))
    assert [p.field for p in error.value.problems] == ["train.lr", "train.seed"]


def test_a_later_stage_leaves_what_others_have_settled(tmp_path: Path) -> None:
    """Sampling with another --config changes neither what was trained nor what training goes on with."""
    base = replace(load_experiment(None, None), run=tmp_path, data="shards")
    save_experiment(base, ("train",))
    checkpoint = tmp_path / "checkpoints" / "000000000064"
    checkpoint.mkdir(parents=True)
    shutil.copy(tmp_path / "config.yaml", checkpoint)
    other = replace(
        base,
        data="others",
        train=replace(base.train, lr=5.0),
        loader=replace(base.loader, modalities=("CT",)),
        sample=replace(base.sample, seed=7),
        segmenter=replace(base.segmenter, first_stride=1),
    )
    save_experiment(other, ("sample",))
    kept = load_experiment(None, tmp_path)
    assert (kept.train, kept.loader, kept.data, kept.sample.seed) == (base.train, base.loader, "shards", 7)
    assert kept.segmenter.first_stride == 1  # no segmenter has begun, so it is still to be settled
    # Even where the file was changed by hand, training goes by what its checkpoints were trained with.
    save_experiment(other, ("train",))
    with pytest.raises(InputProblems, match=f"{checkpoint.name}.*train.lr: 0.0001 there, 5.0 now"):
        refuse_another_config(load_experiment(None, tmp_path), tmp_path / "checkpoints", ("train",))


def test_a_stage_leaves_the_settings_of_another_one_that_is_at_work(tmp_path: Path) -> None:
    """Two stages of one run folder with other settings: the one that began first has left no file yet."""
    base = replace(load_experiment(None, None), run=tmp_path)
    other = replace(base, train=replace(base.train, lr=5.0), sample=replace(base.sample, seed=7))
    with locked(tmp_path / ".train.lock", tmp_path, "is training there"):
        save_experiment(base, ("train",))
        save_experiment(other, ("sample",))
    kept = load_experiment(None, tmp_path)
    assert (kept.train.lr, kept.sample.seed) == (base.train.lr, 7)
    save_experiment(other, ("sample",))
    assert load_experiment(None, tmp_path).train.lr == 5.0, "nothing of it is left"


def test_commands_addresses_and_paths_to_write_are_not_taken_from_a_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = {
        "run": "/elsewhere",
        "data": "http://attacker/set",
        "more_data": ["/local", "simplecache::s3://attacker/set"],
        "wholebody": "/elsewhere/masks",
        "exported": "/elsewhere/out",
        "annotate": {"tool": "command", "command": "touch {image} {mask}", "version_command": "touch /elsewhere"},
        "prepare": {"ray_address": "10.9.8.7:6379", "size": 64},
        "convert": {"ray_address": "10.9.8.7:6379"},
        "sample": {"ray_address": "10.9.8.7:6379", "out": "/elsewhere/samples", "num": 7},
        "evaluate": {"ray_address": "10.9.8.7:6379", "fid_weights": "download", "lpips_weights": "weights.pth"},
        "loader": {"cache_dir": "/elsewhere/cache", "cache_gib": 1.0},
        "tracking": {"adopt": True},
    }
    (tmp_path / "config.yaml").write_text(to_yaml(evil))
    taken, default = load_experiment(None, tmp_path), Experiment()
    assert (taken.run, taken.data, taken.more_data, taken.wholebody) == (tmp_path, None, (), None)
    assert taken.annotate == replace(default.annotate, tool="command")
    assert taken.prepare == replace(default.prepare, size=64)
    assert taken.convert == default.convert
    assert taken.sample == replace(default.sample, num=7)
    assert taken.evaluate == replace(default.evaluate, lpips_weights=Path("weights.pth"))
    assert taken.loader == replace(default.loader, cache_gib=1.0)
    assert taken.tracking == default.tracking
    # What a person names in a file of their own is taken, and wins.
    assert load_experiment(tmp_path / "config.yaml", None).sample.ray_address == "10.9.8.7:6379"

    asked = ["sample", "--run", str(tmp_path), "--data", "here", "--dry-run"]
    assert main(asked) == 2  # there is no set "here"
    said = capsys.readouterr()
    assert "10.9.8.7" not in said.out
    assert "sample.ray_address: '10.9.8.7:6379' is not taken from a run folder; give it" in said.err
    assert "http://attacker" not in said.err  # --data was given
    # The folder that `prepare` writes is named by a person, also where it is on this machine.
    (tmp_path / "config.yaml").write_text(to_yaml({"amos_root": "/elsewhere", "data": "/elsewhere/shards"}))
    assert main(["prepare", "--run", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "DATA: not given" in said.err
    assert "OUT: not given" in said.err
    assert load_experiment(None, tmp_path).data == "/elsewhere/shards"


def test_every_field_that_runs_connects_or_writes_is_a_persons() -> None:
    def of(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for one in fields(section):
            if is_dataclass(one.default_factory):
                yield from of(one.default_factory, f"{prefix}{one.name}.")
            else:
                yield f"{prefix}{one.name}", one

    risky = re.compile(r"command|address|uri|url|host|port$|(^|[._])out$|cache_dir|adopt|exported|converted|compared")
    assert [name for name, one in of(Experiment) if risky.search(name) and one.metadata != FROM_A_PERSON] == []


def test_merge_and_differences() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}}) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == [("a.b", 1, 3)]
