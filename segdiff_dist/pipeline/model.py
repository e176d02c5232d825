"""Masks to images by one model. Dimensions: B batch, H rows, W columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from data_shards.documents import read_json, reading
from data_shards.labels import UNUSED
from data_shards.problems import Problem, problem, refuse
from data_shards.records import AXES
from segdiff_dist.config import validate
from segdiff_dist.denoising.conditioning import Conditions, class_ids
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.denoiser import Denoiser
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.pipeline.description import DESCRIPTION, RESTORE, description_of, net_of, trained_process
from segdiff_dist.ranks.distributed import pick_device
from segdiff_dist.sampling.batch_size import batch_size_of, memory_bytes
from segdiff_dist.sampling.config import LEAST_BATCH
from segdiff_dist.sampling.generation import PassOptions, generate

if TYPE_CHECKING:
    from PIL.Image import Image

    from data_shards.store.shards import ShardSet

# More at once is not faster.
_MOST_AT_ONCE = 16


class SliceKey(NamedTuple):
    """What fixes an image beside its mask."""

    item_id: int
    modality: str
    axis: str
    seed: int


@dataclass(frozen=True)
class SegGuidedPipeline:
    """Masks to images by one model. `from_pretrained` reads what `segdiff export --format pipeline` wrote."""

    model: Denoiser
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    device: torch.device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["bf16", "fp32"] = "fp32",
    ) -> SegGuidedPipeline:
        """The pipeline or the MONAI bundle in `folder`; `precision`: of the network. Raises InputProblems if the folder
        is neither."""
        folder = Path(folder)
        file = description_of(folder)
        if not file.is_file():
            remedy = "give what `segdiff export --run RUN --format pipeline OUT` wrote"
            raise problem(folder, "pipeline", f"no {DESCRIPTION}", remedy)
        description = read_json(file, RESTORE)
        with reading(file, "the description of a pipeline", RESTORE):
            diffusion = validate(DiffusionConfig, description["diffusion"], file)
            sampler = validate(SamplerConfig, description["sampler"], file)
        return cls.from_weights(net_of(folder), diffusion, sampler, device=device, precision=precision)

    @classmethod
    def from_weights(
        cls,
        weights: Path,
        diffusion: DiffusionConfig,
        sampler: SamplerConfig,
        *,
        device: Literal["auto", "cpu", "cuda"],
        precision: Literal["bf16", "fp32"],
    ) -> SegGuidedPipeline:
        """The model in a folder under RUN/weights. `diffusion` is used if the weights do not hold theirs. Guidance that
        needs another network (segmenter guidance, autoguidance) is left out. Raises InputProblems, also if the sampler
        does not go with the net's training."""
        chosen = pick_device(device)
        model = Denoiser.load(weights).prepare_for(chosen)
        process, own = trained_process(weights, diffusion), sampler.alone
        refuse(own.problems(process))
        return cls(model.to(torch.bfloat16) if precision == "bf16" else model, process, own, chosen)

    def __call__(
        self,
        mask: Any,
        modality: str = "MR",
        *,
        axis: str = "axial",
        seed: int = 0,
        num_inference_steps: int | None = None,
        first_item: int = 0,
    ) -> Image | list[Image]:
        """8-bit grey PIL images: one of a mask [H, W], a list of masks [B, H, W].

        `mask`: label ids of `labels`, any integer array or a PIL image, of `size` pixels, shown as docs/data.md says.
        Image b has the noise of (seed, first_item + b): at the same precision, those of `segdiff sample` for that item.
        num_inference_steps: null is the exported sampler's. Raises InputProblems.
        """
        from PIL import Image

        mask_BHW, is_one = self.checked(np.asarray(mask), modality, axis)
        num_steps = self.sampler.num_steps if num_inference_steps is None else num_inference_steps
        sampler = replace(self.sampler, num_steps=num_steps)
        refuse(
            [
                *sampler.problems(self.diffusion),
                *problems_with_seed("seed", seed),
                *problems_with_seed("first_item", first_item),
            ]
        )
        item_ids = list(range(first_item, first_item + len(mask_BHW)))
        made_BHW = replace(self, sampler=sampler).generate(mask_BHW, item_ids, modality, axis, seed)
        images = [Image.fromarray(image_HW) for image_HW in made_BHW]
        return images[0] if is_one else images

    def generate(
        self,
        mask_BHW: np.ndarray,
        item_ids: list[int],
        modality: str,
        axis: str,
        seed: int,
        described: str | None = None,
    ) -> np.ndarray:
        """uint8 [B, H, W] of checked masks, each with the noise of (seed, item id), as many at once as fit;
        `described`: the text of a progress bar, if one is wanted."""
        from data_shards.progress import progress_bar

        refuse(problems_with_seed("seed", seed))
        num = self.num_at_once
        image_BHW = np.empty_like(mask_BHW)
        with progress_bar(total=len(mask_BHW), desc=described, unit="img", disable=described is None) as bar:
            for at in range(0, len(mask_BHW), num):
                rows = list(range(at, min(at + num, len(mask_BHW))))
                wanted = [SliceKey(item_ids[row], modality, axis, seed) for row in rows]
                image_BHW[rows] = self.generate_at_once(mask_BHW[rows], wanted)
                bar.update(len(rows))
        return image_BHW

    @torch.inference_mode()
    def generate_at_once(
        self, mask_BHW: np.ndarray, keys: Sequence[SliceKey], on_pass: Callable[[], None] | None = None
    ) -> np.ndarray:
        """uint8 [B, H, W] of checked masks in one batch. An image depends on its mask and its key alone, not on the
        others. `on_pass`: called after each evaluation of a noise level; what it raises ends the work."""
        # Filled up as in sampling, so that an image alone is rounded as in a larger batch.
        filled = [*range(len(keys)), *[0] * (LEAST_BATCH - len(keys))]
        keys_B = [keys[row] for row in filled]
        modality_B = torch.tensor([self.model.modalities.index(key.modality) for key in keys_B])
        axis_B = torch.tensor([AXES.index(key.axis) for key in keys_B])
        shown_BHW = torch.from_numpy(mask_BHW[filled]).to(self.device)
        conditions = Conditions(shown_BHW, class_ids(modality_B, axis_B).to(self.device))
        items = [{"item_id": key.item_id} for key in keys_B]
        seed_B1 = torch.tensor([[key.seed] for key in keys_B], device=self.device)
        options = PassOptions(on_pass=on_pass)
        made_BHW = generate(self.model, items, conditions, self.diffusion, self.sampler, seed_B1, options)
        return made_BHW[: len(keys)]

    def size_with(self, shards: ShardSet, modality: str) -> int:
        """`size`. Raises InputProblems if the set's slices are not what the model was trained on, or if it does not
        know the modality."""
        table, known = self.model.label_table, self.model.trained_on
        if modality not in known:
            remedy = f"the model knows {', '.join(known)}: choose from these"
            raise problem("command line", "--modality", modality, remedy)
        if table == shards.label_table and self.size <= shards.size:
            return self.size
        value = f"{shards.label_table.name!r} at {shards.size} pixels"
        remedy = f"the model was trained on {table.name!r} at {self.size}: give that set"
        raise problem(shards.root, "label set, size", value, remedy)

    @property
    def size(self) -> int:
        """Rows and columns of masks and images."""
        return self.model.size

    @property
    def labels(self) -> dict[int, str]:
        """The meaning of the ids in a mask."""
        return {i: name for i, name in enumerate(self.model.label_table.names) if name != UNUSED}

    @property
    def num_at_once(self) -> int:
        """Masks that `generate` takes through the network together. On a CPU always as many: with several threads, its
        products are rounded by their size; and more are not faster (the small model: 0.11 s of a core a slice at 4, 8
        and 16)."""
        if self.device.type == "cpu":
            return LEAST_BATCH
        passes = 1 if self.sampler.guidance == 1.0 else 2
        return batch_size_of(self.model, passes, memory_bytes(self.device.type), _MOST_AT_ONCE)

    def checked(self, mask: np.ndarray, modality: str, axis: str) -> tuple[np.ndarray, bool]:
        """uint8 [B, H, W] and whether it was one mask. Raises InputProblems."""
        problems = []

        def check(field: str, good: bool, value: object, remedy: str) -> None:
            if not good:
                problems.append(Problem("pipeline", field, str(value), remedy))

        known = self.model.trained_on
        check("modality", modality in known, modality, f"give one of {', '.join(known)}")
        check("axis", axis in AXES, axis, f"give one of {', '.join(AXES)}")
        fits = mask.ndim in (2, 3) and mask.size > 0 and mask.shape[-2:] == (self.size, self.size)
        check("mask", fits, f"shape {mask.shape}", f"give [H, W] or [B, H, W] of {self.size} x {self.size} pixels")
        whole = mask.dtype.kind in "bui"
        check("mask", whole, f"dtype {mask.dtype}", "give whole numbers, the label ids")
        unknown = sorted(set(np.unique(mask).tolist()) - set(self.labels)) if whole else []
        check("mask", not unknown, f"label ids {unknown}", f"use those of {self.model.label_table.name!r}: .labels")
        refuse(problems)
        return mask.astype(np.uint8).reshape(-1, self.size, self.size), mask.ndim == 2


def problems_with_seed(name: str, given: Any) -> list[Problem]:
    """Why an argument cannot choose the noise. From 0, as in `segdiff paint`."""
    if isinstance(given, Integral) and 0 <= int(given) < 2**63:
        return []
    return [Problem("pipeline", name, repr(given)[:60], f"give a whole number from 0 to {2**63 - 1}")]
