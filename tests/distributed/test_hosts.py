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

ROOT = Path(__file__).parents[2]
CONFIG = """
loader: {num_threads: 1, flip: true}
denoiser: {block_out_channels: [16, 32], layers_per_block: 1, norm_num_groups: 8, attention_resolutions: [16]}
train:
  num_images: 512
  global_batch_size: 8
  micro_batch_size: 2
  warmup_images: 16
  checkpoint_every_images: 32
  log_every_images: 8
  precision: fp32
  zero_stage: 2
  device: cpu
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


def elastic(folder: Path, hostfile: str, shapes: Path, *options: str) -> subprocess.Popen[bytes]:
    folder.mkdir()
    (folder / "hostfile").write_text(hostfile)
    (folder / "given.yaml").write_text(CONFIG)
    training = [str(ROOT / "launch" / "train.py"), "--config", str(folder / "given.yaml"), "--run", str(folder / "run")]
    launcher = [sys.executable, str(ROOT / "launch" / "cluster" / "elastic.py"), "--hostfile", str(folder / "hostfile")]
    return subprocess.Popen(
        [*launcher, *options, "--grace-s", "40", *training, "--data", str(shapes)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("wb"),
    )


def log(folder: Path) -> list[dict[str, float]]:
    file = folder / "run" / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(folder: Path, images: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not any(row["images_seen"] >= images for row in log(folder)):
        assert process.poll() is None, (folder / "stderr").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "stderr").read_text()[-3000:]
        time.sleep(0.1)


def test_a_run_on_two_hosts_goes_on_with_the_one_that_is_left(hosts: Hosts, shapes: Path, tmp_path: Path) -> None:
    first, second = hosts.addresses
    two = tmp_path / "two"
    run_on = ["--run-on", f"{hosts.run_on_script} {{host}}"]
    process = elastic(two, f"{first} slots=1\n{second} slots=1\n", shapes, *run_on)
    wait_for(two, 64, process)
    lost_at = len(log(two))
    # The first host is the one that everything hangs on: rank 0, its store, the log and the checkpoints' markers.
    hosts.lose(first)
    began = time.monotonic()
    assert process.wait(timeout=300) == 0, (two / "stderr").read_text()[-5000:]
    said = (two / "stderr").read_text()
    print(said[-3000:], f"lost at line {lost_at}, done after {time.monotonic() - began:.0f} s", sep="\n")
    assert f"rank 1 (host-2) stops: rank 0 at {first}" in said
    assert "1 of 2 hosts answer; from 0000000" in said

    one = tmp_path / "one"
    assert elastic(one, f"{second} slots=1\n", shapes, *run_on).wait(timeout=300) == 0, (one / "stderr").read_text()
    assert [row["images_seen"] for row in log(two)] == list(range(8, 513, 8))
    losses = [[row["loss"] for row in log(folder)] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
