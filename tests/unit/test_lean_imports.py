"""What a command's process imports, and that it works with that."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_shards import lean_imports

SEGMENTS = """
import sys
from data_shards import lean_imports
if len(sys.argv) > 1:
    lean_imports.begin()
    import segdiff_dist.diffusers_parts
import torch
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
torch.manual_seed(0)
net = SegmenterNet(SegmenterConfig(channels=(8, 16)), num_classes=3)
scores = net(torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16), torch.tensor([1]))
left_out = {"mlflow", "pandas", "matplotlib", "scipy.stats", "torch._dynamo"}
print(sorted(left_out & set(sys.modules)), scores.double().sum().item())
"""

WRITES_A_TAR = """
import sys
from pathlib import Path
from data_shards import lean_imports
from data_shards.store.tar_store import write_tar
lean_imports.begin()
write_tar(Path(sys.argv[1]), [], "raw")
print("loads", ",".join({"torch", "webdataset"} & set(sys.modules)))
"""


def test_a_command_segments_the_same_without_what_monai_and_diffusers_bring_along() -> None:
    brought, scores = run_python(SEGMENTS)
    left_out, same_scores = run_python(SEGMENTS, "lean")
    assert "mlflow" in brought
    assert left_out == "[]"
    assert scores == same_scores


def run_python(code: str, *args: str) -> list[str]:
    """What it prints, in the part before the last blank and the one after it."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip().rsplit(" ", 1)


def test_other_threads_and_later_imports_find_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDIFF_LEAN_IMPORTS", "1")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    found = []
    with lean_imports.without("wave"):
        with pytest.raises(ModuleNotFoundError, match="wave is left out here"):
            import wave
        other = threading.Thread(target=lambda: found.append(__import__("wave")))
        other.start()
        other.join()
    import wave

    assert found == [wave]


def test_a_program_that_has_not_begun_imports_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGDIFF_LEAN_IMPORTS", raising=False)
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with lean_imports.without("wave"):
        import wave
    assert wave.open


def test_garbage_is_collected_again_after_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDIFF_LEAN_IMPORTS", "1")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with lean_imports.uncollected():
        with pytest.raises(ModuleNotFoundError), lean_imports.without("wave"):
            import wave  # noqa: F401
        assert not gc.isenabled()
    assert gc.isenabled()
    monkeypatch.delenv("SEGDIFF_LEAN_IMPORTS")
    with lean_imports.uncollected():
        assert gc.isenabled()


def test_a_command_writes_tars_without_torch(tmp_path: Path) -> None:
    _, libraries = run_python(WRITES_A_TAR, str(tmp_path / "one.tar"))
    assert libraries == "webdataset"
