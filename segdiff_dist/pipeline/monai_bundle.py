"""Write a model as a MONAI bundle (MONAI's docs/source/mb_specification.rst).

OUT/configs/metadata.json      what MONAI's tools read: versions, label ids, shapes
OUT/configs/inference.json     for `python -m monai.bundle run`: a mask in any format in, an image in its place out
OUT/configs/segdiff.json       schedule, sampler settings, preprocessing
OUT/models/model.pt            the network's weights; beside it what builds the network
OUT/docs/README.md             the model card
OUT/segmenter/                 as in a pipeline's folder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_shards import __version__
from data_shards.files import write_atomic
from data_shards.labels import UNUSED
from segdiff_dist.denoising.cascade import LOWER, copy_stage
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser, known_modalities
from segdiff_dist.denoising.latent_space import BESIDE_WEIGHTS
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.pipeline.description import BUNDLE_CONFIGS, BUNDLE_DOCS, BUNDLE_MODELS, CARD, DESCRIPTION
from segdiff_dist.pipeline.folder import Extras, Facts
from segdiff_dist.weight_files import DIGESTS, MODEL_FILE, write_digests

_SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
_UNKNOWN = "not stated: ask whoever trained the model"


def write_bundle(
    weights: Path, folder: Path, diffusion: DiffusionConfig, sampler: SamplerConfig, extras: Extras | None = None
) -> None:
    """Write the model in `weights` into the existing `folder`; arguments as of write_pipeline."""
    extras, facts = extras or Extras(), Facts.of(weights, diffusion, sampler)
    for name in (BUNDLE_CONFIGS, BUNDLE_MODELS, BUNDLE_DOCS):
        (folder / name).mkdir()
    _write_net(weights, folder / BUNDLE_MODELS, extras.precision)
    configs = folder / BUNDLE_CONFIGS
    metadata = _metadata(facts.net, extras)
    write_atomic(configs / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    write_atomic(configs / "inference.json", json.dumps(_INFERENCE, indent=2) + "\n")
    facts.write(extras, folder, configs / DESCRIPTION, folder / BUNDLE_DOCS / CARD, _USE)


def _write_net(weights: Path, target: Path, precision: str) -> None:
    import torch

    model = Denoiser.load(weights)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    # A cascade's lower stage and an autoencoder have folders of their own, since their digests are described.
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("lower_net.")}
    torch.save(state, target / MODEL_FILE)
    others = [file for file in sorted(weights.iterdir()) if file.suffix == ".json" and file.name != DIGESTS]
    for file in others:
        shutil.copyfile(file, target / file.name)
    write_digests(target, [MODEL_FILE, *(file.name for file in others)])
    if (weights / LOWER).is_dir():
        copy_stage(weights / LOWER, target / LOWER)
    beside = weights / BESIDE_WEIGHTS
    if beside.is_dir():
        (target / BESIDE_WEIGHTS).mkdir()
        for file in sorted(beside.iterdir()):
            shutil.copyfile(file, target / BESIDE_WEIGHTS / file.name)


def _metadata(net: Mapping[str, Any], extras: Extras) -> dict[str, Any]:
    size, table = net["size"], net["label_table"]
    modalities = ", ".join(known_modalities(net, Path(DESCRIPTION)))
    classes = {str(i): name for i, name in enumerate(table["names"]) if name != UNUSED}
    tensor = {"type": "image", "num_channels": 1, "spatial_shape": [size, size], "dtype": "float32"}
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"written by segdiff {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"segdiff-dist": __version__},
        "supported_apps": {},
        "name": "Segmentation-guided diffusion",
        "task": f"Synthesis of slices ({modalities}) from label masks",
        "description": f"A diffusion model of {size} x {size} pixels. From a mask of organs it generates a synthetic "
        f"slice ({modalities}) that follows the mask.",
        "authors": _UNKNOWN,
        "copyright": _UNKNOWN,
        "data_source": f"Licence of the training data: {extras.card.data_licence or 'not stated'}",
        "data_type": "nibabel",
        "image_classes": f"label ids of the table {table['name']!r}",
        "pred_classes": "grey values from 0 to 1 of a synthetic slice",
        "eval_metrics": {},
        "intended_use": "Research on methods, not diagnosis. All images are synthetic and show no patient.",
        "network_data_format": {
            "inputs": {
                "image": {
                    **tensor,
                    "format": "segmentation",
                    "value_range": [0, max(map(int, classes))],
                    "is_patch_data": False,
                    "channel_def": classes,
                }
            },
            "outputs": {
                "pred": {
                    **tensor,
                    "format": "magnitude",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {"0": "image"},
                }
            },
        },
    }


# The names of MONAI's properties of an inference workflow (bundle_root, device, network_def), and those of `paint`.
_INFERENCE: dict[str, Any] = {
    "bundle_root": ".",
    "mask": "mask.nii.gz",
    "output": "image.nii.gz",
    "modality": None,
    "seed": 0,
    "labels": None,
    "steps": None,
    "guidance": None,
    "device": "auto",
    "network_def": {
        "_target_": "segdiff_dist.pipeline.for_monai.MaskToImage",
        "bundle": "@bundle_root",
        "device": "@device",
    },
    "opened": {"_target_": "segdiff_dist.painting.api.open_model", "given": "@bundle_root", "device": "@device"},
    "model": "$@opened.with_sampler(@steps, @guidance)",
    "painting": {
        "_target_": "segdiff_dist.painting.api.paint",
        "mask": "@mask",
        "model": "@model",
        "modality": "@modality",
        "seed": "@seed",
        "labels": "@labels",
    },
    "run": ["$@painting.save(@output)"],
}

_USE = f"""It is a MONAI bundle. It needs the package segdiff-dist ({__version__} or later), which brings MONAI, and for
MONAI's command line the package fire: `pip install 'segdiff-dist[monai]'`. In this folder
(in others with the files' paths, and `--bundle_root`):

```
python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
    --mask mask.nii.gz --output image.nii.gz --modality CT --seed 7
```

`mask` is a PNG, NIfTI, MetaImage, NRRD or DICOM SEG of any size. The image has its voxels, in HU for CT, and is that of
`segdiff paint -i mask.nii.gz -o image.nii.gz --model this/folder --modality CT --seed 7`. `labels`, `steps` and
`guidance` can be given too.

As a network in MONAI's own workflows:

```python
from monai.bundle import ConfigParser

parser = ConfigParser()
parser.read_config("configs/inference.json")
network = parser.get_parsed_content("network_def")  # label ids [B, 1, H, W] in, grey values from 0 to 1 out
image = network(mask, modality="CT", seed=7)
```

MONAI runs what a bundle's configs say: read them before you run a bundle that you do not know. `segdiff paint` reads
only weights and descriptions.
"""
