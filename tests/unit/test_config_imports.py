"""The command line and the configuration load no heavy library, so that `segdiff train --help` is quick."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "diffusers", "monai", "deepspeed", "ray", "mlflow", "matplotlib", "pandas", "pyarrow", "scipy"}


def test_the_configuration_imports_no_heavy_library() -> None:
    code = "import sys, segdiff_dist.cli, segdiff_dist.experiment; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.isdisjoint(loaded)
