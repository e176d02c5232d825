"""The recorded loss curves: the first steps of each network on the embedded data, as the command trains it.

`python tests/unit/test_losses.py` writes tests/assets/losses anew. On one machine a change that should not change
numbers leaves these files as they are: `git diff tests/assets/losses` prints nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests" / "assets" / "losses"
STEPS = 20
# One thread: the order in which a convolution adds up its terms depends on how many there are.
NUM_THREADS = 1
# Processors and versions of a library differ in the last bits of a float32, 6e-8; twenty steps add to that.
TOLERANCE = 1e-5
# What the numbers can depend on.
LIBRARIES = ("torch", "numpy", "scipy", "diffusers", "deepspeed", "monai", "nvidia-dali-cuda130")

_BATCH = 4
_TRAIN = {
    "num_images": _BATCH * STEPS,
    "global_batch_size": _BATCH,
    "micro_batch_size": _BATCH // 2,
    "lr": 2e-3,
    "warmup_images": 16,
    "precision": "fp32",
    "checkpoint_every_images": _BATCH * STEPS,
    "log_every_images": _BATCH,
    "device": "cpu",
}
_NET = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "attention_resolutions": [16],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
_LOADER = {"axes": ["axial"], "num_threads": 1, "flip": True, "rotate_degrees": 10.0}
_COMMON = {"loader": _LOADER, "tracking": {"enabled": False}}
_VALIDATION = {"num_images": 2, "num_pictures": 0, "num_steps": 1}
# File -> column -> (command, what its --config holds).
CURVES = {
    "denoiser_cpu.txt": {
        "efficient_edm": (
            "train",
            {
                "denoiser": {**_NET, "net": "efficient"},
                "diffusion": {"objective": "edm", "mask_dropout": 0.1},
                "train": _TRAIN,
                "validation": _VALIDATION,
                **_COMMON,
            },
        ),
        "unet_ddpm": (
            "train",
            {
                "denoiser": {**_NET, "net": "unet", "attention_resolutions": []},
                "diffusion": {"objective": "ddpm"},
                "train": _TRAIN,
                "validation": _VALIDATION,
                **_COMMON,
            },
        ),
    },
    "segmenter_cpu.txt": {
        "unet": (
            "train-segmenter",
            {
                "segmenter": {
                    "channels": [16, 32, 64],
                    "dice_over": 2,
                    "rotate_degrees": 10.0,
                    "zoom": 0.15,
                    "train": _TRAIN,
                },
                **_COMMON,
            },
        ),
    },
}


def write_set(folder: Path) -> Path:
    """A shard set of the phantom's axial slices, 32 x 32: three patients of each modality, no processes started."""
    from data_shards.ingest.archive import read_archive
    from data_shards.ingest.case_slices import slices_of
    from data_shards.ingest.prepare import PrepareConfig
    from data_shards.labels import AMOS
    from data_shards.phantom import PhantomConfig, write_phantom
    from data_shards.store.shard_writer import ShardWriter

    small = PhantomConfig(num_train=1, num_val=1, num_test=1, matrix=(64, 64), slice_thickness_mm=(6.0, 6.0))
    write_phantom(folder / "amos", small)
    config = PrepareConfig(axes=("axial",), size=32, slice_stride=2)
    writer = ShardWriter(folder / "set", config.format)
    for case in read_archive(folder / "amos"):
        for record in slices_of(case, config, None):
            writer.write(record)
    table = {"name": AMOS.name, "names": AMOS.names}
    writer.finish({"label_table": table, "preprocessing": config.result_settings()})
    return folder / "set"


def losses(shards: Path, command: str, config: dict[str, object], folder: Path) -> list[float]:
    """The loss of each step, as RUN/log.jsonl of the command has it."""
    from segdiff_dist.cli import main

    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(config))  # every JSON is YAML
    run = folder / "run"
    assert main([command, "--config", str(folder / "config.yaml"), "--data", str(shards), "--run", str(run)]) == 0
    log = run / ("log.jsonl" if command == "train" else "segmenter/log.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def curves(name: str, shards: Path, folder: Path) -> dict[str, list[float]]:
    """The columns of one file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        return {column: losses(shards, *given, folder / column) for column, given in CURVES[name].items()}
    finally:
        torch.set_num_threads(threads)


def read(file: Path) -> dict[str, list[float]]:
    """The columns of a recorded file."""
    lines = [line.split() for line in file.read_text().splitlines() if not line.startswith("#")]
    return {name: [float(line[number]) for line in lines[1:]] for number, name in enumerate(lines[0]) if number}


def write(file: Path, columns: dict[str, list[float]]) -> None:
    """Every digit of every loss, below the versions that gave them."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] in LIBRARIES]
    head = [
        f"# Losses of the first {STEPS} steps on the embedded data, fp32, one thread of a CPU.",
        "# Written by: python tests/unit/test_losses.py",
        f"# {' '.join(pins)}",
        " ".join(("step", *columns)),
    ]
    rows = [" ".join(map(repr, row)) for row in zip(range(1, STEPS + 1), *columns.values(), strict=True)]
    file.write_text("\n".join([*head, *rows]) + "\n")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("embedded"))


@pytest.mark.parametrize("name", CURVES)
def test_losses_are_those_that_were_recorded(embedded: Path, tmp_path: Path, name: str) -> None:
    recorded, measured = read(ASSETS / name), curves(name, embedded, tmp_path)
    assert measured.keys() == recorded.keys()
    for column in recorded:
        assert measured[column] == pytest.approx(recorded[column], rel=TOLERANCE), column


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        data = write_set(Path(scratch))
        for file_name in CURVES:
            (Path(scratch) / file_name).mkdir()
            write(ASSETS / file_name, curves(file_name, data, Path(scratch) / file_name))
