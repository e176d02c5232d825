"""Train the denoiser: `segdiff train` as a script, for DeepSpeed's launcher.

    python launch/train.py --config launch/configs/best_ct_mr.yaml                      # one process
    deepspeed launch/train.py --config launch/configs/best_ct_mr.yaml                   # every GPU of this machine
    deepspeed --num_accelerators 2 launch/train.py --config ...                       # two ranks, also on the CPU
    deepspeed --module segdiff_dist train --config best_ct_mr                         # installed, without a checkout
    deepspeed --hostfile launch/cluster/hostfile launch/train.py --config ...         # several machines

launch/cluster/train.slurm does the last under Slurm. Started again, it resumes from the newest complete checkpoint.
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["train", *sys.argv[1:]]))
