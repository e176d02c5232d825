"""The denoiser: diffusers' UNet2DModel, told the mask, the modality and the axis.

The mask enters by concatenation to the noised image (Konz et al. 2024; section 3.2 of the paper), the modality and
axis as a class embedding added to the time embedding. Dimensions: B batch, C channels, K mask channels, H, W.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_shards.labels import LabelTable
from data_shards.problems import Problem, problem
from data_shards.records import AXES, MODALITIES
from segdiff_dist.attention import AttentionBackend, choose_attention, set_attention

# One class for each (modality, axis), and one that says nothing of either.
NUM_CLASSES = len(MODALITIES) * len(AXES) + 1

MaskEncoding = Literal["onehot", "embedding", "scalar_255", "scalar_signed"]


@dataclass(frozen=True)
class DenoiserConfig:
    """The network. The defaults are the paper's (section 4.2): 113.7 M parameters at 256x256."""

    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    layers_per_block: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature-map sides at which the blocks hold self-attention; the middle block always does."""
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    conditioning: Literal["concat"] = "concat"
    mask_encoding: MaskEncoding = "onehot"
    """One channel a class; a learned embedding of the class; or the label number in one channel, as label / 255
    (Konz et al.) or 2 * label / 255 - 1 (the paper's code)."""
    mask_embedding_dim: int = 8
    class_conditioning: bool = True
    """Tell the net the modality and the axis."""
    attention: AttentionBackend = "auto"

    def problems(self, size: int | None = None) -> list[Problem]:
        """What is out of range, also for slices of side `size` where it is known."""
        found = []

        def add(name: str, value: object, remedy: str) -> None:
            found.append(Problem("config", f"denoiser.{name}", str(value), remedy))

        channels, groups = self.block_out_channels, self.norm_num_groups
        if not channels or min(channels) < 1 or groups < 1 or any(c % groups for c in channels):
            add("block_out_channels", list(channels), f"give channels that norm_num_groups ({groups}) divides")
        if self.layers_per_block < 1:
            add("layers_per_block", self.layers_per_block, "give at least 1")
        if self.attention_head_dim < 1 or (channels and channels[-1] % self.attention_head_dim):
            add("attention_head_dim", self.attention_head_dim, "give a width that divides the last channel count")
        if self.mask_embedding_dim < 1:
            add("mask_embedding_dim", self.mask_embedding_dim, "give at least 1")
        if size is not None and size % 2 ** (len(channels) - 1):
            add("block_out_channels", list(channels), f"{len(channels)} levels halve {size} pixels unevenly")
        return found


class MaskEncoder(nn.Module):
    """uint8 label map [B, H, W] to float channels [B, K, H, W]."""

    def __init__(self, encoding: MaskEncoding, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.encoding, self.num_classes = encoding, num_classes
        self.embedding = nn.Embedding(num_classes, embedding_dim) if encoding == "embedding" else None
        self.num_channels = {"onehot": num_classes, "embedding": embedding_dim}.get(encoding, 1)

    def forward(self, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
        if self.encoding == "onehot":
            ids_K11 = torch.arange(self.num_classes, device=mask_BHW.device, dtype=torch.uint8)[:, None, None]
            return (mask_BHW[:, None] == ids_K11).to(dtype)
        if self.embedding is not None:
            return self.embedding(mask_BHW.long()).permute(0, 3, 1, 2).to(dtype)
        value_B1HW = mask_BHW[:, None].to(dtype) / 255.0
        return value_B1HW if self.encoding == "scalar_255" else 2.0 * value_B1HW - 1.0


class Denoiser(nn.Module):
    """eps, v or x_0 from a noised image, its timestep, its mask and its class."""

    def __init__(self, config: DenoiserConfig, label_table: LabelTable, size: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.config, self.label_table, self.size = config, label_table, size
        self.mask_encoder = MaskEncoder(config.mask_encoding, label_table.num_classes, config.mask_embedding_dim)
        resolutions = [size // 2**level for level in range(len(config.block_out_channels))]
        attends = [r in config.attention_resolutions for r in resolutions]
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=1 + self.mask_encoder.num_channels,
            out_channels=1,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups,
            num_class_embeds=NUM_CLASSES if config.class_conditioning else None,
        )

    def prepare_for(self, device: torch.device) -> Denoiser:
        """Move to `device` and set the attention backend there.

        Weights stay row-major, which is what DeepSpeed can broadcast and flatten; activations are channels-last.
        """
        set_attention(self.unet, choose_attention(self.config.attention, device))
        return self.to(device)

    def forward(self, x_t_BCHW: Tensor, timestep_B: Tensor, mask_BHW: Tensor, class_B: Tensor) -> Tensor:
        """float32 [B, 1, H, W] prediction, computed in the weights' dtype; x_t float32 in [-1, 1] plus noise."""
        dtype = self.unet.conv_in.weight.dtype
        x_BCHW = torch.cat((x_t_BCHW.to(dtype), self.mask_encoder(mask_BHW, dtype)), dim=1)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        labels = class_B if self.config.class_conditioning else None
        return self.unet(x_BCHW, timestep_B, class_labels=labels, return_dict=False)[0].float()

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `weights` (keys as in state_dict) as a diffusers folder, and beside it what the folder cannot say."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        prefix = "unet."
        unet_weights = {k[len(prefix) :]: v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
        save_file(unet_weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        self.unet.save_config(folder)
        rest = {k: v.contiguous() for k, v in weights.items() if not k.startswith(prefix)}
        if rest:
            save_file(rest, folder / "mask_encoder.safetensors")
        about = {"denoiser": asdict(self.config), "label_table": asdict(self.label_table), "size": self.size}
        (folder / "segdiff.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, attention: AttentionBackend = "auto") -> Denoiser:
        """The denoiser that `save` wrote, in fp32 on the CPU."""
        from safetensors.torch import load_file

        if not (folder / "segdiff.json").is_file():
            raise problem(folder, "weights", "not found", "train first: `segdiff train --config F`")
        about = json.loads((folder / "segdiff.json").read_text())
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["denoiser"].items()}
        config = DenoiserConfig(**{**values, "attention": attention})
        table = LabelTable(about["label_table"]["name"], tuple(about["label_table"]["names"]))
        model = cls(config, table, about["size"])
        weights = {f"unet.{k}": v for k, v in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
        if (folder / "mask_encoder.safetensors").is_file():
            weights |= load_file(folder / "mask_encoder.safetensors")
        model.load_state_dict(weights)
        return model.eval()


def class_ids(modality_B: Tensor, axis_B: Tensor) -> Tensor:
    """int64 [B] class of each (modality, axis); the last class, NUM_CLASSES - 1, stands for neither."""
    return modality_B * len(AXES) + axis_B


def describe(model: nn.Module) -> dict[str, Any]:
    """Figures of a model worth logging."""
    return {"parameters": sum(p.numel() for p in model.parameters())}
