"""What `segdiff evaluate --downstream` trains and tests: the `downstream` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_shards.problems import Problem
from data_shards.settings import Result


@dataclass(frozen=True)
class DownstreamConfig:
    """Trainings of segmenters on real, on generated and on both kinds of images; the network is that of `segmenter`."""

    real_fractions: Result[tuple[float, ...]] = (0.25, 0.5, 1.0)
    """Shares of the training patients of each modality. Their slices are used without and with the generated images. A
    larger share contains the patients of a smaller one."""
    seeds: Result[tuple[int, ...]] = (0, 1, 2)
    """Every training is repeated with each seed. The seed changes the choice of patients, the first weights and the
    order of the images."""
    num_masks: Result[int | None] = None
    """Masks of the train split that generated images are made from; null: all of them."""
    images_per_mask: Result[int] = 1
    """Generated images of each mask."""
    num_images: Result[int | None] = None
    """Images of every training, with repetitions; null: segmenter.train.num_images."""
    split: Result[Literal["val", "test"] | None] = None
    """The split whose real slices are the test; null: the split of the evaluated samples' masks. Where it is val, no
    training uses it to choose weights, and the last weights are tested."""

    def problems(self) -> list[Problem]:
        """What is out of range."""
        problems = []

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                problems.append(Problem("config", f"downstream.{name}", str(getattr(self, name)), remedy))

        fractions = self.real_fractions
        check("real_fractions", bool(fractions) and all(0 < f <= 1 for f in fractions), "give shares above 0, up to 1")
        check("real_fractions", len({share_name(f) for f in fractions}) == len(fractions), "give each once")
        check("seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "give one or more, each once")
        check("seeds", all(seed >= 0 for seed in self.seeds), "give whole numbers of at least 0")
        for name in ("num_masks", "images_per_mask", "num_images"):
            value = getattr(self, name)
            check(name, value is None or value >= 1, "give at least 1")
        return problems


def share_name(fraction: float) -> str:
    """A share of the patients, for names: 0.25 is `25`."""
    return f"{100 * fraction:g}"
