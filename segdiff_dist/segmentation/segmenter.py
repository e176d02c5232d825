"""A trained segmenter: its weights on disk, and its predictions.

Dimensions: B batch, K classes, H rows, W columns, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_shards.documents import read_json, reading
from data_shards.files import new_file, write_atomic
from data_shards.labels import LabelTable
from data_shards.modalities import MODALITIES, modalities_of
from data_shards.problems import Problem, problem, refuse
from data_shards.store.set_index import MODALITIES_KEY
from segdiff_dist.config import how_to_make, validate
from segdiff_dist.segmentation.config import NORM_GROUPS, SegmenterConfig
from segdiff_dist.segmentation.network import SegmenterNet
from segdiff_dist.weight_files import DESCRIPTION, read_weights, refuse_damaged, write_digests

_WEIGHTS = "model.safetensors"
# Limits for the description of a network that is read: larger ones cannot be built in reasonable time.
_MOST_LEVELS, _MOST_UNITS, _LARGEST_KERNEL = 12, 16, 15


class Segmenter:
    """A trained segmenter, ready to use: fp32, no gradients."""

    def __init__(
        self,
        net: SegmenterNet,
        label_table: LabelTable,
        weights_sha256: str,
        device: torch.device,
        modalities: tuple[str, ...] = MODALITIES,
    ) -> None:
        self.net = net.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.label_table, self.weights_sha256, self.device = label_table, weights_sha256, device
        self.modalities = modalities

    @classmethod
    def load(cls, weights: Path, device: torch.device | str = "cpu") -> Segmenter:
        """The segmenter that training wrote to `weights`. Raises InputProblems if it is missing or damaged."""
        if not (weights / DESCRIPTION).is_file():
            remedy = f"train it first: {how_to_make('train-segmenter', weights)}"
            raise problem(weights, "segmenter", "not found", remedy)
        again = how_to_make("train-segmenter", weights)
        remedy = f"remove {weights}; training again exports it from its checkpoint: {again}"
        refuse_damaged(weights, "segmenter", remedy)
        description = read_json(weights / DESCRIPTION, remedy, "the description of a segmenter")
        with reading(weights / DESCRIPTION, "the description of a segmenter", remedy):
            table = LabelTable.of(description["label_table"])
            shape = {name: description[name] for name in ("channels", "first_stride", "num_res_units", "kernel_size")}
            config = validate(SegmenterConfig, shape, weights / DESCRIPTION)
            refuse(_shape_problems(config, weights / DESCRIPTION))
            modalities = tuple(map(str, description.get(MODALITIES_KEY, MODALITIES)))
            if modalities != modalities_of(modalities):
                raise problem(weights / DESCRIPTION, MODALITIES_KEY, repr(modalities)[:80], remedy)
        files = [("", weights / _WEIGHTS)]
        net = read_weights(files, lambda: SegmenterNet(config, table.num_classes, len(modalities)), "segmenter", remedy)
        digest = hashlib.sha256((weights / _WEIGHTS).read_bytes()).hexdigest()
        return cls(net, table, digest, torch.device(device), modalities)

    def suited(self, table: LabelTable, hu: tuple[float, float] | None) -> Segmenter:
        """Itself: it is used for its own table alone."""
        return self

    def problems(
        self, table: LabelTable, modalities: Sequence[str], hu: tuple[float, float] | None
    ) -> Iterator[Problem]:
        """What keeps it from images whose masks are of `table`."""
        if self.label_table != table:
            value = f"segmenter {self.label_table.name!r}, masks {table.name!r}"
            yield Problem("segmenter", "label table", value, "train the segmenter on shards with these labels")
        if others := [m for m in modalities if m not in self.modalities]:
            value = f"it knows {', '.join(self.modalities)}, the images are {', '.join(others)}"
            yield Problem("segmenter", "modalities", value, "train the segmenter on shards with these modalities")

    @torch.no_grad()
    def predict(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """uint8 label ids [B, H, W] of uint8 or uint16 images."""
        return predicted_labels(self.net(image_BHW.to(self.device), modality_B.to(self.device)))

    @torch.no_grad()
    def features(self, image_BHW: Tensor, modality_B: Tensor) -> Tensor:
        """float32 [B, D] pooled encoder features: the space of `segmenter_frechet`."""
        return self.net.features(image_BHW.to(self.device), modality_B.to(self.device)).float()

    @torch.no_grad()
    def predict_and_features(self, image_BHW: Tensor, modality_B: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the above, from one pass through the encoder."""
        scores, features = self.net.scores_and_features(image_BHW.to(self.device), modality_B.to(self.device))
        return predicted_labels(scores), features.float()


def predicted_labels(scores_BKHW: Tensor) -> Tensor:
    """uint8 [B, H, W]: the class of the highest score."""
    # argmax gives the same and takes 1.5 times as long on a CPU.
    return scores_BKHW.max(dim=1).indices.to(torch.uint8)


def save_segmenter(
    folder: Path,
    weights: dict[str, Tensor],
    config: SegmenterConfig,
    table: LabelTable,
    modalities: tuple[str, ...] = MODALITIES,
) -> None:
    """Write weights as safetensors, and beside them the description from which the network is built.

    A reader sees the earlier files or the new ones, never a part.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / _WEIGHTS) as unfinished:
        save_file({k: v.contiguous() for k, v in weights.items()}, unfinished)
    description = {
        "channels": config.channels,
        "first_stride": config.first_stride,
        "num_res_units": config.num_res_units,
        "kernel_size": config.kernel_size,
        "label_table": table.described,
    } | ({} if modalities == MODALITIES else {MODALITIES_KEY: list(modalities)})
    write_atomic(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    write_digests(folder, (_WEIGHTS, DESCRIPTION))


def _shape_problems(config: SegmenterConfig, where: Path) -> list[Problem]:
    """A problem if a network of this shape cannot be built, or not in reasonable time. The description may come from
    anybody."""
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
