"""`deepspeed launch/train.py` on two ranks over gloo: killed, started again, and set against one rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranks_support import commanding, ranks

ROOT = Path(__file__).parents[2]
CONFIG = """
loader: {num_threads: 1, flip: true}
denoiser: {block_out_channels: [16, 32], layers_per_block: 1, norm_num_groups: 8, attention_resolutions: [16]}
diffusion: {prediction_type: v, zero_terminal_snr: true}
train:
  num_images: 96
  global_batch_size: 8
  micro_batch_size: 2
  lr: 2.0e-3
  warmup_images: 16
  checkpoint_every_images: 32
  log_every_images: 8
  precision: fp32
  zero_stage: 2
  device: cpu
validation: {num_images: 8, num_pictures: 2, num_steps: 3}
tracking: {enabled: false}
"""


def arguments(folder: Path, shapes: Path, *flags: str) -> list[str]:
    """Of `segdiff train`, for a run in the folder."""
    folder.mkdir(exist_ok=True)
    config = folder / "given.yaml"
    config.write_text(CONFIG)
    return ["--config", str(config), "--run", str(folder / "run"), "--data", str(shapes), *flags]


def start(folder: Path, shapes: Path, ranks: int) -> subprocess.Popen[bytes]:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    launcher += ["--master_port", str(10000 + os.getpid() % 20000), str(ROOT / "launch" / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*launcher, *arguments(folder, shapes)],
        env=environment,
        cwd=folder,
        stdout=(folder / "out.txt").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], folder: Path) -> list[float]:
    code = process.wait(timeout=400)
    assert code == 0, (folder / "out.txt").read_text()[-3000:]
    return losses(folder)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def kill_after(process: subprocess.Popen[bytes], log: Path, images: int) -> None:
    """SIGKILL for the launcher and every rank once `images` have been logged and a checkpoint is there."""
    deadline = time.time() + 300
    while time.time() < deadline:
        seen = [json.loads(line)["images_seen"] for line in log.read_text().splitlines()] if log.is_file() else []
        if max(seen, default=0) >= images and list((log.parent / "checkpoints").glob("*/COMPLETE")):
            break
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_ranks_killed_and_started_again(small_shapes: Path, tmp_path: Path) -> None:
    # Undisturbed, of ranks that no launcher starts.
    command = ["train", *arguments(tmp_path / "two", small_shapes)]
    with ranks(2, tmp_path / "two", commanding, [command, command]) as undisturbed:
        assert [undisturbed.ended(rank, 280) for rank in range(2)] == [0, 0], undisturbed.stderr(0)[-3000:]
    two = losses(tmp_path / "two")
    assert len(two) == 96 // 8
    assert two[-1] < two[0]

    # SIGKILL for the launcher and all ranks, at no particular moment: a checkpoint may be half written.
    cut = tmp_path / "cut"
    kill_after(start(cut, small_shapes, ranks=2), cut / "run" / "log.jsonl", images=56)
    assert list((cut / "run" / "checkpoints").glob("*/COMPLETE"))
    assert finish(start(cut, small_shapes, ranks=2), cut) == two
    for average in ("ema_0.05", "ema_0.1", "online"):
        weights = Path("run", "weights", average, "diffusion_pytorch_model.safetensors")
        assert (cut / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()


def test_one_rank_refuses_and_names_what_another_would_do(small_shapes: Path, tmp_path: Path) -> None:
    """Another learning rate on rank 1: both ranks stop before any work, and say which key differs where."""
    folder = tmp_path / "differs"
    command = ["train", *arguments(folder, small_shapes)]
    with ranks(2, folder, commanding, [command, [*command, "--train.lr", "0.5"]]) as started:
        assert [started.ended(rank, 200) for rank in range(2)] == [2, 2]
    said = started.stderr(0) + started.stderr(1)
    assert "train.lr" in said
    assert "0.5" in said
    assert "rank 1" in said
    assert not (folder / "run" / "checkpoints").exists()
