"""What the launchers of launch/cluster make of exit codes: what a restart may cure is started again, and no more."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "launch" / "cluster"
REFUSED, STOPPED_ITSELF, LOST_A_RANK, ASKED_TO_STOP, KILLED = 2, 3, 75, 130, 137


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [
        (0, 0, False),
        (REFUSED, 0, False),
        (STOPPED_ITSELF, 0, False),
        (LOST_A_RANK, 0, True),
        (LOST_A_RANK, 49, True),
        (LOST_A_RANK, 50, False),
        (ASKED_TO_STOP, 10, True),
        (KILLED, 10, True),
        (1, 2, True),
        (1, 3, False),
    ],
)
def test_a_slurm_job_is_queued_again_where_that_may_help(
    tmp_path: Path, code: int, restarts: int, queued: bool
) -> None:
    """Slurm is two commands here: `srun`, whose ranks end so, and `scontrol`, which writes down what it is asked."""
    for name, does in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" >> {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_RESTART_COUNT": str(restarts)}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", CLUSTER / "train.slurm", "--config", "F"], env=environment, cwd=tmp_path)
    assert done.returncode == code
    assert ("requeue 7" in (tmp_path / "asked").read_text().splitlines()) == queued


def test_elastic_ends_where_no_other_launch_is_called_for() -> None:
    spec = importlib.util.spec_from_file_location("elastic", CLUSTER / "elastic.py")
    assert spec is not None
    assert spec.loader is not None
    elastic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elastic)
    assert elastic.final_code({"a": 0, "b": 0}) == 0
    assert elastic.final_code({"a": REFUSED, "b": 1}) == REFUSED
    assert elastic.final_code({"a": LOST_A_RANK, "b": STOPPED_ITSELF}) == STOPPED_ITSELF
    assert elastic.final_code({"a": 0, "b": LOST_A_RANK}) is None
    assert elastic.final_code({"a": 1}) is None
    assert elastic.final_code({}) is None


def test_a_host_ends_with_the_code_of_the_rank_that_fails_first(tmp_path: Path) -> None:
    """Rank 5 stops itself; rank 4 would wait for it."""
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, sys, time\n"
        "rank = os.environ['RANK']\n"
        "pathlib.Path(f'rank-{rank}').write_text(' '.join([os.environ['LOCAL_RANK'], *sys.argv[1:]]))\n"
        f"sys.exit({STOPPED_ITSELF}) if rank == '5' else time.sleep(100)\n"
    )
    command = [sys.executable, CLUSTER / "host_ranks.py", "2", "4", "0.5", "rank.py", "--config", "F"]
    done = subprocess.run(command, cwd=tmp_path, timeout=60)
    assert done.returncode == STOPPED_ITSELF
    assert (tmp_path / "rank-5").read_text() == "1 --config F"
