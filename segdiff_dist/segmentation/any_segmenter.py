"""Segmenters of other projects, which evaluate images independently: TorchScript files and MONAI bundles.

A TorchScript file is a program: loading it runs the code in it. So it is used only if the user names it.

FILE.pt, FILE.yaml                                     the network, and beside it what it takes and gives
BUNDLE/models/model.ts, BUNDLE/configs/metadata.json   the same of a MONAI bundle; BUNDLE/segdiff.yaml goes before it

Dimensions: B batch, C channels, K classes, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor
from torch.nn.functional import interpolate

from data_shards.choices import Modality
from data_shards.documents import read_json, reading
from data_shards.files import first_line
from data_shards.labels import BACKGROUND, LabelTable
from data_shards.modalities import MODALITIES
from data_shards.problems import Problem, problem, refuse
from data_shards.ranges import RISING, range_problems
from data_shards.settings import Result
from segdiff_dist.config import read_yaml, validate
from segdiff_dist.segmentation.segmenter import Segmenter, predicted_labels
from segdiff_dist.segmentation.tools import ToolSegmenter, is_tool, open_tool
from segdiff_dist.weight_files import DESCRIPTION

_BUNDLE_NETWORK, _BUNDLE_METADATA, _BUNDLE_CONFIG = "models/model.ts", "configs/metadata.json", "segdiff.yaml"
_ENDINGS = (".pt", ".pth", ".ts")
_Range = Annotated[tuple[float, float], RISING]


@dataclass(frozen=True)
class TorchScriptConfig:
    """Input and output of a TorchScript network: a float32 image [B, channels, H, W]; scores [B, K, H, W] or label ids
    [B, H, W] or [B, 1, H, W]."""

    names: Result[dict[int, str]]
    """The class of each id: 0 is background, the others without a gap, organs named as in the masks' label table."""
    size: Result[Annotated[int, Interval(ge=8, le=2048)] | None] = None
    """The side in pixels to which images are resampled; labels are resampled back. null: no resampling."""
    window_hu: Result[_Range | None] = None
    """CT: the HU that become the ends of `range`. null: the darkest and the brightest grey value do."""
    range: Result[_Range] = (0.0, 1.0)
    """The values that the ends of the window become."""
    mean: Result[float] = 0.0
    """Subtracted after that."""
    std: Result[Annotated[float, Gt(0)]] = 1.0
    """The difference is divided by it."""
    channels: Result[Literal[1, 3]] = 1
    """3: the image three times."""
    modalities: Result[tuple[Modality, ...]] = MODALITIES
    """The modalities of its training."""
    output: Result[Literal["scores", "labels"]] = "scores"


@dataclass(frozen=True)
class TorchScriptSegmenter:
    """A TorchScript network, ready to use. `own_of`: uint8 [256], the table's id by the network's; `hu`: of the darkest
    and the brightest grey value."""

    net: Any
    file: Path
    config: TorchScriptConfig
    label_table: LabelTable
    weights_sha256: str
    device: torch.device
    own_of: Tensor
    hu: tuple[float, float] | None = None

    @classmethod
    def load(cls, file: Path, config: TorchScriptConfig, device: torch.device | str = "cpu") -> TorchScriptSegmenter:
        """Runs the code in the file. Raises InputProblems if it cannot be read, or if its names make no table."""
        table = _table_of(file, config)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                net = torch.jit.load(file, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            remedy = "give a file that torch.jit.save wrote"
            raise problem(file, "segmenter", f"no TorchScript ({first_line(error, 120)})", remedy) from error
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return cls(net, file, config, table, digest, torch.device(device), torch.arange(256, dtype=torch.uint8))

    @property
    def modalities(self) -> tuple[str, ...]:
        """In the order of the ids that `predict` takes."""
        return self.config.modalities if set(self.config.modalities) - set(MODALITIES) else MODALITIES

    def suited(self, table: LabelTable, hu: tuple[float, float] | None) -> TorchScriptSegmenter:
        """The same, for masks of a table: its labels are mapped to the table's; classes that the table does not have
        become background."""
        own_of = torch.zeros(256, dtype=torch.uint8)
        for theirs, name in enumerate(self.label_table.names):
            own_of[theirs] = table.names.index(name) if name in table.names else 0
        return replace(self, own_of=own_of.to(self.device), hu=hu)

    def problems(
        self, table: LabelTable, modalities: Sequence[str], hu: tuple[float, float] | None
    ) -> Iterator[Problem]:
        """Conflicts with images of these modalities whose masks are of `table`."""
        where = str(self.file)
        organs = [table.names[i] for i in table.organ_ids]
        if unknown := [name for name in organs if name not in self.label_table.names]:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            value = f"{len(unknown)} of the masks' {len(organs)} organs are not in it: {shown}"
            yield Problem(where, "names", value, "name its classes as the masks' table does, or give another segmenter")
        if others := [m for m in modalities if m not in self.config.modalities]:
            value, remedy = f"trained on {', '.join(self.config.modalities)}", "give one that knows these images"
            yield Problem(where, "modalities", f"{value}, the images are {', '.join(others)}", remedy)
        if self.config.window_hu is not None and "CT" in modalities and hu is None:
            remedy = "leave window_hu out, or give images of a set whose CT has one window"
            yield Problem(where, "window_hu", "the HU of the images' grey values are not known", remedy)

    @torch.no_grad()
    def predict(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """uint8 label ids [B, H, W] of uint8 images, in the ids of the table."""
        assert image_BHW.dtype == torch.uint8, image_BHW.dtype
        side, config = image_BHW.shape[1:], self.config
        x_B1HW = self._normalised(image_BHW.to(self.device), modality_B.to(self.device))
        if config.size is not None and side != (config.size, config.size):
            x_B1HW = interpolate(x_B1HW, (config.size,) * 2, mode="bilinear", antialias=True)
        output = self.net(x_B1HW.expand(-1, config.channels, -1, -1).contiguous())
        ids_BHW = self._labels(output, (len(image_BHW), *side))
        return self.own_of[ids_BHW.clamp(0, 255).long()]

    def predict_and_features(self, image_BHW: Tensor, modality_B: Tensor) -> tuple[Tensor, None]:
        """Never called: it has no features."""
        return self.predict(image_BHW, modality_B), None

    def _normalised(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 [B, 1, H, W]."""
        share_BHW, config = image_BHW.float() / 255.0, self.config
        if config.window_hu is not None and self.hu is not None:
            (low, high), (first, last) = self.hu, config.window_hu
            of_ct_BHW = ((share_BHW * (high - low) + low - first) / (last - first)).clamp(0, 1)
            is_ct_B = (modality_B == (self.modalities.index("CT") if "CT" in self.modalities else -1))[:, None, None]
            share_BHW = torch.where(is_ct_B, of_ct_BHW, share_BHW)
        low, high = config.range
        return ((share_BHW * (high - low) + low - config.mean) / config.std)[:, None]

    def _labels(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """Its own ids [B, H, W] at the images' size."""
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise ValueError(f"{self.file} gives {type(output).__name__}, not one tensor of three or four dimensions")
        output_BCHW = output if output.ndim == 4 else output[:, None]
        if self.config.output == "scores":
            if output_BCHW.shape[1] != self.label_table.num_classes:
                value = f"{output_BCHW.shape[1]} classes, {self.label_table.num_classes} names"
                raise ValueError(f"{self.file} gives scores of {value}")
            if output_BCHW.shape[2:] != shape[1:]:
                output_BCHW = interpolate(output_BCHW.float(), shape[1:], mode="bilinear")
            return predicted_labels(output_BCHW)
        if output_BCHW.shape[2:] != shape[1:]:
            output_BCHW = interpolate(output_BCHW.float(), shape[1:], mode="nearest-exact")
        return output_BCHW[:, 0]


AnySegmenter = Segmenter | TorchScriptSegmenter | ToolSegmenter


def open_any_segmenter(path: Path, device: torch.device | str = "cpu") -> AnySegmenter:
    """The segmenter at `path`: a folder that this system trained, a TorchScript file with its description beside it, a
    MONAI bundle, or a program (tools.py). Raises InputProblems."""
    if is_tool(path):
        return open_tool(path)
    if path.is_file():
        return TorchScriptSegmenter.load(path, _read_config(path.with_suffix(".yaml")), device)
    if not (path / DESCRIPTION).is_file() and (path / _BUNDLE_NETWORK).is_file():
        own = path / _BUNDLE_CONFIG
        config = _read_config(own) if own.is_file() else _config_of_bundle(path / _BUNDLE_METADATA)
        return TorchScriptSegmenter.load(path / _BUNDLE_NETWORK, config, device)
    if path.suffix in _ENDINGS:
        raise problem(path, "segmenter", "no such file", "give a TorchScript file")
    return Segmenter.load(path, device)


def _read_config(file: Path) -> TorchScriptConfig:
    if not file.is_file():
        remedy = "write `names: {0: background, 1: ...}` there, and what docs/metrics.md lists"
        raise problem(file, "description of the segmenter", "not there", remedy)
    config = validate(TorchScriptConfig, read_yaml(file), file)
    refuse(range_problems(config, str(file)))
    return config


def _config_of_bundle(file: Path) -> TorchScriptConfig:
    """The description from a bundle's metadata.json (MONAI bundle specification, network_data_format)."""
    remedy = f"describe the network in {file.parents[1] / _BUNDLE_CONFIG}"
    with reading(file, "the metadata of a MONAI bundle", remedy):
        formats = read_json(file, remedy)["network_data_format"]
        image, pred = next(iter(formats["inputs"].values())), formats["outputs"]["pred"]
        sides = image["spatial_shape"]
        names = {int(i): str(name) for i, name in pred["channel_def"].items()}
        values: dict[str, Any] = {"names": names, "channels": image["num_channels"]}
        if len(sides) != 2:
            raise problem(file, "spatial_shape", f"{len(sides)} dimensions", "give the bundle of a 2-D network")
        if sides[0] == sides[1] and isinstance(sides[0], int):
            values["size"] = sides[0]
        if len(image.get("value_range") or ()) == 2:
            values["range"] = image["value_range"]
    return validate(TorchScriptConfig, values, file)


def _table_of(file: Path, config: TorchScriptConfig) -> LabelTable:
    """The table of its own ids."""
    remedy = f"name the ids 0, 1, 2, ... without a gap, each once; 0 is {BACKGROUND}"
    if sorted(config.names) != list(range(len(config.names))):
        raise problem(file, "names", f"ids {sorted(config.names)}", remedy)
    try:
        return LabelTable(file.stem, tuple(config.names[i] for i in range(len(config.names))))
    except ValueError as error:
        raise problem(file, "names", first_line(error), remedy) from error
