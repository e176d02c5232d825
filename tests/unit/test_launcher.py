"""What an earlier launch left in a shell: RANK, WORLD_SIZE, MASTER_ADDR."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from segdiff_dist import cli
from segdiff_dist.ranks.distributed import launcher_problems, leave_launcher, naming_missing_ranks

STALE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}


def stale(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_who_waits_says_for_whom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch.distributed as dist

    stale(monkeypatch, **STALE)
    with pytest.raises(dist.DistError), naming_missing_ranks(after_s=0.2):
        dist.TCPStore("127.0.0.1", 29577, 4, is_master=False, timeout=timedelta(seconds=1))
    error = capsys.readouterr().err
    assert "rank 1 of 4 has waited 0 s for rank 0 at 127.0.0.1:29577" in error
    assert "`unset RANK WORLD_SIZE MASTER_ADDR`" in error


def test_the_main_rank_names_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stale(monkeypatch, **{**STALE, "RANK": "0"})
    with naming_missing_ranks(after_s=0.01):
        time.sleep(0.2)
    assert "rank 0 of 4 has waited 0 s for ranks 1 to 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")]
)
def test_a_signal_ends_who_waits_in_vain(number: signal.Signals, code: int, words: str, tmp_path: Path) -> None:
    waits = (
        "import signal, sys; from datetime import timedelta; from pathlib import Path\n"
        "import torch.distributed as dist\n"
        "from data_shards.locks import locked\n"
        "from data_shards.end_signals import ended_by_signals\n"
        "from segdiff_dist.ranks.distributed import naming_missing_ranks\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "lock = Path(sys.argv[1], '.lock')\n"
        "with ended_by_signals(), locked(lock, lock.parent, 'trains'), naming_missing_ranks(after_s=0.2):\n"
        "    dist.TCPStore('127.0.0.1', 0, 4, is_master=True, timeout=timedelta(seconds=60))"
    )
    environment = {**os.environ, **STALE, "RANK": "0"}
    command = [sys.executable, "-c", waits, str(tmp_path)]
    waiting = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    assert "has waited" in waiting.stderr.readline()
    waiting.send_signal(number)
    assert waiting.wait(timeout=20) == code
    assert f"{words}; the same command continues from here" in waiting.stderr.read()
    assert not list(tmp_path.iterdir())


def test_who_meets_in_time_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stale(monkeypatch, **STALE)
    with naming_missing_ranks(after_s=0.2):
        pass
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_command_of_one_process_is_the_main_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale(monkeypatch, **STALE)
    assert cli.main(["sample", "--dry-run"]) == 2  # neither run nor data are given
    out, error = capsys.readouterr()
    assert "denoiser:" in out  # which only the main rank prints
    assert "note: sample is one process: RANK=1 WORLD_SIZE=4" in error
    assert leave_launcher("sample") is None


def test_a_world_of_one_is_forgotten_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    stale(monkeypatch, **{**STALE, "RANK": "0", "WORLD_SIZE": "1"})
    assert leave_launcher("sample") is None
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)


@pytest.mark.parametrize(
    "values",
    [
        *({"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "one", "WORLD_SIZE": "2"}),
        {"RANK": "0", "WORLD_SIZE": "2"},  # nor the address of rank 0
    ],
)
def test_what_no_launcher_sets_is_refused(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale(monkeypatch, **values)
    assert cli.main(["train", "--dry-run"]) == 2
    assert "no launcher sets that; where no launcher started" in capsys.readouterr().err


def test_what_launchers_set_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for values in ({}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, STALE):
        stale(monkeypatch, **values)
        assert launcher_problems() == []
