"""What ranks must agree on before they start, and what they tell each other while they train: real ranks over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_support import agreeing, exchanging, ranks

import data_shards
import segdiff_dist
import segdiff_kernels
from segdiff_dist.ranks.distributed import DelayedMax, check_agreement, code_versions, format_ranks
from segdiff_dist.ranks.heartbeat import Heartbeat, RankMonitor, RankStatus


def test_ranks_that_differ_are_named_with_what_they_have(tmp_path: Path) -> None:
    differing = {1: {"train.lr": "0.01", "long": "a" * 4999 + "b"}, 3: {"only here": "x"}}
    with ranks(4, tmp_path, agreeing, differing) as started:
        assert [started.ended(rank, within_s=60) for rank in range(4)] == [0] * 4, started.stderr(0)
    found = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(4)]
    assert found[1:] == found[:1] * 3
    values = {field: value for where, field, value in found[0]}
    host = socket.gethostname()
    assert set(values) == {"long", "only here", "train.lr"}
    assert values["train.lr"] == f"'0.001' on ranks 0, 2-3 ({host}), '0.01' on rank 1 ({host})"
    assert values["only here"] == f"nothing on ranks 0-2 ({host}), 'x' on rank 3 ({host})"
    assert len(values["long"]) < 300
    assert values["long"].count("sha256") == 2


def test_one_rank_needs_no_name_of_its_machine(tmp_path: Path) -> None:
    """As in a container, whose name often leads nowhere: gloo warned of it at every start."""
    others = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname leads-nowhere; exec "$0" "$@"']
    if subprocess.run([*others, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no names of its own to a process")
    (tmp_path / "one.py").write_text(
        "import torch.distributed as dist\n"
        "from segdiff_dist.ranks.distributed import prepare_environment\n"
        "prepare_environment()\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    without = {name: value for name, value in os.environ.items() if name not in ("RANK", "GLOO_SOCKET_IFNAME")}
    command = [*others, sys.executable, str(tmp_path / "one.py")]
    ended = subprocess.run(command, capture_output=True, text=True, env=without, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "hostname" not in ended.stderr


def test_ranks_that_agree_go_on(tmp_path: Path) -> None:
    with ranks(2, tmp_path, agreeing, {}) as started:
        assert [started.ended(rank, within_s=60) for rank in range(2)] == [0, 0], started.stderr(0)
    assert json.loads((tmp_path / "found-1").read_text()) == []


def test_all_ranks_hear_of_a_stop_at_the_same_step(tmp_path: Path) -> None:
    with ranks(3, tmp_path, exchanging) as started:
        assert [started.ended(rank, within_s=60) for rank in range(3)] == [0] * 3, started.stderr(0)
    agreed = [json.loads((tmp_path / f"agreed-{rank}").read_text()) for rank in range(3)]
    assert agreed[1:] == agreed[:1] * 2
    assert [step["stop"] for step in agreed[0]] == [0, 0, 0, 1, 0, 0]
    assert [step["fraction"] for step in agreed[0]] == [0, 0.2, 1.2, 2.2, 3.2, 4.2]


def test_a_world_of_one_behaves_like_many_and_starts_nothing() -> None:
    check_agreement({"train.lr": "0.001"})
    maxima = DelayedMax(("stop",))
    assert [maxima.exchange({"stop": value})["stop"] for value in (1.0, 0.0, 0.0)] == [0, 1, 0]
    with Heartbeat(0.001, dead_after_s=0.001) as heartbeat, heartbeat.patience(0.001):
        heartbeat.beat(8)


def test_a_put_without_a_value_is_our_own_mistake() -> None:
    with pytest.raises(KeyError):
        DelayedMax(("stop", "signal")).exchange({"stop": 1.0})


def test_ranks_are_named_in_spans_with_their_hosts() -> None:
    hosts = [f"node-{n // 8}" for n in range(64)]
    assert format_ranks([3], hosts) == "rank 3 (node-0)"
    assert format_ranks([0, 1, 2, 9, 11, 12], hosts) == "ranks 0-2, 9, 11-12 (node-0, node-1)"
    assert format_ranks(range(64), hosts) == "ranks 0-63 (node-0, node-1, node-2, node-3 and 4 more)"


def test_code_that_differs_has_another_digest(tmp_path: Path) -> None:
    script = 'from segdiff_dist.ranks.distributed import code_versions; print(code_versions()["segdiff\'s code"])'

    def digest() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    for package in (data_shards, segdiff_dist, segdiff_kernels):
        (tmp_path / package.__name__).symlink_to(Path(package.__path__[0]))
    assert digest() == code_versions()["segdiff's code"]
    (tmp_path / "segdiff_kernels").unlink()
    (tmp_path / "segdiff_kernels").mkdir()
    (tmp_path / "segdiff_kernels" / "__init__.py").write_text("x = 1\n")
    assert digest() != code_versions()["segdiff's code"]


class Trial:
    """512 ranks on 64 hosts in lockstep before a RankMonitor, a second a round."""

    def __init__(self) -> None:
        self.statuses = [RankStatus(f"node-{n // 8}", n) for n in range(512)]
        self.monitor = RankMonitor(512, hang_timeout_s=600, dead_after_s=15, interval_s=1)
        self.now_s = 0.0

    def rounds(self, number: int, silent: tuple[int, ...] = (), stuck: tuple[int, ...] = ()) -> str | None:
        """The first reason within so many rounds."""
        for _ in range(number):
            self.now_s += 1
            for n, status in enumerate(self.statuses):
                status.ticks += n not in silent
                if n not in stuck:
                    status.beats, status.images_seen = status.beats + 1, status.images_seen + 4096
            # As the store does, hand over copies.
            reason = self.monitor.check([RankStatus(**vars(status)) for status in self.statuses], (), self.now_s)
            if reason is not None:
                return reason.message
        return None


def test_of_512_ranks_the_dead_and_the_slowest_are_named() -> None:
    trial = Trial()
    assert trial.rounds(100) is None
    assert trial.rounds(14, silent=tuple(range(8, 16))) is None
    assert (trial.rounds(2, silent=tuple(range(8, 16))) or "").startswith("ranks 8-15 (node-1) gave no sign of life")

    trial = Trial()
    trial.rounds(10)
    trial.statuses[77].where = "read (batch_reader.py:10)"
    trial.statuses[77].beats -= 1
    everyone = tuple(range(512))
    assert trial.rounds(599, stuck=everyone) is None
    why = trial.rounds(2, stuck=everyone) or ""
    assert why.startswith("rank 77 (node-9) hangs at 40,960 images in read (batch_reader.py:10): for 600 s no main")


def test_an_error_of_all_ranks_is_left_to_them_and_one_of_a_single_rank_is_reported() -> None:
    trial = Trial()
    trial.rounds(10)
    trial.statuses[5].state = "failed: ValueError: x"
    assert trial.rounds(1) is None
    assert trial.rounds(1) == "rank 5 (node-0) failed: ValueError: x"


def test_patience_of_one_rank_holds_for_all_and_ends() -> None:
    trial = Trial()
    trial.rounds(10)
    trial.statuses[3].patience_s = 1000
    everyone = tuple(range(512))
    assert trial.rounds(999, stuck=everyone) is None
    assert "hangs" in (trial.rounds(2, stuck=everyone) or "")


def test_ranks_that_have_left_are_not_missed() -> None:
    trial = Trial()
    trial.rounds(10)
    for status in trial.statuses[1:]:
        status.state = "left"
    assert trial.rounds(100, silent=tuple(range(1, 512))) is None
    trial.statuses[0].state = "left"
    assert trial.rounds(1) is None
    assert trial.monitor.all_left.is_set()


def test_a_rank_that_was_interrupted_alone_is_reported_to_the_others() -> None:
    trial = Trial()
    trial.rounds(10)
    trial.statuses[0].state = "interrupted"
    assert trial.rounds(15) is None
    assert trial.rounds(10) == "rank 0 (node-0) left while the others still needed it"


def test_a_rank_that_never_begins_is_named() -> None:
    monitor = RankMonitor(4, hang_timeout_s=60, dead_after_s=15, interval_s=1)
    reasons = [monitor.check(None, (2,), now_s=float(second)) for second in range(62)]
    assert reasons[:61] == [None] * 61
    assert reasons[61] is not None
    assert "rank 2 has not begun to train within 60 s" in reasons[61].message
