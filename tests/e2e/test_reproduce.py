"""`segdiff reproduce table1` from an archive to its page, at the smallest size; and again, when all is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_shards.phantom import PhantomConfig, write_phantom
from segdiff_dist.cli import main

TINY = """
prepare: {size: 32, slice_stride: 12, num_workers: 1}
loader: {num_threads: 1}
segmenter:
  channels: [16, 32, 64]
  train: {num_images: 32, global_batch_size: 16, micro_batch_size: 16, warmup_images: 16, precision: fp32}
denoiser: {block_out_channels: [16, 32], layers_per_block: 1, attention_resolutions: [], norm_num_groups: 8}
train: {num_images: 16, global_batch_size: 8, micro_batch_size: 8, warmup_images: 8}
validation: {num_images: 4, num_pictures: 2, num_steps: 2}
sample: {num: 6, samples_per_mask: 1, region_size: 4, num_workers: 1, sampler: {num_steps: 2}}
evaluate: {num_workers: 1, bootstrap_samples: 50}
tracking: {enabled: false}
"""


def test_one_command_ends_in_a_table_and_the_next_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = PhantomConfig(
        num_train=1, num_val=1, num_test=1, modalities=("MR",), matrix=(64, 64), slice_thickness_mm=(6.0, 6.0)
    )
    write_phantom(tmp_path / "amos", small)
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ["reproduce", "table1", "--columns", "mri_axial", "--config", str(tmp_path / "tiny.yaml")]
    command += ["--amos", str(tmp_path / "amos"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "Not a reproduction" in capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "table1.json").read_text())
    [column] = made["columns"]
    assert (column["num_samples"], column["split"], column["later"]["psnr_db"]) == (6, "test", "13.07")
    assert {"psnr_db", "ssim", "legacy_dice_mask_real", "legacy_dice_mask_gen"} <= set(column["measured"])
    page = (tmp_path / "out" / "table1.html").read_text()

    made_once = (".tar", ".safetensors", ".parquet")
    watched = [p for p in (tmp_path / "out").rglob("*") if p.suffix in made_once]
    before = {path: path.stat().st_mtime_ns for path in watched}
    assert {path.suffix for path in before} == set(made_once)
    assert main(command) == 0
    assert capsys.readouterr().out.count("nothing to do") == 4
    assert before == {path: path.stat().st_mtime_ns for path in watched}
    assert (tmp_path / "out" / "table1.html").read_text() == page
