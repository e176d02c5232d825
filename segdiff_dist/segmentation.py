"""The auxiliary segmenter: MONAI's 2-D U-Net, trained on real slices, that judges whether images follow their masks.

Section 4.2 of the paper: channels 16 to 512, kernel 3, stride 2. This file owns MONAI's networks and losses.
Dimensions: B batch, K classes, H rows, W columns, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.documents import read_json, reading
from data_shards.feed.config import LoaderConfig
from data_shards.feed.loader import Loader
from data_shards.feed.order import Sequential, sequential_positions
from data_shards.files import new_file, write_atomic
from data_shards.labels import LabelTable
from data_shards.problems import Problem, problem, refuse
from data_shards.records import MODALITIES, Batch
from segdiff_dist.config import how_to_make, validate
from segdiff_dist.cpu_norm import suit_norms
from segdiff_dist.pixels import to_model_range
from segdiff_dist.ranks.distributed import rank, sum_over_ranks, world_size
from segdiff_dist.segmentation_config import NORM_GROUPS, SegmenterConfig
from segdiff_dist.training.memory_plan import Network, on_meta
from segdiff_dist.weight_files import read_weights, refuse_damaged, write_digests

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

_WEIGHTS, _ABOUT = "model.safetensors", "segdiff.json"
# A class absent from both prediction and mask counts nothing in the validation Dice; this keeps 0/0 finite.
_EPSILON = 1e-6
# Of a net that is read: beyond what anybody trains.
_MOST_LEVELS, _MOST_UNITS, _LARGEST_KERNEL = 12, 16, 15


def _shape_problems(config: SegmenterConfig, where: Path) -> list[Problem]:
    """Of a description that anybody may have written: shapes that cannot be built, or not in any time."""
    fits = (
        2 <= len(config.channels) <= _MOST_LEVELS
        and all(c >= 1 and c % NORM_GROUPS == 0 for c in config.channels)
        and config.first_stride in (1, 2)
        and 0 <= config.num_res_units <= _MOST_UNITS
        and 1 <= config.kernel_size <= _LARGEST_KERNEL
    )
    return (
        [] if fits else [Problem(str(where), "segmenter", "not a net's shape", "restore the file that training wrote")]
    )


class SegmenterNet(nn.Module):
    """Class scores from an image and its modality, which enters as one constant channel for each modality."""

    def __init__(self, config: SegmenterConfig, num_classes: int) -> None:
        super().__init__()
        from monai.networks.nets import UNet

        self.unet = UNet(
            spatial_dims=2,
            in_channels=1 + len(MODALITIES),
            out_channels=num_classes,
            channels=config.channels,
            strides=(config.first_stride, *(2,) * (len(config.channels) - 2)),
            kernel_size=config.kernel_size,
            up_kernel_size=config.kernel_size,
            num_res_units=config.num_res_units,
            norm=("group", {"num_groups": NORM_GROUPS}),
        )
        suit_norms(self.unet)

    def forward(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 scores [B, K, H, W] from uint8 or uint16 images and int64 modality ids."""
        return self.scores(to_model_range(image_BHW), modality_B)

    def scores(self, x_B1HW: Tensor, modality_B: Tensor) -> Tensor:
        """The same from float images in [-1, 1], to which gradients go back."""
        dtype = next(self.parameters()).dtype
        return self.unet(self._inputs(x_B1HW, modality_B).to(dtype)).float()

    def features(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 [B, D]: the mean over pixels of what each encoder level gives."""
        return _pooled(self._encoded(self._inputs(to_model_range(image_BHW), modality_B))[0])

    def scores_and_features(self, image_BHW: Tensor, modality_B: Tensor) -> tuple[Tensor, Tensor]:
        """What a call and `features` give, of one pass through the encoder."""
        levels, decoders = self._encoded(self._inputs(to_model_range(image_BHW), modality_B))
        x = levels[-1]
        for level, decode in zip(levels[-2::-1], decoders[::-1], strict=True):
            x = decode(torch.cat((level, x), dim=1))
        return x.float(), _pooled(levels)

    def _encoded(self, x: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
        """The output of each encoder level, and the decoder of each but the last, both fine to coarse."""
        levels: list[Tensor] = []
        decoders: list[nn.Module] = []
        block: Any = self.unet.model
        while True:  # MONAI nests: [down, skip connection around the next level, up]
            x = block[0](x)
            levels.append(x)
            decoders.append(block[2])
            inner = block[1].submodule
            if not isinstance(inner, nn.Sequential) or len(inner) < 3:
                return [*levels, inner(x)], decoders
            block = inner

    @staticmethod
    def _inputs(x_B1HW: Tensor, modality_B: Tensor) -> Tensor:
        modality_BM = nn.functional.one_hot(modality_B, len(MODALITIES)).to(x_B1HW.dtype)
        planes_BMHW = modality_BM[:, :, None, None].expand(-1, -1, *x_B1HW.shape[2:])
        return torch.cat((x_B1HW, planes_BMHW), dim=1).contiguous(memory_format=torch.channels_last)


def _pooled(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1)


class SegmenterTask:
    """Dice + cross-entropy on the train split; the weights kept are the best on the validation split."""

    name = "segmenter"

    def __init__(
        self,
        shards: ShardSet,
        config: SegmenterConfig,
        loader: LoaderConfig,
        weights: Path,
        device: torch.device,
    ) -> None:
        from monai.losses import DiceCELoss

        self.shards, self.config, self.loader, self.weights, self.device = shards, config, loader, weights, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            self.model: nn.Module = SegmenterNet(config, shards.label_table.num_classes)
        self._loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, include_background=False)
        self._validation_rows = shards.select(split="val", modalities=loader.modalities, axes=loader.axes)
        self.score = "val_dice" if len(self._validation_rows) else None

    def loss(self, forward: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """MONAI's DiceCELoss without background, Dice over every `dice_over` slices in their order."""
        scores_BKHW, mask_B1HW = forward(batch.image_BHW, batch.modality_B), batch.mask_BHW[:, None].long()
        groups = (tensor.split(self.config.dice_group) for tensor in (scores_BKHW, mask_B1HW))
        return torch.stack([self._loss(scores, masks) for scores, masks in zip(*groups, strict=True)]).mean(), {}

    def validate(self, forward: Callable[..., Any], images_seen: int) -> dict[str, float]:
        """Mean over organs of the Dice over the whole validation split; the ranks share the work."""
        return {} if self.score is None else {"val_dice": float(np.nanmean(self._validation_dice(forward)))}

    def export(self, average: str, weights: dict[str, Tensor]) -> None:
        """Write the weights; there is one place for them, whichever average they are."""
        save_segmenter(self.weights, weights, self.config, self.shards.label_table)

    def _validation_dice(self, forward: Callable[..., Any]) -> np.ndarray:
        """Dice of every organ over the whole validation split; NaN for organs that are not in it."""
        organs = torch.tensor(self.shards.label_table.organ_ids, device=self.device, dtype=torch.uint8)
        counts_3K = torch.zeros(3, len(organs), dtype=torch.float64, device=self.device)
        for batch, counts in self._validation_batches():
            predicted_BHW = forward(batch.image_BHW, batch.modality_B).argmax(dim=1).to(torch.uint8)
            if not counts:
                continue
            for i, organ in enumerate(organs):
                p_BHW, m_BHW = predicted_BHW == organ, batch.mask_BHW == organ
                counts_3K[:, i] += torch.stack(((p_BHW & m_BHW).sum(), p_BHW.sum() + m_BHW.sum(), m_BHW.sum()))
        both_K, sizes_K, in_mask_K = sum_over_ranks(counts_3K).cpu().numpy()
        return np.where(in_mask_K > 0, 2 * both_K / (sizes_K + _EPSILON), np.nan)

    def _validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, and whether they count: with sharded weights every rank must go through the net equally
        often, so those that have a batch less repeat the first."""
        size = min(self.config.validation_batch_size, len(self._validation_rows))
        all_positions = list(sequential_positions(len(self._validation_rows), size))
        mine = all_positions[rank() :: world_size()]
        most = -(-len(all_positions) // world_size())
        loader = self.loader
        plain = LoaderConfig(crop_size=loader.crop_size, num_threads=loader.num_threads, on_corrupt=loader.on_corrupt)
        order = Sequential(self._validation_rows)
        positions = iter([*mine, *all_positions[: most - len(mine)]])
        batches = Loader(self.shards, order, positions, plain, batch_size=size, seed=0, device=self.device)
        for number, batch in enumerate(batches):
            yield batch, number < len(mine)


class Segmenter:
    """A trained segmenter, ready to use: fp32, no gradients."""

    def __init__(self, net: SegmenterNet, label_table: LabelTable, weights_sha256: str, device: torch.device) -> None:
        self.net = net.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.label_table, self.weights_sha256, self.device = label_table, weights_sha256, device

    @classmethod
    def load(cls, weights: Path, device: torch.device | str = "cpu") -> Segmenter:
        """The segmenter that training wrote to `weights`; refused where it is not there or not whole."""
        if not (weights / _ABOUT).is_file():
            remedy = f"train it first: {how_to_make('train-segmenter', weights)}"
            raise problem(weights, "segmenter", "not found", remedy)
        again = how_to_make("train-segmenter", weights)
        remedy = f"remove {weights}; training again exports it from its checkpoint: {again}"
        refuse_damaged(weights, "segmenter", remedy)
        about = read_json(weights / _ABOUT, remedy, "the description of a segmenter")
        with reading(weights / _ABOUT, "the description of a segmenter", remedy):
            table = LabelTable(about["label_table"]["name"], tuple(about["label_table"]["names"]))
            shape = {name: about[name] for name in ("channels", "first_stride", "num_res_units", "kernel_size")}
            config = validate(SegmenterConfig, shape, weights / _ABOUT)
            refuse(_shape_problems(config, weights / _ABOUT))
        files = [("", weights / _WEIGHTS)]
        net = read_weights(files, lambda: SegmenterNet(config, table.num_classes), "segmenter", remedy)
        digest = hashlib.sha256((weights / _WEIGHTS).read_bytes()).hexdigest()
        return cls(net, table, digest, torch.device(device))

    @torch.no_grad()
    def predict(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """uint8 label ids [B, H, W] of uint8 or uint16 images."""
        return _best(self.net(image_BHW.to(self.device), modality_B.to(self.device)))

    @torch.no_grad()
    def features(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 [B, D] pooled encoder features: the space of `segmenter_frechet`."""
        return self.net.features(image_BHW.to(self.device), modality_B.to(self.device)).float()

    @torch.no_grad()
    def predict_and_features(self, image_BHW: Tensor, modality_B: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the above, of one pass through the encoder."""
        scores, features = self.net.scores_and_features(image_BHW.to(self.device), modality_B.to(self.device))
        return _best(scores), features.float()


def _best(scores_BKHW: Tensor) -> Tensor:
    """uint8 [B, H, W]: the class of the highest score."""
    # Not argmax, which takes half as long again on a CPU.
    return scores_BKHW.max(dim=1).indices.to(torch.uint8)


def save_segmenter(folder: Path, weights: dict[str, Tensor], config: SegmenterConfig, table: LabelTable) -> None:
    """Write weights as safetensors, and beside them what is needed to build the net again; a reader sees the files of
    before or the new ones, whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / _WEIGHTS) as unfinished:
        save_file({k: v.contiguous() for k, v in weights.items()}, unfinished)
    about = {
        "channels": config.channels,
        "first_stride": config.first_stride,
        "num_res_units": config.num_res_units,
        "kernel_size": config.kernel_size,
        "label_table": asdict(table),
    }
    write_atomic(folder / _ABOUT, json.dumps(about, indent=2) + "\n")
    write_digests(folder, (_WEIGHTS, _ABOUT))


def segmenter_network(config: SegmenterConfig, shards: ShardSet, side: int) -> Network:
    """The segmenter for slices of `side` pixels, for estimates of memory and time."""

    def inputs(images: int) -> tuple[torch.Tensor, ...]:
        return on_meta(images, side, side, dtype=torch.uint8), on_meta(images, dtype=torch.int64)

    return Network(lambda: SegmenterNet(config, shards.label_table.num_classes), inputs)
