"""The arguments of `segdiff reproduce table1`, and their experiments: one shard set, one segmenter, a model a column.
Each column is a shipped recipe, and the chosen scale and the user's file override its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_shards.ingest import archive
from data_shards.ingest.cases import Case, nifti_files
from data_shards.problems import Problem, refuse
from data_shards.records import AXES, MODALITIES, SPLITS
from segdiff_dist.config import as_dict, merge, read_yaml, validate
from segdiff_dist.experiment import Experiment, collect
from segdiff_dist.shipped import find_config, shipped_config
from segdiff_dist.training.config import TrainConfig

Split = Literal["train", "val", "test"]
ColumnName = Literal["ct_axial", "ct_all", "mri_axial", "mri_all"]
COLUMN_NAMES: tuple[ColumnName, ...] = ("ct_axial", "ct_all", "mri_axial", "mri_all")
# The sections that a --config file may change. Each column keeps its own paths and slices.
_SECTIONS = (
    *("prepare", "loader", "denoiser", "diffusion", "train", "segmenter"),
    *("sample", "evaluate", "validation", "tracking"),
)
_OF_THE_COLUMN = (("prepare", "modalities"), ("prepare", "axes"), ("loader", "modalities"), ("loader", "axes"))


@dataclass(frozen=True)
class Table1Settings:
    """Table 1 of Hunecke and Chen: four models, their samples and metrics. The same command again goes on."""

    table: Annotated[Literal["table1"], tyro.conf.Positional]
    """Which table."""
    amos: Path
    """The archive: dataset.json, imagesTr, labelsTr, ..."""
    out: Path = Path("runs/table1")
    """shards/, segmenter/, a run folder a column, and table1.md, .json and .html."""
    wholebody: Path | None = None
    """Whole-body masks, as `segdiff annotate` makes them: the paper's. Without them the archive's organs are used."""
    scale: Literal["paper", "small"] = "paper"
    """small: 64 x 64, a small net and few images, for a machine without a GPU (launch/configs/table1_small.yaml)."""
    config: str | None = None
    """A YAML file, or the name of a shipped one, which overrides every column's recipe and --scale."""
    columns: tuple[ColumnName, ...] = field(default=COLUMN_NAMES)
    """Which of the table's columns."""
    fid_weights: Literal["download"] | Path | None = None
    """As evaluate.fid_weights: without them the FID row stays empty."""
    gpus: int = 1
    """GPUs (ranks) of this machine that train; --dry-run assumes the same number."""


@dataclass(frozen=True)
class Experiments:
    """Resolved settings: `prepare` makes the shard set, `segmenter` trains the segmenter; `recipes` are the unscaled
    columns."""

    prepare: Experiment
    segmenter: Experiment
    columns: dict[ColumnName, Experiment]
    recipes: dict[ColumnName, Experiment]

    def sampled_from(self, splits: Mapping[ColumnName, Split]) -> Experiments:
        """The same, with each column's masks drawn from the split named."""
        chosen = {
            name: replace(column, sample=replace(column.sample, split=splits[name]))
            for name, column in self.columns.items()
        }
        return replace(self, columns=chosen)


def resolve(settings: Table1Settings) -> Experiments:
    """The experiments; raises InputProblems, all at once, for settings that cannot be used. Reads no archive."""
    wanted = [name for name in COLUMN_NAMES if name in settings.columns]
    refuse(_problems(settings))
    over = _overlay(settings)
    recipes = {name: _recipe(name, {}) for name in wanted}
    columns = dict(zip(wanted, collect(*(lambda n=name: _column(n, over, settings) for name in wanted)), strict=True))
    modalities = tuple(m for m in MODALITIES if any(m in (c.loader.modalities or MODALITIES) for c in columns.values()))
    axes = tuple(a for a in AXES if any(a in c.loader.axes for c in columns.values()))
    first = columns[wanted[0]]
    prepared = replace(first.prepare, modalities=modalities, axes=axes)
    columns = {name: replace(column, prepare=prepared) for name, column in columns.items()}
    # As the authors' segmenter, it is trained on CT and MR together.
    segmenter_run = replace(
        columns[wanted[0]],
        run=settings.out / "segmenter",
        loader=replace(first.loader, modalities=modalities, axes=axes),
        segmenter=replace(first.segmenter, train=_shared_out(first.segmenter.train, settings.gpus)),
    )
    return Experiments(replace(segmenter_run, run=None), segmenter_run, columns, recipes)


def sampled_splits(settings: Table1Settings, experiments: Experiments) -> dict[ColumnName, Split]:
    """The split of each column's masks: the recipe's, or `val` where none of its patients there has a mask. AMOS
    publishes no labels of its test cases. Raises InputProblems if neither split has one."""
    cases = archive.read_archive(settings.amos)
    found: dict[ColumnName, Split] = {}
    missing = []
    for name, column in experiments.columns.items():
        candidates: tuple[Split, ...] = (column.sample.split, "val")
        masked = {
            case.split
            for case in cases
            if case.modality in (column.loader.modalities or MODALITIES) and _has_mask(case, column)
        }
        chosen = next((split for split in candidates if split in masked), None)
        if chosen is None or "train" not in masked:
            needed = "train" if chosen is not None else " or ".join(dict.fromkeys(candidates))
            value = f"no {(column.loader.modalities or MODALITIES)[0]} case of split {needed} has a mask"
            missing.append(
                Problem(str(settings.amos), name, value, "leave the column out with --columns, or add masks")
            )
        else:
            found[name] = chosen
    refuse(missing)
    return found


def patients(amos: Path) -> dict[str, int]:
    """Cases of each split in the archive, CT and MR together."""
    cases = archive.read_archive(amos)
    return {split: sum(case.split == split for case in cases) for split in SPLITS}


def _has_mask(case: Case, column: Experiment) -> bool:
    whole = column.wholebody is not None and bool(nifti_files(column.wholebody, case.case_id))
    return whole or (case.label is not None and column.prepare.label_set != "wholebody")


def _problems(settings: Table1Settings) -> list[Problem]:
    problems = []
    if not settings.columns:
        problems.append(Problem("command line", "columns", "none", f"choose from {', '.join(COLUMN_NAMES)}"))
    if settings.gpus < 1:
        problems.append(Problem("command line", "gpus", str(settings.gpus), "give at least 1"))
    if settings.out.exists() and not settings.out.is_dir():
        problems.append(Problem(str(settings.out), "out", "not a folder", "give another path"))
    return problems


def _overlay(settings: Table1Settings) -> dict[str, Any]:
    """--scale, then --config, which may set values that all columns share."""
    over = read_yaml(shipped_config("table1_small")) if settings.scale == "small" else {}
    if settings.config is None:
        return over
    given = read_yaml(find_config(settings.config))
    remedy = f"give sections among {', '.join(_SECTIONS)}; paths are flags"
    found = [Problem(str(settings.config), key, "not of the columns", remedy) for key in given if key not in _SECTIONS]
    for section, key in _OF_THE_COLUMN:
        if isinstance(given.get(section), Mapping) and key in given[section]:
            value, remedy = str(given[section][key]), "a column says which slices it uses; choose columns by --columns"
            found.append(Problem(str(settings.config), f"{section}.{key}", value, remedy))
    refuse(found)
    return merge(over, given)


def _recipe(name: ColumnName, over: Mapping[str, Any]) -> Experiment:
    file = shipped_config(f"paper_{name}")
    return validate(Experiment, merge(merge(as_dict(Experiment()), read_yaml(file)), over), file)


def _column(name: ColumnName, over: Mapping[str, Any], settings: Table1Settings) -> Experiment:
    column = _recipe(name, over)
    if settings.wholebody is None and "label_set" not in over.get("prepare", {}):
        column = replace(column, prepare=replace(column.prepare, label_set="amos"))
    evaluate = replace(column.evaluate, segmenter=settings.out / "segmenter" / "segmenter" / "weights")
    if settings.fid_weights is not None:
        evaluate = replace(evaluate, fid_weights=settings.fid_weights)
    column = replace(
        column,
        amos_root=settings.amos,
        wholebody=settings.wholebody,
        data=str(settings.out / "shards"),
        run=settings.out / name,
        evaluate=evaluate,
        train=_shared_out(column.train, settings.gpus),
    )
    ranks = settings.gpus
    refuse(
        [
            *column.train.problems("train", ranks),
            *_shared_out(column.segmenter.train, ranks).problems("segmenter.train", ranks),
            *column.sample.problems(),
            *column.sample.seed_problems(),
        ]
    )
    return column


def _shared_out(train: TrainConfig, ranks: int) -> TrainConfig:
    """The same global batch on `ranks` ranks: a recipe for one rank has it in one micro-batch. The losses do not depend
    on the division into micro-batches."""
    if train.micro_batch_size == "auto":
        return train
    return replace(train, micro_batch_size=min(train.micro_batch_size, max(1, train.global_batch_size // ranks)))
