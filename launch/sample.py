"""Make images from masks: `segdiff sample` as a script.

    python launch/sample.py --run runs/best_ct_mr --data data/shards --sample.num 1024

Images are made on Ray: on this machine, or on the cluster of launch/cluster/ray.yaml with `--sample.ray-address auto`.
Any number of workers makes the same images; started again, it makes only those that are missing.
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["sample", *sys.argv[1:]]))
