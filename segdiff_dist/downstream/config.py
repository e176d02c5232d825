"""What `segdiff evaluate --downstream` trains and tests: the `downstream` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from data_shards.problems import Problem
from data_shards.ranges import Count, Some, WholeNumber, range_problems
from data_shards.settings import Result


@dataclass(frozen=True)
class DownstreamConfig:
    """Trainings of segmenters on real, on generated and on both kinds of images; the network is that of `segmenter`."""

    real_fractions: Result[Some[Annotated[float, Gt(0), Le(1)]]] = (0.25, 0.5, 1.0)
    """Shares of the training patients of each modality whose slices are used, alone and together with the generated
    images. A smaller share's patients are among a larger one's."""
    seeds: Result[Some[WholeNumber]] = (0, 1, 2)
    """Every training is made with each of these seeds. A seed fixes the choice of patients, the first weights and the
    order of the images."""
    num_masks: Result[Count | None] = None
    """Masks of the train split that generated images are made from. null: all of them."""
    images_per_mask: Result[Count] = 1
    """Generated images of each mask."""
    num_images: Result[Count | None] = None
    """Images of every training, with repetitions. null: segmenter.train.num_images."""
    split: Result[Literal["val", "test"] | None] = None
    """The split whose real slices are the test. null: the split of the evaluated samples' masks. If it is val, no
    training chooses its weights by it: the last weights are tested."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        problems = range_problems(self, "config", "downstream.")
        if not problems and len({share_name(f) for f in self.real_fractions}) < len(self.real_fractions):
            problems.append(Problem("config", "downstream.real_fractions", str(self.real_fractions), "give each once"))
        return problems


def share_name(fraction: float) -> str:
    """A share of the patients, for names: 0.25 is `25`."""
    return f"{100 * fraction:g}"
