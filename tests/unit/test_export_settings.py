"""Settings of `segdiff export` that the format does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segdiff_dist.cli import main
from segdiff_dist.export.config import ExportConfig


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"format": "png", "file_ending": ".nrrd", "split": "train"}, ["export.file_ending", "export.split"]),
        ({"format": "dicom", "codec": "png"}, ["export.codec"]),
        ({"format": "pipeline", "modality": "CT", "precision": "bf16"}, ["export.modality"]),
        ({"format": "shards", "precision": "bf16", "store": "zarr"}, ["export.precision"]),
        ({"format": "nnunet", "file_ending": ".png", "modality": "MR", "body_label": True}, []),
    ],
)
def test_settings_that_the_format_does_not_use(settings: dict[str, Any], unused: list[str]) -> None:
    assert ExportConfig(**settings).without_effect == unused
    assert not ExportConfig(**settings).problems()


def test_they_are_said_before_the_work(tmp_path: Path) -> None:
    line = ["export", str(tmp_path / "out"), "--run", str(tmp_path), "--format", "png", "--export.split", "train"]
    with pytest.warns(UserWarning, match="--format png does not use export.split"):
        main([*line, "--dry-run"])


def test_png_is_a_format_and_no_ending_of_nifti_pairs() -> None:
    """Pairs were written as .nii.gz without a word."""
    [problem] = ExportConfig("nifti", file_ending=".png").problems()
    assert (problem.field, problem.value) == ("export.file_ending", ".png with --format nifti")
    assert problem.remedy == "give --format png"
