"""LPIPS: a distance of two images on AlexNet's features, by the authors' package and torchvision's weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdiff_dist.evaluation.metrics.arrays import Array
from segdiff_dist.evaluation.metrics.similarity import GREY_RANGE

if TYPE_CHECKING:
    from torch import Tensor, nn

DOWNLOAD = "download"
WEIGHTS_FILE = "alexnet-owt-7be5be79.pth"
HOW_TO_GET = (
    "install the extra, pip install 'segdiff-dist[lpips]', and set evaluate.lpips_weights to 'download' or to "
    f"torchvision's file {WEIGHTS_FILE}"
)


def missing_for_lpips(lpips_weights: str | None) -> str | None:
    """Why `lpips` cannot be computed, with what to do about it; None when it can."""
    if lpips_weights is None:
        return f"no AlexNet weights were given; {HOW_TO_GET}"
    absent = [name for name in ("lpips", "torchvision") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed; {HOW_TO_GET}"
    return None


def load_lpips(lpips_weights: str, device: str) -> Callable[[Tensor, Tensor], Array]:
    """LPIPS [B] of uint8 images [B, H, W], the real ones first; `lpips_weights` is a path or 'download'.

    Zhang et al. 2018, eq. 1, version 0.1, AlexNet: the linear weights are the package's own, those of AlexNet
    torchvision's. Grey images enter as three equal channels in [-1, 1].
    """
    import torch

    if lpips_weights == DOWNLOAD:
        from torchvision.models import AlexNet_Weights

        state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    else:
        state = torch.load(lpips_weights, map_location="cpu", weights_only=True)
    return grey_distance(_with_backbone(state).to(device).eval())


def grey_distance(network: nn.Module) -> Callable[[Tensor, Tensor], Array]:
    """A distance of RGB images in [-1, 1] as one of grey uint8 images [B, H, W]."""
    import torch

    def distance(real_BHW: Tensor, generated_BHW: Tensor) -> Array:
        with torch.inference_mode():
            x_B3HW, y_B3HW = (
                (images[:, None].float() / (GREY_RANGE / 2) - 1).expand(-1, 3, -1, -1)
                for images in (real_BHW, generated_BHW)
            )
            return np.asarray(network(x_B3HW, y_B3HW).double().flatten().cpu().numpy())

    return distance


def downloaded_weights() -> Path:
    """Where torchvision's own download puts its file."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def _with_backbone(state: dict[str, Tensor]) -> Any:
    import lpips

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # The package cuts AlexNet's `features` into slices that keep their layers' numbers.
    model.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in model.net.state_dict()})
    return model
