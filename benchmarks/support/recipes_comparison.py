"""One data set's comparison: its runs, their measurements, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.recipes_measure import METRICS, Scored
from support.recipes_runs import (
    A_THIRD,
    AVERAGE,
    NEVER,
    ONLINE,
    OURS,
    SAMPLED_OTHERWISE,
    Recipe,
    Run,
    Scale,
    paper,
)
from support.recipes_speeds import speeds
from support.recipes_targets import check_targets, choose, over_seeds

# The paper's candidates are compared on it.
_SEARCH_SPLIT = "val"

Work = dict[Run, list[Scored]]


class Comparison:
    """One data set's runs and their measurements."""

    def __init__(self, data: Path, scale: Scale, seeds: int, ablation_seeds: int, ablations: Sequence[Recipe]) -> None:
        self.data, self.scale, self.seeds = data, scale, range(seeds)
        self.ablation_seeds, self.ablations = range(ablation_seeds), ablations

    @property
    def split(self) -> str:
        """The split whose masks are sampled: test, if its masks are published."""
        from data_shards.store.shards import ShardSet

        if not (self.data / "shards" / "index.json").is_file():
            return "test"
        return "test" if len(ShardSet.open([str(self.data / "shards")]).select(split="test")) else "val"

    def first_round(self) -> Work:
        """The paper's candidates, ours, and its ablations."""
        work: Work = {}
        for lr in self.scale.paper_lrs:
            run = self._run(paper(lr), 0)
            work[run] = [self._final(run, w, "paper", _SEARCH_SPLIT) for w in (AVERAGE, ONLINE)]
        for seed in self.seeds:
            work[self._run(OURS, seed)] = self.curve(OURS, seed)
        for recipe, seeds in ((A_THIRD, self.seeds), *((ablation, self.ablation_seeds) for ablation in self.ablations)):
            for seed in seeds:
                work[self._run(recipe, seed)] = [self._final(self._run(recipe, seed))]
        for seed in self.ablation_seeds:
            work[self._run(OURS, seed)] += self.sampled_otherwise(seed)
        return work

    def second_round(self) -> Work:
        """The paper at its best, with every seed. Until it is known, any candidate takes its place."""
        best = self.best_paper() or (self.scale.paper_lrs[-1], ONLINE)
        return {self._run(paper(best[0]), seed): self.paper_curve(best, seed) for seed in self.seeds}

    def search(self) -> dict[tuple[float, str], dict[str, Any]]:
        """The measurements of the paper's candidates, by learning rate and weights."""
        found = {}
        for lr in self.scale.paper_lrs:
            for weights in (AVERAGE, ONLINE):
                scored = self._final(self._run(paper(lr), 0), weights, "paper", _SEARCH_SPLIT)
                if scored.is_done:
                    found[lr, weights] = scored.result()
        return found

    def best_paper(self) -> tuple[float, str] | None:
        """Learning rate and weights; None while candidates are missing."""
        search = self.search()
        if len(search) < 2 * len(self.scale.paper_lrs):
            return None
        best: tuple[float, str] = choose({k: {m: r[m]["value"] for m in METRICS} for k, r in search.items()})
        return best

    def curve(self, recipe: Recipe, seed: int) -> list[Scored]:
        """Our recipe's points, or another's."""
        run = self._run(recipe, seed)
        return [Scored(run, n, recipe.weights, recipe.sampler, self.split) for n in run.points(self.scale)]

    def paper_curve(self, best: tuple[float, str], seed: int) -> list[Scored]:
        """The paper's at its best."""
        return self.curve(replace(paper(best[0]), weights=best[1]), seed)

    def sampled_otherwise(self, seed: int) -> list[Scored]:
        """Our weights, sampled in other ways."""
        run = self._run(OURS, seed)
        return [self._final(run, weights, sampler) for _, _, weights, sampler in SAMPLED_OTHERWISE]

    def _run(self, recipe: Recipe, seed: int) -> Run:
        return Run(self.data, recipe, seed)

    def _final(self, run: Run, weights: str = "", sampler: str = "", split: str = "") -> Scored:
        recipe = run.recipe
        weights, sampler, split = weights or recipe.weights, sampler or recipe.sampler, split or self.split
        return Scored(run, run.num_images(self.scale), weights, sampler, split)

    def speeds(self, deadline: float = NEVER) -> dict[str, float] | None:
        """Images a second of `paper` and `ours`; None if time ran out."""
        best = self.best_paper()
        assert best is not None
        return speeds(self.data, {"paper": paper(best[0]), "ours": OURS}, self.scale, deadline)

    def result(self, rates: dict[str, float]) -> dict[str, Any]:
        """This data set's part of the JSON file, when all is done; `rates`: of speeds()."""
        best = self.best_paper()
        assert best is not None
        curves = {
            "paper": [self.paper_curve(best, seed) for seed in self.seeds],
            "ours": [self.curve(OURS, seed) for seed in self.seeds],
            "a_third": [self.curve(A_THIRD, seed) for seed in self.seeds],
        }
        values = {name: [_values(curve) for curve in several] for name, several in curves.items()}
        seconds = {
            name: [[scored.images / rates["paper" if name == "paper" else "ours"] for scored in c] for c in several]
            for name, several in curves.items()
        }
        weights = "averaged" if best[1] == AVERAGE else "online"
        labels = {"paper": f"the paper's, lr {best[0]:g}, {weights} weights", "ours": "ours", "a_third": A_THIRD.about}
        finals = [{metric: curve[metric][-1] for metric in METRICS} for curve in values["a_third"]]
        any_final = curves["ours"][0][-1].result()
        return {
            "split": self.split,
            **{name: any_final[name] for name in ("num_masks", "num_patients", "real_dice", "real_distance")},
            "search": [{"lr": lr, "weights": w, **found} for (lr, w), found in self.search().items()],
            "best_paper": {"lr": best[0], "weights": best[1]},
            "images_per_s": rates,
            "curves": {
                name: {
                    "label": labels[name],
                    "images": [scored.images for scored in curves[name][0]],
                    "seconds": [over_seeds(at) for at in zip(*seconds[name], strict=True)],
                    **{m: [over_seeds(v) for v in zip(*(c[m] for c in values[name]), strict=True)] for m in METRICS},
                }
                for name in curves
            },
            "finals_over_patients": {name: curves[name][0][-1].result() for name in ("paper", "ours")},
            "targets": check_targets(
                self.scale.points, values["ours"], values["paper"], seconds["ours"], seconds["paper"], finals
            ),
            "ablations": self._ablations(),
        }

    def rounds(self) -> tuple[Work, Work]:
        """All work, in order."""
        return self.first_round(), self.second_round()

    def _ablations(self) -> list[dict[str, Any]]:
        """A row each, ours first."""
        scored: dict[tuple[str, str], list[Scored]] = {}
        for seed in self.ablation_seeds:
            for recipe in (OURS, *self.ablations):
                scored.setdefault((recipe.name, recipe.about), []).append(self._final(self._run(recipe, seed)))
            for (name, about, _, _), one in zip(SAMPLED_OTHERWISE, self.sampled_otherwise(seed), strict=True):
                scored.setdefault((name, about), []).append(one)
        return [
            {"name": name, "about": about}
            | {m: over_seeds([one.result()[m]["value"] for one in finals]) for m in METRICS}
            for (name, about), finals in scored.items()
        ]

    def gallery(self) -> list[tuple[str, Any]]:
        """Columns: mask, real slice, and both recipes' images along their training."""
        best = self.best_paper()
        assert best is not None
        paper_curve, our_curve = self.paper_curve(best, 0), self.curve(OURS, 0)
        shown = paper_curve[0].images_NHW()
        columns = [("mask", shown["mask"]), ("real", shown["real"])]
        for name, curve in (("paper", paper_curve), ("ours", our_curve)):
            columns += [(f"{name} {scored.images:,}", scored.images_NHW()["generated"]) for scored in curve]
        return columns


def _values(curve: list[Scored]) -> dict[str, list[float]]:
    return {metric: [scored.result()[metric]["value"] for scored in curve] for metric in METRICS}
