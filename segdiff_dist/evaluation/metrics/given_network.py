"""Features of a network that the user gives: a ResNet-50 of torchvision or RadImageNet, or a TorchScript file.

A distance on them has a name of its own; only Inception's is FID. A TorchScript file is a program: loading it runs the
code in it.

FILE.pth, FILE.pt, FILE.safetensors    weights of a ResNet-50 (state_dict): torchvision's names, or either of
                                       RadImageNet's files: PyTorch's (backbone.N...) and Keras' as converted
FILE.pt                                a TorchScript network: image [B, C, H, W] to features [B, D] or [B, D, h, w]
FILE.yaml                              beside it, if its input is another: NetworkInput

Dimensions: B batch, C channels, D features, H rows, W columns.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval, MinLen

from data_shards.files import first_line
from data_shards.problems import problem, refuse
from data_shards.ranges import RISING, range_problems
from data_shards.settings import Result
from segdiff_dist.config import read_yaml, validate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from segdiff_dist.evaluation.metrics.feature_sets import Extractor

FIELD = "evaluate.feature_network"
HOW_TO_GET = (
    "name torchvision's or RadImageNet's ResNet-50 weights, or a TorchScript file, as evaluate.feature_network "
    "(docs/metrics.md)"
)
_RGB = 3


@dataclass(frozen=True)
class NetworkInput:
    """What a network takes: float32 [B, C, H, W]."""

    size: Result[Annotated[int, Interval(ge=8, le=2048)] | None] = None
    """The side in pixels to which images are resampled. null: no resampling."""
    range: Result[Annotated[tuple[float, float], RISING]] = (0.0, 1.0)
    """The values that black and white become."""
    mean: Result[Annotated[tuple[float, ...], MinLen(1)]] = (0.0,) * _RGB
    """Subtracted after that: a number a channel. Grey images enter as that many equal channels."""
    std: Result[Annotated[tuple[float, ...], MinLen(1)]] = (1.0,) * _RGB
    """The difference is divided by it: a number a channel."""


# The preprocessing that torchvision documents for its ResNet-50.
_TORCHVISION = NetworkInput(224, (0.0, 1.0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# RadImageNet's own code takes (image - 127.5) * 2 / 255.
_RADIMAGENET = NetworkInput(224, (-1.0, 1.0))
# RadImageNet's Keras weights, as MAISI's authors feed them (NV-Generate-CTMR, compute_fid_2-5d_ct.py): blue, green and
# red means are subtracted, and nothing is resampled.
_RADIMAGENET_KERAS = NetworkInput(None, (0.0, 1.0), (0.406, 0.456, 0.485))
_TORCHSCRIPT = NetworkInput()
# Only Keras' convolutions have biases.
_KERAS_MARK = "conv1.bias"
# Keras' default for batch normalisation in its ResNet.
_KERAS_EPSILON = 1.001e-5
# RadImageNet's ResNet-50 is torchvision's children in a row, the last of them left out.
_CHILDREN = ("conv1", "bn1", None, None, "layer1", "layer2", "layer3", "layer4")
_NUMBERED = re.compile(r"(?:module\.)?backbone\.(\d+)\.(.+)")


def load_network(file: str, device: str) -> Extractor:
    """Features of grey images [B, H, W]; the means over places where the network gives maps. Raises InputProblems."""
    import torch

    network, takes = _open(Path(file))
    network = network.to(device).eval()
    mean_C11, std_C11 = (torch.tensor(of, device=device)[:, None, None] for of in (takes.mean, takes.std))

    def extract(image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        with torch.inference_mode():
            features = network((_scaled(image_BHW, takes) - mean_C11) / std_C11)
            if not isinstance(features, torch.Tensor) or features.ndim not in (2, 4):
                raise ValueError("the network gives no features [B, D] or [B, D, h, w]")
            return features if features.ndim == 2 else features.mean(dim=(2, 3))

    return extract


def described(file: str) -> dict[str, Any]:
    """The network's input, for the record."""
    return asdict(_input_of(Path(file), _default_input(Path(file))))


def _scaled(image_BHW: Tensor, takes: NetworkInput) -> Tensor:
    """float32 [B, 1, H, W] in the network's range and size."""
    from torch.nn.functional import interpolate

    low, high = takes.range
    image_B1HW = image_BHW[:, None].float() / 255.0 * (high - low) + low
    if takes.size is None or image_B1HW.shape[-2:] == (takes.size,) * 2:
        return image_B1HW
    return interpolate(image_B1HW, (takes.size,) * 2, mode="bilinear", align_corners=False, antialias=True)


def _open(file: Path) -> tuple[nn.Module, NetworkInput]:
    import torch

    takes = _input_of(file, _default_input(file))
    if _is_script(file):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return torch.jit.load(str(file), map_location="cpu"), takes
        except (RuntimeError, ValueError, OSError) as error:
            value = f"{file}: no TorchScript ({first_line(error, 120)})"
            raise problem("config", FIELD, value, "give a file that torch.jit.save wrote") from error
    return _resnet50(file), takes


def _resnet50(file: Path) -> nn.Module:
    """torchvision's ResNet-50 without its last layer, as MONAI builds it: 2,048 features."""
    from segdiff_dist.segmentation.monai_parts import resnet50

    net: nn.Module = resnet50(
        spatial_dims=2, n_input_channels=_RGB, conv1_t_stride=2, bias_downsample=False, feed_forward=False
    )
    weights = {_torchvision_name(name): tensor for name, tensor in _state(file).items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    if _KERAS_MARK in weights:
        _make_keras(net)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        missing = len(net.state_dict().keys() - weights.keys())
        value = f"{file}: not the weights of a ResNet-50"
        value += f" ({missing} of {len(net.state_dict())} tensors are missing)" if missing else " (other shapes)"
        raise problem("config", FIELD, value, HOW_TO_GET) from error
    return net


def _make_keras(net: nn.Module) -> None:
    """Keras' ResNet-50: biases in convolutions, and strides in a block's first convolution (He et al. 2016; torchvision
    has them in the second)."""
    from torch import nn, zeros

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(zeros(module.out_channels))
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = _KERAS_EPSILON
    for name in ("layer2", "layer3", "layer4"):
        conv1, conv2 = (net.get_submodule(f"{name}.0.{conv}") for conv in ("conv1", "conv2"))
        assert isinstance(conv1, nn.Conv2d)
        assert isinstance(conv2, nn.Conv2d)
        conv1.stride, conv2.stride = conv2.stride, conv1.stride


def _default_input(file: Path) -> NetworkInput:
    if _is_script(file):
        return _TORCHSCRIPT
    names = _state(file)
    if _KERAS_MARK in names:
        return _RADIMAGENET_KERAS
    return _RADIMAGENET if any(_NUMBERED.fullmatch(name) for name in names) else _TORCHVISION


def _input_of(file: Path, default: NetworkInput) -> NetworkInput:
    """The default, changed by FILE.yaml where it is there."""
    description = file.with_suffix(".yaml")
    if not description.is_file():
        return default
    takes = validate(NetworkInput, asdict(default) | read_yaml(description), description)
    refuse(range_problems(takes, str(description)))
    if len(takes.mean) != len(takes.std) or not all(takes.std):
        value = f"{len(takes.std)} numbers {list(takes.std)}, mean has {len(takes.mean)}"
        raise problem(description, "std", value, "give as many as of mean, none of them 0")
    return takes


def _torchvision_name(name: str) -> str:
    numbered = _NUMBERED.fullmatch(name)
    if numbered is None:
        return name
    place = int(numbered[1])
    child = _CHILDREN[place] if place < len(_CHILDREN) else None
    return f"{child or place}.{numbered[2]}"


def _is_script(file: Path) -> bool:
    """Whether it is an archive of TorchScript, which holds code, and not one of tensors alone."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state(file: Path) -> dict[str, Tensor]:
    """Tensors by name; no code of the file is run."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        is_safetensors = file.suffix == ".safetensors"
        state = load_file(file) if is_safetensors else torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        value = f"{file}: cannot be read as weights ({first_line(error, 120)})"
        raise problem("config", FIELD, value, HOW_TO_GET) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise problem("config", FIELD, f"{file}: no table of tensors", "save the network's state_dict()")
    return state
