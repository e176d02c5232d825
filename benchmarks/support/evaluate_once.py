"""One evaluation of a run on two workers, with the segdiff that PYTHONPATH names; prints the seconds without Ray's
start."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from data_shards.fan_out import ray_session
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.evaluation.measure.job import measure

if __name__ == "__main__":
    with ray_session(num_cpus=2):
        start = time.perf_counter()
        measure(Path(sys.argv[1]), EvaluateConfig(num_workers=2, surface_dice=False, device="cpu"), progress=False)
        print(time.perf_counter() - start)
