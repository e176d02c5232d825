"""`deepspeed launch/train.py` on two ranks over gloo: killed, started again, and set against one rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
tracking: {enabled: false}
"""


def start(folder: Path, shapes: Path, ranks: int) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    config = folder / "given.yaml"
    config.write_text(CONFIG)
    script = [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    launcher += ["--master_port", str(20000 + os.getpid() % 20000)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        [*launcher, *script, "--run", str(folder / "run"), "--data", str(shapes)],
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
    """SIGKILL for the launcher and every rank once `images` have been logged."""
    deadline = time.time() + 300
    while time.time() < deadline:
        if log.is_file() and any(json.loads(line)["images_seen"] >= images for line in log.read_text().splitlines()):
            break
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_ranks_killed_and_started_again(shapes: Path, tmp_path: Path) -> None:
    two = finish(start(tmp_path / "two", shapes, ranks=2), tmp_path / "two")
    assert len(two) == 96 // 8
    assert two[-1] < two[0]

    cut = tmp_path / "cut"
    kill_after(start(cut, shapes, ranks=2), cut / "run" / "log.jsonl", images=48)
    complete = [p.parent.name for p in (cut / "run" / "checkpoints").glob("*/COMPLETE")]
    assert complete
    assert finish(start(cut, shapes, ranks=2), cut) == two
    weights = Path("run", "weights", "ema", "diffusion_pytorch_model.safetensors")
    assert (cut / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()

    # One rank sees the same images, noise and timesteps: the same losses but for the order of sums.
    one = finish(start(tmp_path / "one", shapes, ranks=1), tmp_path / "one")
    assert one == pytest.approx(two, rel=1e-4)

    # And a run of two ranks does not go on with one.
    (cut / "run" / "checkpoints" / f"{96:012d}" / "COMPLETE").unlink()
    assert start(cut, shapes, ranks=1).wait(timeout=200) != 0
    assert "start it on 2 ranks again" in (cut / "out.txt").read_text()
