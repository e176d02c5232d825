"""What the service writes while it works on a request: clients' masks and images, which nobody may find afterwards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.ray_session import SCRATCH
from segdiff_dist.serving.responses import nifti_gz
from segdiff_dist.serving.uploads import stored


def test_files_of_a_request_are_in_a_folder_that_ends_with_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed at a request removes nothing: the session does."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture, format="PNG")
    for folder in (tmp_path / "of the session", tmp_path / "of the machine"):
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "of the machine"))
    for name in ("of the machine", "of the session"):
        with stored(picture.getvalue()) as file:
            assert file.is_relative_to(tmp_path / name)
        monkeypatch.setenv(SCRATCH, str(tmp_path / "of the session"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert nifti_gz(np.zeros((4, 4, 1), np.uint8), np.eye(4))
    assert not list((tmp_path / "of the session").iterdir())
