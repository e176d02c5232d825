"""Distil a trained denoiser to few steps: `segdiff distil` as a script.

python launch/distil.py --distil.teacher runs/best --run runs/best4 --distil.num-steps 4
deepspeed launch/distil.py --distil.teacher runs/best --run runs/best4              # every GPU of this machine
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["distil", *sys.argv[1:]]))
