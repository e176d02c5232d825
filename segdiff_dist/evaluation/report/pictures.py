"""The samples that figures show, and their pixels. They are chosen by rule, never by eye: not only the best ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.documents import reading
from data_shards.field_source import is_address
from data_shards.labels import LabelTable
from data_shards.modalities import in_order
from data_shards.problems import Problem, problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.config import differences, next_command
from segdiff_dist.evaluation.measure.result_files import open_predictions, read_rows, read_summary, row_columns
from segdiff_dist.evaluation.measure.rows import PATIENT
from segdiff_dist.evaluation.measure.subject import is_paired, label_table_of, open_samples
from segdiff_dist.sampling.store import SampleStore, identity

# The places of a gallery in the order of Dice(mask, pred_gen).
GALLERY_QUANTILES = (0.25, 0.5, 0.75)
# The columns of samples.parquet that figures need; the file has some hundreds.
_COLUMNS = (
    *("row", "case_id", "source_modality", "target_modality", "axis", "slice_index", "seed_index"),
    *("headline", "dice_mask_gen", "dice_mask_real", "pixel_std"),
)


@dataclass
class Pictures:
    """Rows of samples.parquet with their pixels.

    `shards`: of the real images, if there are some; `is_paired`: the generated ones have counterparts in it.
    """

    rows: dict[str, np.ndarray]
    shards: ShardSet | None
    label_table: LabelTable
    is_paired: bool
    image: Any
    masks: Any
    predictions: Any

    @classmethod
    def open(cls, run: Path) -> Pictures:
        """Open the samples and the evaluation of `run`. InputProblems if the samples or their slices are not those
        that were measured: the pictures would not belong to the numbers."""
        store = open_samples(run / "samples")
        paired = is_paired(store)
        shards = ShardSet.open(store.job["shards"]) if paired else _named_in_summary(run)
        refuse(_changed_since(run, store, shards))
        named = [PATIENT] if PATIENT in row_columns(run) else []
        table = read_rows(run, [*_COLUMNS, *named], read_summary(run))
        if table.num_rows != len(store):
            value = f"{table.num_rows:,} rows, {len(store):,} samples"
            raise problem(run / "evaluation", "samples.parquet", value, f"run {next_command('evaluate', run=run)}")
        return cls(
            rows={name: np.array(values) for name, values in table.to_pydict().items()},
            shards=shards,
            label_table=label_table_of(store, shards),
            is_paired=paired,
            image=store.image,
            masks=store.mask,
            predictions=open_predictions(run, len(store)),
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the masks and of the images."""
        return in_order({*self.rows["source_modality"].tolist(), *self.rows["target_modality"].tolist()})

    def real(self, i: int) -> np.ndarray:
        """The real image of the item's slice, uint8 [H, W] like the generated one."""
        return self.slice_image(int(self.rows["row"][i]))

    def slice_image(self, row: int) -> np.ndarray:
        """A slice of the shard set, cropped like the generated images."""
        assert self.shards is not None, "no real images"
        return self.shards.read(row).cropped(self.image.shape[1]).image_uint8()

    def mask(self, i: int) -> np.ndarray:
        """The mask the item was made from."""
        return np.asarray(self.masks[int(i)])

    def generated(self, i: int) -> np.ndarray:
        """The generated image."""
        return np.asarray(self.image[int(i)])

    def predicted(self, i: int, side: str = "gen") -> np.ndarray:
        """Labels predicted on the generated image, or on the real one (of a headline item)."""
        return np.asarray(self.predictions[side][int(i)])

    def describe(self, i: int) -> str:
        """Case and slice on two lines."""
        return f"{self.rows['case_id'][i]}\n{self.rows['axis'][i]} {self.rows['slice_index'][i]}"

    def dice(self, i: int, side: str = "gen") -> str:
        """Dice(mask, pred_gen) or Dice(mask, pred_real) as text; a mask without organs has none."""
        dice = self.rows[f"dice_mask_{side}"][i]
        return f"Dice {dice:.2f}" if np.isfinite(dice) else "no organ in the mask"

    def gallery(self, modality: str) -> list[int]:
        """Headline items of a modality at the quartiles of Dice(mask, pred_gen), of different patients if possible."""
        return self.at_quartiles(self._by_dice(modality))

    def at_quartiles(self, items: np.ndarray) -> list[int]:
        """The items, which are in order, at or near GALLERY_QUANTILES, of different patients if possible."""
        chosen: list[int] = []
        for quantile in GALLERY_QUANTILES:
            at = quantile * (len(items) - 1)
            chosen += self._next(items[np.argsort(np.abs(np.arange(len(items)) - at), kind="stable")], chosen)
        return chosen

    def extremes(self, modality: str, each: int) -> tuple[list[int], list[int]]:
        """The headline items of a modality with the lowest and with the highest Dice(mask, pred_gen), worst first and
        best last; all of different patients if possible, and none twice."""
        items = self._by_dice(modality)
        each = min(each, len(items) // 2)
        worst: list[int] = []
        best: list[int] = []
        for _ in range(each):
            worst += self._next(items, worst + best)
            best += self._next(items[::-1], worst + best)
        return worst, best[::-1]

    def _by_dice(self, modality: str) -> np.ndarray:
        """Headline items of a modality from the lowest Dice(mask, pred_gen) to the highest."""
        dice = self.rows["dice_mask_gen"]
        items = np.flatnonzero(self.rows["headline"] & (self.rows["source_modality"] == modality) & np.isfinite(dice))
        return np.asarray(items[np.argsort(dice[items], kind="stable")])

    def _next(self, items: np.ndarray, chosen: list[int]) -> list[int]:
        """The first of `items` of a patient that is not among the chosen; without one, the first item not chosen."""
        seen = {self.rows["case_id"][i] for i in chosen}
        fresh = [i for i in items if self.rows["case_id"][i] not in seen] or [i for i in items if i not in chosen]
        return [int(i) for i in fresh[:1]]

    def headline(self, modality: str) -> dict[int, int]:
        """Headline items of a modality by the row of their slice in the shard set; none where they have no slice."""
        if not self.is_paired:
            return {}
        items = np.flatnonzero(self.rows["headline"] & (self.rows["source_modality"] == modality))
        return {int(self.rows["row"][i]): int(i) for i in items}

    def several_of_a_mask(self, most: int) -> list[list[int]]:
        """For each modality the mask whose images differ by the median amount: its items in order of seed_index."""
        spread = self.rows["pixel_std"]
        chosen = []
        for modality in self.modalities:
            firsts = np.flatnonzero(np.isfinite(spread) & (self.rows["source_modality"] == modality))
            if len(firsts):
                first = firsts[np.argsort(spread[firsts], kind="stable")[(len(firsts) - 1) // 2]]
                chosen.append(self._of_row(int(self.rows["row"][first]), modality)[:most])
        return chosen

    def across(self, source: str, target: str, most: int) -> list[int]:
        """First cross-modality items from `source` to `target` spread over the ranks of Dice(mask, pred_gen)."""
        rows = self.rows
        items = np.flatnonzero(
            (rows["source_modality"] == source) & (rows["target_modality"] == target) & (rows["seed_index"] == 0)
        )
        items = items[np.argsort(np.nan_to_num(rows["dice_mask_gen"][items], nan=-1.0), kind="stable")]
        at = np.linspace(0, len(items) - 1, most + 2)[1:-1].round().astype(int)
        return [int(items[j]) for j in dict.fromkeys(at)] if len(items) else []

    def both_modalities(self, i: int, each: int) -> tuple[list[int], list[int]]:
        """Items of the same mask as cross-modality item `i`: in its own modality, and in the other."""
        row = int(self.rows["row"][i])
        source, target = str(self.rows["source_modality"][i]), str(self.rows["target_modality"][i])
        return self._of_row(row, source)[:each], self._of_row(row, target)[:each]

    def _of_row(self, row: int, target: str) -> list[int]:
        items = np.flatnonzero((self.rows["row"] == row) & (self.rows["target_modality"] == target))
        return [int(i) for i in items[np.argsort(self.rows["seed_index"][items], kind="stable")]]


def _named_in_summary(run: Path) -> ShardSet | None:
    """The set that unpaired images were compared with. An address is not taken from a run folder: None."""
    named = read_summary(run)["provenance"].get("shards")
    return ShardSet.open(named) if isinstance(named, str) and not is_address(named) else None


def _changed_since(run: Path, store: SampleStore, shards: ShardSet | None) -> Iterator[Problem]:
    """Changes of samples and slices since RUN/evaluation/summary.json was written."""
    made_from = read_summary(run)["provenance"]
    remedy = f"measure them: {next_command('evaluate', run=run)}"
    with reading(run / "evaluation" / "summary.json", "the summary of an evaluation", remedy):
        measured_job, measured_digest = identity(made_from["sample_job"]), made_from.get("shards_digest")
    if differing := differences(measured_job, identity(store.job)):
        key, measured, now = differing[0]
        value = f"not the samples that were measured: {key} was {measured!r}, is {now!r}"
        yield Problem(str(store.path), "samples", value, remedy)
    elif missing := len(store.missing()):
        value = f"{missing:,} of {len(store):,} are missing"
        yield Problem(str(store.path), "samples", value, "run the same `segdiff sample` again")
    if shards is not None and shards.digest != measured_digest:
        yield Problem(shards.root, "digest", "not the shard set that was measured on", f"restore it, or {remedy}")
