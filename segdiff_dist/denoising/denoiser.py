"""The denoiser: diffusers' UNet2DModel, conditioned on the mask, the modality and the axis.

The mask is joined to the noised image (conditioning.py), enters at the norms (spade.py), or is read by a copy of the
encoder of a frozen net (control.py). Modality and axis enter as a class embedding, added to the time embedding.
Dimensions: B batch, C channels, K mask channels, A entries of an augmentation label, H, W.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.documents import read_json, reading
from data_shards.files import updated_folder
from data_shards.labels import LabelTable
from data_shards.modalities import MODALITIES, is_modality, modalities_of
from data_shards.problems import Problem, problem, refuse
from data_shards.records import Batch
from data_shards.store.set_index import MODALITIES_KEY
from segdiff_dist.attention import choose_attention, set_attention
from segdiff_dist.config import how_to_make, validate
from segdiff_dist.config.choices import AttentionBackend
from segdiff_dist.denoising.cascade import DESCRIBED as STAGE
from segdiff_dist.denoising.cascade import LOWER, LevelEmbedding, LowerStage, NetSpace, ShrunkSpace, enlarged
from segdiff_dist.denoising.conditioning import NULL_MASK, Conditions, MaskEncoder, MaskJoin, class_ids
from segdiff_dist.denoising.config import DenoiserConfig
from segdiff_dist.denoising.dropout import use_dropout
from segdiff_dist.denoising.latent_space import BESIDE_WEIGHTS, DESCRIBED, LatentSpace
from segdiff_dist.denoising.spade import Spade
from segdiff_dist.denoising.stem_unet import PixelHead, make_unet, zero_init_residuals
from segdiff_dist.denoising.time_addition import AugmentationLabels
from segdiff_dist.denoising.weights_layout import UNET_FILE, files_in, tensors_by_file
from segdiff_dist.weight_files import DESCRIPTION, read_weights, refuse_damaged, write_digests
from segdiff_kernels.backend import Kernels, why_not_triton

if TYPE_CHECKING:
    from segdiff_dist.denoising.control import ControlNet

# More than fits into any GPU.
_MOST_LEVELS, _MOST_LAYERS, _LARGEST_SIZE = 12, 64, 8192
# In segdiff.json: the modalities of the training, if they are not all of the net's.
TRAINED_ON = "trained_on"


@dataclass(frozen=True)
class BaseNet:
    """The frozen denoiser: its settings, and the label table that it was trained with."""

    config: DenoiserConfig
    label_table: LabelTable

    @property
    def described(self) -> dict[str, Any]:
        """For segdiff.json."""
        return {"denoiser": asdict(self.config), "label_table": self.label_table.described}

    @classmethod
    def of(cls, description: Any, where: Path) -> BaseNet:
        """The same from what `described` gave. KeyError and the like if it is not that."""
        config = validate(DenoiserConfig, description["denoiser"], where)
        return cls(config, LabelTable.of(description["label_table"]))


class Denoiser(nn.Module):
    """eps, v or x_0 from a noised image, its timestep, its mask and its class."""

    def __init__(
        self,
        config: DenoiserConfig,
        label_table: LabelTable,
        size: int,
        modalities: Sequence[str] = MODALITIES,
        base: BaseNet | None = None,
        *,
        latent: LatentSpace | None = None,
        lower: LowerStage | None = None,
    ) -> None:
        """`base`: the net that conditioning controlnet freezes. All but `control` is then the base's, by its names.
        `latent`: of config.space latent. `lower`: of config.cascade. `size`: the side of the images, in any space."""
        super().__init__()
        _refuse_too_many_classes(label_table)
        assert (latent is not None, lower is not None) == (config.space == "latent", config.cascade is not None)
        self.config, self.label_table, self.size, self.lower = config, label_table, size, lower
        self.space: NetSpace | None = latent or ShrunkSpace.of(config, size)
        self.lower_net: Denoiser | None = None  # only in nets that `load` gives: training needs its side alone
        channels, side, _ = self.shape
        # The net's modalities, and those of its training, which may be fewer.
        self.modalities = self.trained_on = tuple(modalities)
        self.uses_kernels = self.reads_labels = False
        self.image_prior: nn.Module | None = None
        assert (base is not None) == (config.conditioning == "controlnet")
        self.base = base
        own, table = (config, label_table) if base is None else (base.config, base.label_table)
        self.reads_mask = own.conditioning != "none"
        encoding = own.mask_encoding if self.reads_mask else "onehot"  # which has no weights
        self.mask_encoder = MaskEncoder(encoding, table.num_classes, own.mask_embedding_dim)
        self.mask_join = MaskJoin(own.conditioning, self.mask_encoder.num_channels, channels)
        in_channels = self.mask_join.num_channels + (lower is not None)
        self.unet = make_unet(config, side, in_channels, channels, len(self.modalities))
        self.head = PixelHead() if config.stem > 1 else None
        if config.stem > 1:
            zero_init_residuals(self.unet)
        self.spade = Spade(own, self.unet, self.mask_encoder.num_channels) if own.conditioning == "spade" else None
        self.level = None if lower is None else LevelEmbedding(self.unet)
        self.augmentation_embedding = AugmentationLabels(self.unet) if own.augmentation_labels else None
        self.control: ControlNet | None = None
        if base is not None:
            from segdiff_dist.denoising.control import ControlNet

            self.requires_grad_(False)
            self.control = ControlNet(config, self.unet, label_table).requires_grad_()
        self.draws = use_dropout(self.unet, config.dropout) if config.dropout > 0 else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of x: one channel of the images' side, or that of latents or shrunk slices."""
        return (1, self.size, self.size) if self.space is None else self.space.shape(self.size)

    @property
    def latent(self) -> LatentSpace | None:
        """The space, if it is one of latents."""
        return self.space if isinstance(self.space, LatentSpace) else None

    def prepare_for(self, device: torch.device) -> Denoiser:
        """Move to `device`, and choose the backends of attention and of the operations between the convolutions.

        Weights stay row-major, which is what DeepSpeed can broadcast and flatten; activations are channels-last.
        """
        self.choose_operators(device)
        if self.space is not None:
            self.space.move_to(device)
        return self.to(device)

    def choose_operators(self, device: torch.device) -> None:
        """What computes on `device`, without moving there."""
        set_attention(self, choose_attention(self.config.attention, device, self.config.attention_head_dim))
        lacks_kernels = any(part is not None for part in (self.spade, self.control, self.draws, self.image_prior))
        wanted = "torch" if lacks_kernels else self.config.kernels
        self.uses_kernels = choose_kernels(wanted, device) == "triton"
        if self.lower_net is not None:
            self.lower_net.choose_operators(device)
        if self.uses_kernels:
            from segdiff_dist.denoising.fused_unet import fuse

            is_onehot = self.config.mask_encoding == "onehot" and self.config.conditioning == "concat"
            self.reads_labels = is_onehot and self.config.stem == 1 and self.space is None and self.lower is None
            fuse(self.unet, reads_labels=self.reads_labels)
        elif device.type == "cpu":
            from segdiff_dist.denoising.cpu_unet import adapt_to_cpu

            adapt_to_cpu(self.unet)
            if self.control is not None:
                adapt_to_cpu(self.control)

    def conditions_of(self, batch: Batch) -> Conditions:
        """The conditions in a batch: the arguments of forward after x_t and timestep."""
        edge_B2HW = batch.edge_B2HW if self.config.soft_masks else None
        label_BA = batch.augmentation_BA if self.config.augmentation_labels else None
        return Conditions(batch.mask_BHW, class_ids(batch.modality_B, batch.axis_B), edge_B2HW, None, None, label_BA)

    def forward(
        self,
        x_t_BCHW: Tensor,
        timestep_B: Tensor,
        mask_BHW: Tensor,
        class_B: Tensor,
        edge_B2HW: Tensor | None = None,
        low_B1hw: Tensor | None = None,
        level_B: Tensor | None = None,
        augmentation_BA: Tensor | None = None,
    ) -> Tensor:
        """float32 [B, *shape] prediction, computed in the weights' dtype; x_t float32, in [-1, 1] (latents: of unit
        variance) plus noise. The mask has the images' side in any space. The rest is as in Conditions."""
        dtype = self.unet.conv_in.weight.dtype
        labels = class_B if self.config.class_conditioning else None
        if self.augmentation_embedding is not None:
            self.augmentation_embedding.read(augmentation_BA, len(x_t_BCHW))
        if self.reads_labels:
            return self.unet(x_t_BCHW, timestep_B, labels, False, mask_BHW=mask_BHW, edge_B2HW=edge_B2HW)[0].float()
        x_BCHW = x_t_BCHW.to(dtype)
        if self.reads_mask:
            x_BCHW = self._with_mask(x_BCHW, mask_BHW, edge_B2HW)
        if self.level is not None:
            assert low_B1hw is not None
            assert level_B is not None
            self.level.read(level_B, dtype)
            x_BCHW = torch.cat((x_BCHW, enlarged(low_B1hw, x_BCHW.shape[-1]).to(dtype)), dim=1)
        if self.head is not None:
            x_BCHW = F.pixel_unshuffle(x_BCHW, self.config.stem)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        if self.control is None:
            y_BCHW = self.unet(x_BCHW, timestep_B, class_labels=labels, return_dict=False)[0]
        else:
            y_BCHW = self._controlled(self.control, x_BCHW, timestep_B, labels, (mask_BHW, edge_B2HW))
        if self.spade is not None and not self.unet.is_gradient_checkpointing:  # which computes again from it
            self.spade.forget()
        if self.head is not None:
            y_BCHW = self.head(F.pixel_shuffle(y_BCHW, self.config.stem), x_t_BCHW.to(dtype))
        return y_BCHW.float()

    def _with_mask(self, x_BCHW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None) -> Tensor:
        """x with the encoded mask joined to it, or given to SPADE's norms."""
        shown = (mask_BHW, x_BCHW.dtype, edge_B2HW)
        if self.control is not None:  # which reads it in the base's place
            shown = (torch.full_like(mask_BHW, NULL_MASK), x_BCHW.dtype, None)
        mask_BKHW = self.mask_encoder(*shown)
        if self.space is not None:
            mask_BKHW = self.space.pooled(mask_BKHW)
        if self.spade is not None:
            self.spade.read(mask_BKHW)
        joined_BCHW: Tensor = self.mask_join(x_BCHW, mask_BKHW)
        return joined_BCHW

    def _controlled(
        self,
        control: ControlNet,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        labels_B: Tensor | None,
        mask: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """The base's output, with what the control adds to its skips and its middle."""
        from segdiff_dist.diffusers_parts import run_down_and_mid, run_up

        of_skips, of_mid_BCHW = control(x_BCHW, timestep_B, labels_B, *mask)
        mid_BCHW, emb_BE, skips = run_down_and_mid(self.unet, x_BCHW, timestep_B, labels_B)
        added = [skip + more for skip, more in zip(skips, of_skips, strict=True)]
        return run_up(self.unet, mid_BCHW + of_mid_BCHW, emb_BE, added)

    def save(self, folder: Path, weights: dict[str, Tensor], training: Mapping[str, Any] | None = None) -> None:
        """Write `weights` (keys as in state_dict) as a diffusers folder, and beside it the facts that diffusers' files
        do not hold.

        `training` is also written to segdiff.json: how the weights were trained, which sampling must know.
        """
        from safetensors.torch import save_file

        if self.latent is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.latent.copy_to(folder / BESIDE_WEIGHTS)
        if self.lower is not None:
            self.lower.copy_to(folder / LOWER)
        with updated_folder(folder) as unfinished:
            for name, tensors in tensors_by_file(weights).items():
                # diffusers reads its own file only if it says what it is.
                save_file(tensors, unfinished / name, metadata={"format": "pt"} if name == UNET_FILE else None)
            self.unet.save_config(unfinished)
            description = {**(training or {}), **self._described}
            (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
            write_digests(unfinished, sorted(file.name for file in unfinished.iterdir()))

    @property
    def _described(self) -> dict[str, Any]:
        """The net in segdiff.json: all that building it again needs."""
        description = {
            "denoiser": asdict(self.config),
            "label_table": self.label_table.described,
            "size": self.size,
        }
        if self.base is not None:
            description["base"] = self.base.described
        if self.latent is not None:
            description[DESCRIBED] = self.latent.described
        if self.lower is not None:
            description[STAGE] = self.lower.described
        if self.modalities != MODALITIES:
            description[MODALITIES_KEY] = list(self.modalities)
        return description

    @classmethod
    def load(cls, folder: Path, attention: AttentionBackend = "auto", kernels: Kernels = "auto") -> Denoiser:
        """The denoiser that `save` wrote, in fp32 on the CPU. Weights are refused if they cannot be read, belong to
        another network, or are not finite."""
        if not (folder / DESCRIPTION).is_file():
            raise problem(folder, "weights", "not found", f"train first: {how_to_make('train', folder)}")
        again = how_to_make("train", folder)
        remedy = f"remove {folder.parent}; training again exports them from the newest checkpoint: {again}"
        refuse_damaged(folder, "weights", remedy)
        description_file, what = folder / DESCRIPTION, "the description of a denoiser"
        description = read_json(description_file, remedy, what)
        with reading(description_file, what, remedy):
            config = validate(DenoiserConfig, description["denoiser"], description_file)
            config = replace(config, attention=attention, kernels=kernels, dropout=0.0)
            table = LabelTable.of(description["label_table"])
            size, modalities = int(description["size"]), described_modalities(description, description_file)
            base = BaseNet.of(description["base"], description_file) if config.conditioning == "controlnet" else None
            latent = LatentSpace.beside(folder, description[DESCRIBED]) if config.space == "latent" else None
            lower = None if config.cascade is None else LowerStage.inside(folder, description[STAGE])
            side = size // latent.factor if latent is not None else config.low_resolution or size
            refuse(config.problems(side) + _size_problems(config, size, description_file))
        make = partial(cls, config, table, size, modalities, base, latent=latent, lower=lower)
        model = read_weights(files_in(folder, config), make, "weights", remedy).eval()
        if lower is not None:
            model.lower_net = cls.load(lower.folder, attention, kernels)
        model.trained_on = known_modalities(description, description_file)
        return model


def described_modalities(description: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """The modalities that a net's description names: CT and MR if it names none."""
    names = tuple(description.get(MODALITIES_KEY, MODALITIES))
    if names != modalities_of(names) or not all(map(is_modality, names)):
        raise problem(where, MODALITIES_KEY, repr(names)[:80], "restore the file that training wrote")
    return names


def known_modalities(description: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Those of its training."""
    modalities = described_modalities(description, where)
    return tuple(one for one in modalities if one in description.get(TRAINED_ON, modalities))


def _refuse_too_many_classes(table: LabelTable) -> None:
    if table.num_classes > NULL_MASK:
        remedy = f"use at most {NULL_MASK}: id {NULL_MASK} means a mask that is not shown"
        raise problem(f"label table {table.name!r}", "ids", table.num_classes, remedy)


def _size_problems(config: DenoiserConfig, size: int, where: Path) -> list[Problem]:
    """Refuses nets larger than any that can be trained. Even without memory they would take long to build."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    if levels <= _MOST_LEVELS and layers <= _MOST_LAYERS and 1 <= size <= _LARGEST_SIZE:
        return []
    value = f"{levels} levels of {layers} layers for {size} pixels"
    return [Problem(str(where), "denoiser", value, "restore the file that training wrote")]


def choose_kernels(requested: Kernels, device: torch.device) -> Literal["triton", "torch"]:
    """What computes the net on `device`. A backend that is given by name but not possible is refused. `auto` takes an
    available one, and on a CPU torch, also under Triton's interpreter, which is for tests."""
    if requested == "torch" or (requested == "auto" and device.type == "cpu"):
        return "torch"
    reason = why_not_triton(device)
    if reason is not None and requested == "triton":
        raise problem("config", "denoiser.kernels", "triton", f"{reason}; use auto or torch")
    return "triton" if reason is None else "torch"
