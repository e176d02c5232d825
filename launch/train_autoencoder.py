"""Train the autoencoder of latent diffusion: `segdiff train-autoencoder` as a script.

    python launch/train_autoencoder.py --config launch/configs/best_ct_mr.yaml
    deepspeed launch/train_autoencoder.py --config launch/configs/best_ct_mr.yaml         # every GPU of this machine

It uses the denoiser's shards. When the training is over, it measures the reconstructions of the validation split.
"""

import sys

from segdiff_dist.program import run

if __name__ == "__main__":
    raise SystemExit(run(["train-autoencoder", *sys.argv[1:]]))
