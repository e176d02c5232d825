"""Measure a run's images: `segdiff evaluate` as a script.

    python launch/evaluate.py --run runs/best_ct_mr

Writes RUN/evaluation: samples.parquet, summary.json, figures and report.html.
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["evaluate", *sys.argv[1:]]))
