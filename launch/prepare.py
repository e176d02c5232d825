"""Volumes to shards: `segdiff prepare` as a script.

    python launch/prepare.py data/amos22 data/shards --config launch/configs/best_ct_mr.yaml

Volumes are read on Ray: on this machine, or on the cluster of launch/cluster/ray.yaml with `--prepare.ray-address
auto`. Started again, it reads only the missing volumes.
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["prepare", *sys.argv[1:]]))
