"""Train the auxiliary segmenter that measures the images: `segdiff train-segmenter` as a script.

    python launch/train_segmenter.py --config launch/configs/best_ct_mr.yaml
    deepspeed launch/train_segmenter.py --config launch/configs/best_ct_mr.yaml         # every GPU of this machine

It uses the denoiser's shards: trained on the train split, chosen on the validation split.
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["train-segmenter", *sys.argv[1:]]))
