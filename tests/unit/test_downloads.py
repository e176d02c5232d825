"""Weights to be downloaded: there before anything is measured, or one figure is left out with its reason."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest

from segdiff_dist.evaluation.metrics import inception, perceptual
from segdiff_dist.evaluation.metrics.downloads import weights_for


def test_what_cannot_be_downloaded_costs_that_figure_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(weights: str, device: str) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(inception, "load_inception", unreachable)
    file = tmp_path / "alexnet.pth"
    file.write_bytes(b"weights")
    with pytest.warns(UserWarning, match="fid is left out"), weights_for("download", file) as weights:
        pass
    assert (weights.fid, weights.lpips, list(weights.missing)) == (None, str(file), ["fid"])
    assert "Name or service not known" in weights.missing["fid"]
    assert f"give their file {inception.WEIGHTS_FILE} as evaluate.fid_weights" in weights.missing["fid"]


def test_workers_of_a_cluster_get_the_file_that_was_downloaded_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / perceptual.WEIGHTS_FILE
    cache.parent.mkdir()

    def download(weights: str, device: str) -> None:
        cache.write_bytes(b"weights")

    monkeypatch.setattr(perceptual, "load_lpips", download)
    monkeypatch.setattr(perceptual, "downloaded_weights", lambda: cache)
    for shared in (None, tmp_path / "evaluation" / ".weights.unfinished"):
        with weights_for(None, "download", shared) as weights:
            assert weights.lpips is not None
            used = Path(weights.lpips)
            assert used.name == perceptual.WEIGHTS_FILE
            assert used.read_bytes() == b"weights"
            assert (used == cache.resolve()) is (shared is None)
    assert not used.exists()
    assert cache.exists()
