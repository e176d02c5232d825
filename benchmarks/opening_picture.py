"""The picture at the top of the README: masks, the real slices, and images made from the masks, of an evaluated run.

    python benchmarks/opening_picture.py runs/demo/run docs/opening.png

Chosen by the gallery's rule, not by eye: of CT and MR the samples at the quartiles of Dice(mask, prediction on
generated).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from support.harness import run_script

from data_shards.records import MODALITIES
from segdiff_dist.denoising.sample_grid import draw_sample_grid
from segdiff_dist.evaluation.report.pictures import Pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="an evaluated run folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    pictures = Pictures.open(args.run)
    items = [item for modality in MODALITIES for item in pictures.gallery(modality)]
    records = [pictures.shards.read(int(pictures.rows["row"][item])) for item in items]
    side = pictures.image.shape[1]
    title = "A mask, the real slice it was drawn on, and the slice that was made from the mask alone"
    draw_sample_grid(
        [record.cropped(side) for record in records],
        np.stack([pictures.generated(item) for item in items]),
        pictures.label_table,
        title,
        args.picture,
    )
    print(args.picture)
    return 0


if __name__ == "__main__":
    run_script(main)
