"""One training across two hosts of this machine, network namespaces with addresses of their own; one host is lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from segdiff_dist.cli import main
from segdiff_dist.training.loop import TrainingStopped

ROOT = Path(__file__).parents[2]
CONFIG = """
loader: {num_threads: 1, flip: true}
denoiser: {block_out_channels: [16, 32], layers_per_block: 1, norm_num_groups: 8, attention_resolutions: [16]}
train:
  num_images: 128
  global_batch_size: 8
  micro_batch_size: 2
  warmup_images: 16
  checkpoint_every_images: 32
  log_every_images: 8
  precision: fp32
  zero_stage: 2
  device: cpu
validation: {num_images: 8, num_pictures: 2, num_steps: 3}
tracking: {enabled: false}
"""


def run(command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(shlex.split(command), check=check, capture_output=True, text=True)


class Hosts:
    """Two namespaces, named by their addresses, with names of their own in messages, joined by a cable."""

    def __init__(self, folder: Path) -> None:
        network = f"10.{64 + os.getpid() // 250 % 128}.{os.getpid() % 250}"
        self.addresses = (f"{network}.1", f"{network}.2")
        self._folder = folder
        self.run_on_script = folder / "run-on"
        self.run_on_script.write_text(
            f"#!/bin/sh\n# A shell command on a host, as ssh would run it.\n[ ! -e {folder}/lost-$1 ] || exit 255\n"
            'exec ip netns exec "$1" unshare --uts sh -c \'hostname "host-${0##*.}"; exec sh -c "$1"\' "$1" "$2"\n'
        )
        self.run_on_script.chmod(0o755)

    def make(self) -> None:
        for address in self.addresses:
            run(f"ip netns add {address}")
            run(f"ip -n {address} link set lo up")
        first, second = self.addresses
        run(f"ip -n {first} link add cable type veth peer name cable netns {second}")
        for address in self.addresses:
            run(f"ip -n {address} address add {address}/24 dev cable")
            run(f"ip -n {address} link set cable up")

    def lose(self, address: str) -> None:
        """As when its power goes: nothing says goodbye, and it does not answer any more."""
        (self._folder / f"lost-{address}").touch()
        run(f"ip -n {address} link set cable down")
        self.kill(address)

    def kill(self, address: str) -> None:
        for pid in run(f"ip netns pids {address}", check=False).stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:  # ended since it was listed
                continue

    def remove(self) -> None:
        for address in self.addresses:
            self.kill(address)
            run(f"ip netns delete {address}", check=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("makes network namespaces, which takes root")
    made = Hosts(tmp_path)
    try:
        try:
            made.make()
            run(f"{made.run_on_script} {made.addresses[0]} true")
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            pytest.skip(f"no network namespaces here: {error} {getattr(error, 'stderr', '')}")
        yield made
    finally:
        made.remove()


def training(folder: Path, shapes: Path, *flags: str) -> list[str]:
    """Of launch/train.py, a run in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "given.yaml").write_text(CONFIG)
    given = ["--config", str(folder / "given.yaml"), "--run", str(folder / "run"), "--data", str(shapes)]
    return [str(ROOT / "launch" / "train.py"), *given, *flags]


started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def leave_nothing_running() -> Iterator[None]:
    """A launcher that is asked to stop takes its ranks with it."""
    yield
    for process in started:
        process.terminate()
    for process in started:
        process.wait(timeout=120)
    started.clear()


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=(folder / "stdout").open("wb"),
        stderr=(folder / "stderr").open("wb"),
    )
    started.append(process)
    return process


def elastic(folder: Path, hostfile: str, run_on: str, command: list[str]) -> subprocess.Popen[bytes]:
    (folder / "hostfile").write_text(hostfile)
    launcher = [str(ROOT / "launch" / "cluster" / "elastic.py"), "--hostfile", str(folder / "hostfile")]
    port = str(20000 + os.getpid() % 10000)
    return start(folder, [*launcher, "--run-on", run_on, "--port", port, "--grace-s", "40", *command])


def run_here(command: list[str]) -> int:
    """The exit code of launch/train.py, in this process, which has imported already what takes seconds."""
    before = dict(os.environ)
    try:
        return main(["train", *command[1:]])
    finally:  # RANK and the like are not for processes that start later
        os.environ.clear()
        os.environ.update(before)


def log(folder: Path) -> list[dict[str, float]]:
    file = folder / "run" / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(folder: Path, images: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not any(row["images_seen"] >= images for row in log(folder)):
        assert process.poll() is None, (folder / "stderr").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "stderr").read_text()[-3000:]
        time.sleep(0.1)


def said(folder: Path) -> str:
    return (folder / "stderr").read_text()


def test_a_run_on_two_hosts_goes_on_with_the_one_that_is_left(hosts: Hosts, small_shapes: Path, tmp_path: Path) -> None:
    first, second = hosts.addresses
    one, two = tmp_path / "one", tmp_path / "two"
    command = training(two, small_shapes)
    process = elastic(two, f"{first} slots=1\n{second} slots=1\n", f"{hosts.run_on_script} {{host}}", command)
    wait_for(two, 64, process)
    # The first host is the one that everything hangs on: rank 0, its store, the log and the checkpoints' markers.
    hosts.lose(first)
    # Meanwhile the same run undisturbed, on one rank.
    assert run_here(training(one, small_shapes)) == 0
    assert process.wait(timeout=200) == 0, said(two)[-5000:]
    assert f"rank 1 (host-2) stops: rank 0 at {first}" in said(two)
    assert "1 of 2 hosts answer; from 0000000" in said(two)

    assert [row["images_seen"] for row in log(two)] == list(range(8, 129, 8))
    losses = [[row["loss"] for row in log(folder)] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_asked_to_stop_the_ranks_save_first(small_shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = elastic(
        folder,
        "127.0.0.1 slots=3  # 8 images divide by 2 ranks of 2, not by 3\n",
        "sh -c",
        training(folder, small_shapes, "--train.num-images", "100000", "--train.checkpoint-every-images", "100000"),
    )
    wait_for(folder, 16, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 130, said(folder)[-5000:]
    assert "{'127.0.0.1': 2}" in said(folder)
    [saved] = (folder / "run" / "checkpoints").glob("*/COMPLETE")
    # Not where the config wants one, but where the run stood.
    assert int(saved.parent.name) == log(folder)[-1]["images_seen"]
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
    assert left == ""


def ending(folder: Path, code: int) -> list[str]:
    """A script in place of launch/train.py that prints its settings, or ends with this exit code."""
    folder.mkdir()
    shown = f"run: {folder / 'run'}\\ntrain: {{global_batch_size: 8, micro_batch_size: 2}}"
    script = f"import sys\nif '--dry-run' not in sys.argv:\n    sys.exit({code})\nprint('{shown}')\n"
    (folder / "train.py").write_text(script)
    return [str(folder / "train.py")]


@pytest.mark.parametrize("code", [2, TrainingStopped.exit_code])
def test_what_training_refuses_or_stops_is_not_tried_again(tmp_path: Path, code: int) -> None:
    """By the exit code, here of a script that does nothing else."""
    folder = tmp_path / "ended"
    process = elastic(folder, "127.0.0.1 slots=1\n", "sh -c", ending(folder, code))
    assert process.wait(timeout=120) == code, said(folder)[-5000:]
    assert said(folder).count("hosts answer") == 1


def test_a_training_that_stops_itself_ends_with_a_code_of_its_own(small_shapes: Path, tmp_path: Path) -> None:
    flags = ["--train.lr", "1e30", "--train.warmup-images", "0", "--train.max-skipped-steps", "2"]
    assert run_here(training(tmp_path / "learns-nothing", small_shapes, *flags)) == TrainingStopped.exit_code


def test_hosts_that_never_answer_are_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    command = ending(folder, 2)
    process = elastic(folder, "node-0 slots=8\n", "false", ["--restarts", "1", *command])
    assert process.wait(timeout=120) == 1
    assert said(folder).count("0 of 1 hosts answer") == 2
    assert "without a new checkpoint: 2" in said(folder)
