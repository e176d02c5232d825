"""The network of `fid`: torch-fidelity's Inception. A distance on any other network is not called FID."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from segdiff_dist.evaluation.metrics.feature_sets import Extractor

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
HOW_TO_GET = (
    "install the extra, pip install 'segdiff-dist[fid]', and set evaluate.fid_weights to 'download' or to the "
    f"file {WEIGHTS_FILE} from the releases of torch-fidelity"
)
DOWNLOAD = "download"


def missing_for_fid(fid_weights: str | None) -> str | None:
    """Why `fid` cannot be computed, with what to do about it; None when it can."""
    if fid_weights is None:
        return f"no Inception weights were given; {HOW_TO_GET}"
    absent = [name for name in ("torch_fidelity", "torchvision") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed; {HOW_TO_GET}"
    return None


def load_inception(fid_weights: str, device: str) -> Extractor:
    """torchmetrics' FID network with its 2048 features; `fid_weights` is a path or 'download'."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    path = None if fid_weights == DOWNLOAD else fid_weights
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=path)
    return grey_extractor(metric.inception.to(device).eval())


def grey_extractor(network: nn.Module) -> Extractor:
    """Grey images [B, H, W] as the three equal channels that an RGB network expects."""
    import torch

    def extract(image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        with torch.inference_mode():
            features: Tensor = network(image_BHW[:, None].expand(-1, 3, -1, -1))
        return features

    return extract


def downloaded_weights() -> Path:
    """The path to which torch-fidelity downloads its file."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
