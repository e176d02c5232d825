"""Train on the machines of a hostfile, and continue with the others when one is lost.

    python launch/cluster/elastic.py --hostfile launch/cluster/hostfile launch/train.py --config F --run R

It finds out which machines answer and starts the ranks of each (host_ranks.py). When the run fails, it starts the run
again from the newest complete checkpoint, on the machines that answer then. The machines need the repository and its
.venv at the same path, and a shared file system with shards and run folder.

torchrun is not enough here. It takes any number of ranks, also one that does not divide the global batch. It counts all
restarts rather than those since the last checkpoint, and restarts also after refused input (exit code 2). It ends when
the machine of its rendezvous is lost, and must itself be started on every machine.

It uses as many slots as divide the global batch: train.global_batch_size must be a multiple of micro_batch_size *
ranks, and neither changes. A global batch of 3 * 2^k leaves few slots idle. Ctrl-C, SIGTERM and SIGUSR1 let the ranks
save a checkpoint and end the run.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from segdiff_dist.planning.scaling import most_ranks

BIN = Path(sys.executable).parent
HOST_RANKS = str(Path(__file__).resolve().with_name("host_ranks.py"))
# `segdiff`'s exit codes for refused input and for a training that stopped itself: the next launch would end in the same
# way.
FINAL = (2, 3)
FORWARDED = ("CUDA_", "DS_", "GLOO_", "NCCL_", "OMP_", "TORCH_")


def main() -> int:
    """Launch until the run is done. 0 done, 1 given up, 2 input refused, 3 stopped itself, 130 interrupted."""
    given = parse()
    hosts = read_hostfile(given.hostfile)
    checkpoints, global_batch_size, micro_batch_size = settings(given.training)
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: asked.append(received))
    failures, attempt = 0, 0
    while not asked:
        answering = run_on_all(hosts, given.run_on, f"test -x {shlex.quote(sys.executable)}", timeout_s=15)
        slots = first_slots({host: hosts[host] for host in answering}, global_batch_size, micro_batch_size)
        before = newest_complete(checkpoints)
        say(f"{len(answering)} of {len(hosts)} hosts answer; from {before or 'the start'} on {slots or 'none of them'}")
        codes = Launch(slots, given.port + attempt % 1000, given).wait(given.grace_s, asked)
        if (final := final_code(codes)) is not None:
            return final
        if asked:
            break
        attempt, failures = attempt + 1, 0 if newest_complete(checkpoints) > before else failures + 1
        say(f"exit codes {codes}; launches in a row without a new checkpoint: {failures}")
        if failures > given.restarts:
            return 1
        time.sleep(5 * failures)
    return 130


class Launch:
    """One attempt: the ranks of each host, in a process group of their own."""

    def __init__(self, slots: dict[str, int], port: int, given: argparse.Namespace) -> None:
        # A new private folder on every host, under a name at which nobody else can have made a link.
        self._run_on, self._private = given.run_on, f"/tmp/segdiff-elastic-{secrets.token_hex(8)}-{{host}}"
        common = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        common |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
        common |= {"MASTER_ADDR": given.master_addr or next(iter(slots), ""), "MASTER_PORT": str(port)}
        common |= {"WORLD_SIZE": str(sum(slots.values()))}
        self._processes, first_rank = {}, 0
        for host, number in slots.items():
            ranks = [sys.executable, HOST_RANKS, str(number), str(first_rank), str(given.grace_s), *given.training]
            first_rank += number
            # What starts the ranks ignores SIGUSR1, so only the ranks react to it.
            inner = f"umask 077; mkdir {self._private} && echo $$ > {self._private}/pid || exit 1; umask {umask()}; "
            inner += f"trap '' USR1; exec {shlex.join(ranks)}"
            variables = [f"{name}={value}" for name, value in common.items()]
            outer = ["env", *variables, "setsid", "--wait", "sh", "-c", inner.replace("{host}", host)]
            there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(outer)}"
            argv = [*shlex.split(given.run_on.replace("{host}", host)), there]
            # Detached from the terminal, so that only this process gets Ctrl-C.
            self._processes[host] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait(self, grace_s: float, asked: list[int]) -> dict[str, int]:
        """Each host's exit code. When one has failed, or a stop was requested, the others get `grace_s` to end."""
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes.values()) and time.monotonic() < deadline:
            if deadline == float("inf") and (asked or any(process.poll() for process in self._processes.values())):
                deadline = time.monotonic() + grace_s
                if asked:
                    say(f"{signal.Signals(asked[0]).name}: the ranks save a checkpoint")
                    self._everywhere(f"kill -s USR1 -- -$(cat {self._private}/pid)")
            time.sleep(0.2)
        self._everywhere(f"kill -s KILL -- -$(cat {self._private}/pid); rm -rf {self._private}")
        for process in self._processes.values():
            process.kill()
        return {host: process.wait() for host, process in self._processes.items()}

    def _everywhere(self, command: str) -> None:
        run_on_all(self._processes, self._run_on, command, timeout_s=10)


def umask() -> str:
    """This process' umask, for a shell."""
    before = os.umask(0o077)
    os.umask(before)
    return f"{before:03o}"


def final_code(codes: dict[str, int]) -> int | None:
    """The run's exit code, or None if another launch must follow. `codes`: exit code by host, empty if no host
    answered."""
    if codes and not any(codes.values()):
        return 0
    return next((code for code in FINAL if code in codes.values()), None)


def run_on_all(hosts: Iterable[str], run_on: str, command: str, timeout_s: float) -> list[str]:
    """Run a shell command, with {host} filled in, on all hosts at once; returns the hosts on which it succeeded in
    time."""

    def succeeds(host: str) -> bool:
        argv = [*shlex.split(run_on.replace("{host}", host)), command.replace("{host}", host)]
        try:
            return not subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s).returncode
        except subprocess.TimeoutExpired:
            return False

    with ThreadPoolExecutor(64) as pool:
        return [host for host, well in zip(hosts, pool.map(succeeds, hosts), strict=True) if well]


def first_slots(slots: dict[str, int], global_batch_size: int, micro_batch_size: int) -> dict[str, int]:
    """The slots to use, filled host by host."""
    left, chosen = most_ranks(global_batch_size, micro_batch_size, sum(slots.values())), {}
    for host, number in slots.items():
        if left:
            chosen[host] = min(number, left)
            left -= chosen[host]
    return chosen


def newest_complete(checkpoints: Path) -> str:
    """The newest complete checkpoint's name; names sort by images seen."""
    return max((marker.parent.name for marker in checkpoints.glob("*/COMPLETE")), default="")


def settings(training: list[str]) -> tuple[Path, int, int]:
    """Folder of checkpoints, global batch and micro-batch, as the training itself resolves them."""
    shown = subprocess.run([sys.executable, *training, "--dry-run"], capture_output=True, text=True, check=False)
    if not shown.stdout:  # otherwise the settings can be read, even if this machine lacks files
        sys.stderr.write(shown.stderr)
        raise SystemExit(shown.returncode)
    config = yaml.safe_load(shown.stdout)
    if config["run"] is None:
        raise SystemExit("error: command line: run: not given; add --run, the run folder")
    run, segmenter = Path(config["run"]), "segmenter" in Path(training[0]).name
    folder, train = (run / "segmenter", config["segmenter"]["train"]) if segmenter else (run, config["train"])
    micro_batch_size = 1 if train["micro_batch_size"] == "auto" else train["micro_batch_size"]
    if train["global_batch_size"] % micro_batch_size:
        raise SystemExit(f"error: config: train.global_batch_size: no multiple of micro_batch_size {micro_batch_size}")
    return folder / "checkpoints", train["global_batch_size"], micro_batch_size


def read_hostfile(path: Path) -> dict[str, int]:
    """host -> slots, in the file's order."""
    lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    if wrong := [line for line in lines if line and (len(line) != 2 or not line[1].removeprefix("slots=").isdigit())]:
        raise SystemExit(f"error: {path}: {' '.join(wrong[0])}; write `HOST slots=N`")
    return {line[0]: int(line[1].removeprefix("slots=")) for line in lines if line}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hostfile", type=Path, required=True, help="a line a machine: HOST slots=N; the first holds rank 0")
    ssh = "ssh -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=5 {host}"
    add("--run-on", default=ssh, help="what runs the shell command that follows it on {host}; default: %(default)s")
    add("--master-addr", help="rank 0's address as the others see it; default: its name in the hostfile")
    add("--port", type=int, default=29500, help="its port; each restart takes the next (default: %(default)s)")
    add("--restarts", type=int, default=3, help="give up after so many without a new checkpoint (default: %(default)s)")
    add("--grace-s", type=float, default=120, help="for ranks to save or to end by themselves (default: %(default)s)")
    add("training", nargs=argparse.REMAINDER, help="launch/train.py and its flags, --run among them")
    given = parser.parse_args()
    if not given.training:
        parser.error("say what to train: launch/train.py --config F --run R")
    return given


def say(text: str) -> None:
    """Print to the log, among the ranks' output."""
    sys.stderr.write(f"elastic: {text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
