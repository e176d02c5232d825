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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdiff_dist.attention import Joined, joined_projections
from segdiff_dist.denoising.fused_convs import (
    Conv,
    LabelConv,
    LastConv,
    Shortcut,
    UpsamplingConv,
    joined_layouts,
    rows,
    sums_of_weights,
)
from segdiff_dist.diffusers_parts import (
    Attention,
    Downsample2D,
    ResnetBlock2D,
    UNet2DOutput,
    Upsample2D,
    blocks,
    run_checkpointed,
)
from segdiff_kernels.group_norm_silu import group_norm_silu
from segdiff_kernels.residual_add import residual_add
from segdiff_kernels.skip_group_norm_silu import skip_group_norm_silu
from segdiff_kernels.tiles import num_counters


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
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    unet.counters = _Counters(max(norm.num_channels for norm in norms))
    for norm in norms:
        norm.counters = unet.counters
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv1.__class__ = module.conv2.__class__ = Conv
            if module.conv_shortcut is not None:
                module.conv_shortcut.__class__ = Shortcut
        elif isinstance(module, Attention):
            module.group_norm.__class__ = _PlainNorm
        elif isinstance(module, Upsample2D):
            conv = module.conv
            conv.__class__ = UpsamplingConv
            conv.register_buffer("sums_9T", sums_of_weights().to(conv.weight), persistent=False)
        elif isinstance(module, Downsample2D):
            module.conv.__class__ = Conv
    unet.conv_out.__class__ = LastConv
    if reads_labels:
        unet.conv_in.__class__ = LabelConv


class UNet2DModel(diffusers.UNet2DModel):
    """diffusers' forward, with streams between the blocks. save_config writes its class name."""

    counters: _Counters
    # Whether weights are laid out, and their gradients ready, all at once. Not where each gradient is reduced over the
    # ranks as soon as it is ready.
    joins_weights = True

    def forward(self, sample: Tensor, *inputs: Any, **options: Any) -> Any:
        """As diffusers', except for the labels: the mask, if conv_in reads it (see fuse)."""
        layouts = joined_layouts(self) if self.joins_weights else nullcontext()
        with self.counters.of_a_pass(sample), layouts:
            return self._forward(sample, *inputs, **options)

    def _forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **labels: Any,
    ) -> Any:
        emb_NE = self.time_embedding(self.time_proj(timestep.expand(sample.shape[0])).to(self.dtype))
        if self.class_embedding is not None:
            emb_NE = emb_NE + self.class_embedding(class_labels).to(self.dtype)
        shared = Shared.of([*self.down_blocks, self.mid_block, *self.up_blocks], F.silu(emb_NE))

        # A tensor of one channel is NCHW and NHWC alike. A convolution takes it for NCHW, and its result would be NCHW.
        stream = Stream(self.conv_in(sample, **labels).contiguous(memory_format=torch.channels_last))
        skips: list[Stream] = []
        for block in (*self.down_blocks, self.mid_block):
            stream, kept = block(stream, shared)
            skips += kept
        for block in self.up_blocks:
            here = skips[-len(block.resnets) :]
            del skips[-len(block.resnets) :]
            stream = block(stream, here, shared)
        y_NCHW = self.conv_out(self.conv_norm_out(stream))
        return UNet2DOutput(sample=y_NCHW) if return_dict else (y_NCHW,)


class _Counters:
    """The counters of the norms' kernels: set to zero once a pass instead of once a kernel."""

    def __init__(self, most_channels: int) -> None:
        """`most_channels`: of any norm of the net."""
        self.zeros: Tensor | None = None
        self._most_channels = most_channels

    @contextmanager
    def of_a_pass(self, x_NCHW: Tensor) -> Iterator[None]:
        """A context in which there are enough for all norms. Their backward passes keep them."""
        number = num_counters(len(x_NCHW), self._most_channels)
        self.zeros = torch.zeros(number, dtype=torch.int32, device=x_NCHW.device)
        try:
            yield
        finally:
            self.zeros = None


class Time(NamedTuple):
    """The effect of the time in a resnet: SiLU(norm(x + shift_NC)), or with a scale and an offset for each sample
    SiLU(norm(x + shift_NC) (1 + scale_NC) + offset_NC). The shift holds the first convolution's bias."""

    shift_NC: Tensor
    scale_NC: Tensor | None = None
    offset_NC: Tensor | None = None


class Shared(NamedTuple):
    """What is computed for all blocks at once, in their order: the time of each resnet, and the projections of each
    attention."""

    times: Iterator[Time]
    projections: Iterator[Joined | None]

    @classmethod
    def of(cls, blocks: Sequence[Any], emb_NE: Tensor) -> Shared:
        resnets = [resnet for block in blocks for resnet in block.resnets]
        attentions = [module for block in blocks for module in getattr(block, "attentions", ()) if module is not None]
        return cls(iter(_times(resnets, emb_NE)), iter(joined_projections(attentions)))


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
    def forward(self, stream: Stream, shared: Shared) -> tuple[Stream, list[Stream]]:
        """The block's output, and the inputs of its resnets and its downsampling as skips for the up blocks."""
        inputs = []
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        for resnet, attention in zip(self.resnets, attentions, strict=True):
            stream, kept = run_checkpointed(self, resnet, stream, next(shared.times), None, True)
            inputs.append(kept)
            stream = stream if attention is None else attention(stream, next(shared.projections))
        for downsample in self.downsamplers or ():
            inputs.append(stream)
            stream = _without_bias(downsample(stream.x_NCHW), downsample.conv.bias)
        return stream, inputs


class _AttnDownBlock(_DownBlock, blocks.AttnDownBlock2D):
    pass


class _MidBlock(blocks.UNetMidBlock2D):
    def forward(self, stream: Stream, shared: Shared) -> tuple[Stream, list[Stream]]:
        """The block's output, and its input as the last skip."""
        stream, kept = self.resnets[0](stream, next(shared.times), None, True)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            stream = stream if attention is None else attention(stream, next(shared.projections))
            stream = run_checkpointed(self, resnet, stream, next(shared.times))
        return stream, [kept]


class _UpBlock(blocks.UpBlock2D):
    def forward(self, stream: Stream, skips: list[Stream], shared: Shared) -> Stream:
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        for resnet, attention, skip in zip(self.resnets, attentions, reversed(skips), strict=True):
            stream = run_checkpointed(self, resnet, stream, next(shared.times), skip)
            stream = stream if attention is None else attention(stream, next(shared.projections))
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
        # With the partials, so that the up block's norm need not compute them again.
        kept = stream._replace(partials=inputs.pop(), x_NCHW=inputs.pop()) if keeps else None
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
    counters: _Counters

    def forward(  # type: ignore[override]
        self, stream: Stream, skip: Stream | None = None, time: Time | None = None, fork: bool | int = False
    ) -> Any:
        norm = *_affine(self, time), self.num_groups, self.eps
        options: dict[str, Any] = {"silu": self.activates, "partials": stream.partials, "fork": fork}
        options["counters"] = self.counters.zeros
        options["shift_NC"] = stream.shift_NC if time is None else time.shift_NC
        if skip is None:
            return group_norm_silu(stream.x_NCHW, *norm, with_partials=fork == 2, **options)
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


class _Upsample(Upsample2D):
    """Nearest upsampling and the 3x3 convolution behind it, without its bias."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NOHW: Tensor = self.conv(x_NCHW)
        return y_NOHW


class _Attention(Attention):
    """Self-attention over the pixels of a stream."""

    def forward(self, stream: Stream, joined: Joined | None) -> Stream:
        y_NCHW, x_NCHW = self.group_norm(stream, fork=True)
        N, C, H, W = y_NCHW.shape
        y_NLC = self.processor.of_pixels(self, rows(y_NCHW).view(N, H * W, C), joined)
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
