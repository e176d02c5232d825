"""diffusers' UNet2DModel computed with the fused kernels: the same weights under the same names, fewer bytes moved.

`fuse` gives the modules of a UNet other forward functions; parameters, state dict and hooks stay as they were. The
blocks pass on a Stream: channels-last activations and their partial statistics, which were computed when the
activations were written, so that the next norm does not read them for its statistics. The outputs of convolutions that
change the side are passed on without their bias: it is a shift of the norms behind them, and with the shortcut it goes
into the next residual sum. So it costs no pass over the activations, and neither does its gradient.

    resnet   SiLU(norm1(x)) -> conv1 -> SiLU(norm2(. + bias + time)) -> conv2 -> + bias + shortcut(x)
    kernel   group_norm_silu            group_norm_silu                        residual_add

With adaptive group norm, norm2 has a weight and a bias for each sample. In the up blocks norm1 and the 1x1 shortcut
read x and the skip where they are (skip_group_norm_silu, two GEMMs), and conv_in, if there is no stem before it, reads
the label map itself (label_conv_in). N batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_dist.diffusers_parts import (
    Attention,
    Downsample2D,
    ResnetBlock2D,
    UNet2DOutput,
    Upsample2D,
    blocks,
    recomputed,
)
from segdiff_kernels.group_norm_silu import group_norm_silu
from segdiff_kernels.label_conv_in import label_conv_in
from segdiff_kernels.residual_add import residual_add
from segdiff_kernels.skip_group_norm_silu import skip_group_norm_silu

MOST_ELEMENTS = 2**31 - 1


class Stream(NamedTuple):
    """Passed from block to block: x_NCHW, its partial statistics if residual_add computed them, and a bias that is
    still to be added to x_NCHW."""

    x_NCHW: Tensor
    partials: Tensor | None = None
    bias_C: Tensor | None = None

    @property
    def shift_NC(self) -> Tensor | None:
        """The bias for each sample."""
        return None if self.bias_C is None else self.bias_C.expand(len(self.x_NCHW), -1)


def why_not_fused(unet: diffusers.UNet2DModel) -> str | None:
    """The part of this UNet that the kernels cannot compute; None if they can compute all of it."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            takes_time = module.time_embedding_norm in ("default", "scale_shift") and not module.skip_time_act
            if not takes_time or module.up or module.down:
                return "its resnets resample, or do not take the time by addition or by scale and shift"
            if module.dropout.p > 0:
                return f"its dropout is {module.dropout.p:g}"
            if module.output_scale_factor != 1.0:
                return f"its output_scale_factor is {module.output_scale_factor:g}"
        elif isinstance(module, Attention) and module.rescale_output_factor != 1.0:
            return f"its rescale_output_factor is {module.rescale_output_factor:g}"
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if type(block) not in _FUSED:
            return f"it holds a {type(block).__name__}"
    return "it centres its input" if unet.config.center_input_sample else None


def fuse(unet: diffusers.UNet2DModel, *, reads_labels: bool) -> None:
    """Make `unet` compute with the kernels; assert why_not_fused(unet) is None.

    `reads_labels`: conv_in takes the label map itself instead of its one-hot channels. Its forward is then
    (x_t_B1HW, timestep_B, class_labels, mask_BHW=..., edge_B2HW=...), else diffusers' own.
    """
    assert why_not_fused(unet) is None
    for module in unet.modules():
        fused = _FUSED.get(type(module))
        if fused is not None:
            module.__class__ = fused
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv1.__class__ = module.conv2.__class__ = _Conv
            if module.conv_shortcut is not None:
                module.conv_shortcut.__class__ = _Shortcut
        elif isinstance(module, Attention):
            module.group_norm.__class__ = _PlainNorm
        elif isinstance(module, Upsample2D):
            conv = module.conv
            conv.__class__ = _UpsamplingConv
            conv.register_buffer("sums_9T", sums_of_weights().to(conv.weight), persistent=False)
        elif isinstance(module, Downsample2D):
            module.conv.__class__ = _Conv
    if reads_labels:
        unet.conv_in.__class__ = _LabelConv


class UNet2DModel(diffusers.UNet2DModel):
    """diffusers' forward, with streams between the blocks. save_config writes its class name."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **labels: Any,
    ) -> Any:
        """As diffusers', except for `labels`: the mask, if conv_in reads it (see fuse)."""
        emb_NE = self.time_embedding(self.time_proj(timestep.expand(sample.shape[0])).to(self.dtype))
        if self.class_embedding is not None:
            emb_NE = emb_NE + self.class_embedding(class_labels).to(self.dtype)
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        times = iter(_times([resnet for block in blocks for resnet in block.resnets], F.silu(emb_NE)))

        # A tensor of one channel is NCHW and NHWC alike. A convolution takes it for NCHW, and its result would be NCHW.
        stream = Stream(self.conv_in(sample, **labels).contiguous(memory_format=torch.channels_last))
        skips: list[Stream] = []
        for block in (*self.down_blocks, self.mid_block):
            stream, kept = block(stream, [next(times) for _ in block.resnets])
            skips += kept
        for block in self.up_blocks:
            here = skips[-len(block.resnets) :]
            del skips[-len(block.resnets) :]
            stream = block(stream, here, [next(times) for _ in block.resnets])
        y_NCHW = self.conv_out(self.conv_norm_out(stream))
        return UNet2DOutput(sample=y_NCHW) if return_dict else (y_NCHW,)


class Time(NamedTuple):
    """The effect of the time in a resnet: SiLU(norm(x + shift_NC)), or with a scale and an offset for each sample
    SiLU(norm(x + shift_NC) (1 + scale_NC) + offset_NC). The shift holds the first convolution's bias."""

    shift_NC: Tensor
    scale_NC: Tensor | None = None
    offset_NC: Tensor | None = None


def _times(resnets: list[Any], emb_NE: Tensor) -> list[Time]:
    """The time embedding of each resnet, from its projection of the time.

    One product for all of them: ten launches for each resnet would take longer than the arithmetic.
    """
    if any(hasattr(resnet.time_emb_proj.weight, "ds_id") for resnet in resnets):
        # ZeRO 3 brings weights together where their module is called.
        return [_time(resnet, resnet.time_emb_proj(emb_NE), resnet.conv1.bias) for resnet in resnets]
    weight_CE = torch.cat([resnet.time_emb_proj.weight for resnet in resnets])
    bias_C = torch.cat([resnet.time_emb_proj.bias for resnet in resnets])
    if all(resnet.time_embedding_norm == "default" for resnet in resnets):
        bias_C = bias_C + torch.cat([resnet.conv1.bias for resnet in resnets])
        shift_NC = F.linear(emb_NE, weight_CE, bias_C)
        return [Time(of_NC) for of_NC in shift_NC.split([len(resnet.conv1.bias) for resnet in resnets], dim=1)]
    rows = F.linear(emb_NE, weight_CE, bias_C).split([len(resnet.time_emb_proj.bias) for resnet in resnets], dim=1)
    return [_time(resnet, row, resnet.conv1.bias) for resnet, row in zip(resnets, rows, strict=True)]


def _time(resnet: Any, projected_NC: Tensor, bias_C: Tensor) -> Time:
    if resnet.time_embedding_norm == "default":
        return Time(projected_NC + bias_C)
    scale_NC, offset_NC = projected_NC.chunk(2, dim=1)
    return Time(bias_C.expand_as(scale_NC), scale_NC, offset_NC)


def _without_bias(x_NCHW: Tensor, bias_C: Tensor) -> Stream:
    """The stream of a convolution that leaves its bias to the next block."""
    if hasattr(bias_C, "ds_id"):  # of ZeRO 3, which takes it away at the end of this block
        return Stream(x_NCHW + bias_C[:, None, None])
    return Stream(x_NCHW, bias_C=bias_C)


class _DownBlock(blocks.DownBlock2D):
    def forward(self, stream: Stream, times: list[Time]) -> tuple[Stream, list[Stream]]:
        """The block's output, and the inputs of its resnets and its downsampling as skips for the up blocks."""
        inputs = []
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        for resnet, attention, time in zip(self.resnets, attentions, times, strict=True):
            stream, kept = recomputed(self, resnet, stream, time, None, True)
            inputs.append(kept)
            stream = stream if attention is None else attention(stream)
        for downsample in self.downsamplers or ():
            inputs.append(stream)
            stream = _without_bias(downsample(stream.x_NCHW), downsample.conv.bias)
        return stream, inputs


class _AttnDownBlock(_DownBlock, blocks.AttnDownBlock2D):
    pass


class _MidBlock(blocks.UNetMidBlock2D):
    def forward(self, stream: Stream, times: list[Time]) -> tuple[Stream, list[Stream]]:
        """The block's output, and its input as the last skip."""
        stream, kept = self.resnets[0](stream, times[0], None, True)
        for attention, resnet, time in zip(self.attentions, self.resnets[1:], times[1:], strict=True):
            stream = stream if attention is None else attention(stream)
            stream = recomputed(self, resnet, stream, time)
        return stream, [kept]


class _UpBlock(blocks.UpBlock2D):
    def forward(self, stream: Stream, skips: list[Stream], times: list[Time]) -> Stream:
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        for resnet, attention, skip, time in zip(self.resnets, attentions, reversed(skips), times, strict=True):
            stream = recomputed(self, resnet, stream, time, skip)
            stream = stream if attention is None else attention(stream)
        for upsample in self.upsamplers or ():
            stream = _without_bias(upsample(stream.x_NCHW), upsample.conv.bias)
        return stream


class _AttnUpBlock(_UpBlock, blocks.AttnUpBlock2D):
    pass


class _Resnet(ResnetBlock2D):
    def forward(self, stream: Stream, time: Time, skip: Stream | None = None, keeps: bool = False) -> Any:
        """The resnet of the stream, or of stream and skip as if they were concatenated; keeps: also the stream again,
        for an up block."""
        # The norm returns its inputs, so that its backward pass adds the gradients of shortcut and up block to theirs.
        y_NCHW, *inputs = self.norm1(stream, skip, fork=2 if keeps else True)
        kept = stream._replace(x_NCHW=inputs.pop()) if keeps else None
        y_NCHW = self.norm2(Stream(self.conv1(y_NCHW)), time=time)
        branch_NCHW, bias_C = self.conv2(y_NCHW), self.conv2.bias
        if self.conv_shortcut is None:
            (shortcut_NCHW,), shortcut_bias_C = inputs, stream.bias_C
        else:
            biases = (stream.bias_C, None if skip is None else skip.bias_C)
            shortcut_NCHW, shortcut_bias_C = self.conv_shortcut(inputs, biases)
        bias_C = bias_C if shortcut_bias_C is None else bias_C + shortcut_bias_C
        sum_of_both = Stream(*residual_add(branch_NCHW, shortcut_NCHW, bias_C, with_partials=True))
        return (sum_of_both, kept) if keeps else sum_of_both


class _Norm(nn.GroupNorm):
    """GroupNorm and SiLU of a stream, or of a stream and a skip as if they were concatenated."""

    activates = True

    def forward(  # type: ignore[override]
        self, stream: Stream, skip: Stream | None = None, time: Time | None = None, fork: bool | int = False
    ) -> Any:
        norm = *_affine(self, time), self.num_groups, self.eps
        options: dict[str, Any] = {"silu": self.activates, "partials": stream.partials, "fork": fork}
        options["shift_NC"] = stream.shift_NC if time is None else time.shift_NC
        if skip is None:
            return group_norm_silu(stream.x_NCHW, *norm, **options)
        options |= {"skip_partials": skip.partials, "skip_shift_NC": skip.shift_NC}
        return skip_group_norm_silu(stream.x_NCHW, skip.x_NCHW, *norm, **options)


def _affine(norm: nn.GroupNorm, time: Time | None) -> tuple[Tensor, Tensor]:
    """The norm's weight and bias, [C], or those of each sample, [N, C], if the time has a scale.

    (weight x + bias) (1 + scale) + offset is a norm with other parameters: numbers of channels, not of pixels.
    """
    if time is None or time.scale_NC is None or time.offset_NC is None:
        return norm.weight, norm.bias
    scale_NC = 1.0 + time.scale_NC.float()
    return norm.weight * scale_NC, norm.bias * scale_NC + time.offset_NC.float()


class _PlainNorm(_Norm):
    activates = False


class _Conv(nn.Conv2d):
    """A later operation adds its bias."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.conv2d(x_NCHW, self.weight, None, self.stride, self.padding)


class _Shortcut(nn.Conv2d):
    """A 1x1 convolution of one tensor, or of two as if they were concatenated."""

    def forward(self, inputs: list[Tensor], biases: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The convolution without its bias, and the bias for residual_add: also the product of the weights and the
        biases that are still to be added to the inputs."""
        bias_O = self.bias
        assert bias_O is not None
        widths = [x_NCHW.shape[1] for x_NCHW in inputs]
        for w_OC, bias_C in zip(self.weight.flatten(1).split(widths, dim=1), biases, strict=False):
            bias_O = bias_O if bias_C is None else torch.addmv(bias_O, w_OC, bias_C)
        return self._without_bias(*inputs), bias_O

    def _without_bias(self, x_NCHW: Tensor, skip_NCHW: Tensor | None = None) -> Tensor:
        if skip_NCHW is None:
            return F.conv2d(x_NCHW, self.weight)
        N, C, H, W = x_NCHW.shape
        w_OC, v_OC = self.weight.flatten(1).split((C, skip_NCHW.shape[1]), dim=1)
        y_MO = _rows(x_NCHW) @ w_OC.T
        # In place: torch.addmm would copy y first. Autocast does not know it.
        y_MO.addmm_(_rows(skip_NCHW).to(y_MO.dtype), v_OC.T.to(y_MO.dtype))
        return y_MO.view(N, H, W, -1).permute(0, 3, 1, 2)


class _LabelConv(nn.Conv2d):
    """conv_in over the noised image and the mask's one-hot channels, from the label map."""

    def forward(  # type: ignore[override]
        self, x_t_B1HW: Tensor, mask_BHW: Tensor, edge_B2HW: Tensor | None = None
    ) -> Tensor:
        assert self.bias is not None
        kind, dtype = x_t_B1HW.device.type, self.weight.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return label_conv_in(x_t_B1HW.to(dtype), mask_BHW, self.weight, self.bias, edge_B2HW=edge_B2HW)


class _Upsample(Upsample2D):
    """Nearest upsampling and the 3x3 convolution behind it, without its bias."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NOHW: Tensor = self.conv(x_NCHW)
        return y_NOHW


class _UpsamplingConv(nn.Conv2d):
    """The 3x3 convolution of an image of twice the side, whose pixels are those of the small image twice in each
    direction, computed from the small image. A later operation adds its bias.

    Each output pixel sees four pixels of the small image through sums of the nine weights. That is a transposed
    convolution of stride 2 with 4x4 weights: in one dimension (w2, w1 + w2, w0 + w1, w0). It has 4/9 of the arithmetic.
    """

    sums_9T: Tensor

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return upsampled_conv(x_NCHW, self.weight, self.sums_9T)


def upsampled_conv(x_NCHW: Tensor, weight_OC33: Tensor, sums_9T: Tensor) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1); sums_9T: sums_of_weights()."""
    # Sums of at most four weights, rounded once.
    weight_CO44 = (weight_OC33.flatten(2) @ sums_9T).unflatten(2, (4, 4)).transpose(0, 1)
    # So that indices of the output fit in an int32.
    at_once = max(1, MOST_ELEMENTS // (4 * len(weight_OC33) * x_NCHW[0, 0].numel()))
    parts = [F.conv_transpose2d(x, weight_CO44, stride=2, padding=1) for x in x_NCHW.split(at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sums_of_weights() -> Tensor:
    """[9, 16]: which of the 3x3 weights make up each of the 4x4."""
    sums_43 = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    return torch.kron(sums_43, sums_43).T.contiguous()


class _Attention(Attention):
    """Self-attention over the pixels of a stream."""

    def forward(self, stream: Stream) -> Stream:
        y_NCHW, x_NCHW = self.group_norm(stream, fork=True)
        N, C, H, W = y_NCHW.shape
        y_NLC = self.processor.of_pixels(self, _rows(y_NCHW).view(N, H * W, C))
        y_NCHW = y_NLC.view(N, H, W, C).permute(0, 3, 1, 2)
        return Stream(*residual_add(y_NCHW, x_NCHW, stream.bias_C, with_partials=True))


_FUSED: dict[type, type] = {
    diffusers.UNet2DModel: UNet2DModel,
    blocks.DownBlock2D: _DownBlock,
    blocks.AttnDownBlock2D: _AttnDownBlock,
    blocks.UNetMidBlock2D: _MidBlock,
    blocks.UpBlock2D: _UpBlock,
    blocks.AttnUpBlock2D: _AttnUpBlock,
    ResnetBlock2D: _Resnet,
    Upsample2D: _Upsample,
    Attention: _Attention,
    nn.GroupNorm: _Norm,
}


def _rows(x_NCHW: Tensor) -> Tensor:
    """[N * H * W, C], a view of a channels-last tensor."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(0, 2)
