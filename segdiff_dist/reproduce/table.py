"""Table 1 from the measurements: beside the published values, with all differences. Text, JSON and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.files import write_atomic
from segdiff_dist.config import as_dict, differences
from segdiff_dist.evaluation.measure.segmenter_check import MARK, segmenter_messages
from segdiff_dist.evaluation.measure.summary_text import TOP_METRICS
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.entry_text import format_entry, format_interval
from segdiff_dist.evaluation.report.page import PUBLISHED, PUBLISHED_COLUMNS, template_environment
from segdiff_dist.experiment import Experiment
from segdiff_dist.reproduce.settings import COLUMN_NAMES, ColumnName

TITLES: dict[ColumnName, str] = {
    "ct_axial": "CT axial",
    "ct_all": "CT all axes",
    "mri_axial": "MRI axial",
    "mri_all": "MRI all axes",
}
# The place of each column in PUBLISHED, and the later row of the authors' result file.
_PUBLISHED_AS = {name: title.replace("MRI", "MR") for name, title in TITLES.items()}
# The paper's rows in its order and words.
PAPER_ROWS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "fid": "FID",
    "legacy_dice_mask_real": "Dice(m, m_real_pred)",
    "legacy_dice_mask_gen": "Dice(m_real_pred, m_gen_pred)",
}
# Rows with more information than the paper's.
_FURTHER_ROWS = (
    *("dice_either_mask_gen", "dice_either_mask_real", "segmenter_precision", "segmenter_recall", "sharpness"),
    *("dice_mask_real", "dice_real_gen", "dice_mask_gen", "legacy_dice_real_gen", "false_positive_rate_mask_gen"),
    *("surface_dice_mask_gen", "sharpness_75_100", "texture", "kid", "segmenter_frechet"),
)
# Least number of triples a column: Hunecke and Chen, section 5.3.
FEWEST_TRIPLES = 1024
# Patients of AMOS 2022, CT and MR together, as the paper splits them (section 4.2).
_PATIENTS = {"train": 240, "val": 120, "test": 240}
# Sections of a recipe that decide the measured values; and keys in them that do not.
_COMPARED = ("prepare", "loader", "denoiser", "diffusion", "train", "segmenter", "sample")
_NOT_COMPARED = (
    *("prepare.axes", "prepare.modalities", "prepare.num_workers", "prepare.ray_address", "prepare.store"),
    *("prepare.codec", "prepare.samples_per_shard", "loader.num_threads", "loader.prefetch_batches"),
    *("loader.cache_dir", "loader.cache_gib", "loader.on_corrupt", "denoiser.attention", "denoiser.kernels"),
    *("sample.region_size", "sample.batch_size", "sample.num_workers", "sample.threads_per_worker"),
    *("sample.ray_address", "sample.device", "sample.out", "sample.split"),
)
_NOT_COMPARED_IN_TRAINING = (
    *("device", "micro_batch_size", "compile", "zero_stage", "offload", "activation_checkpointing"),
    *("keep_checkpoints", "keep_every_images", "checkpoint_every_images", "snapshot_every_images"),
    *("log_every_images", "validate_every_images", "hang_timeout_s"),
)

ALWAYS_DIFFERENT = (
    "PSNR and SSIM: both images in one window of grey values; the authors stretch the real one to its own range.",
    "FID: torch-fidelity's Inception weights; the authors use torchvision's ImageNet weights, so "
    "digits do not compare.",
    "The Dice rows are the published definition (all classes with background, a class absent from both counts 1), "
    "which flatters images that hold few organs. Dice on the organs present is below.",
    "The last row is named as in the paper's text, pred(real) against pred(generated). The authors' code compares the "
    "mask with pred(generated), and so does this row; the pair of the text is below as legacy Dice.",
    "The segmenter learns Dice and cross-entropy; the authors' learns Dice, 10 focal and 0.01 total variation.",
    "The paper does not say how long its models trained. The recipes take 3,200,000 images each.",
    "The authors' colour jitter is left out, as its strength is not known; masks here also say body where no other "
    "class is inside the patient.",
    "'Later' are rows of the authors' result file that the paper does not have; the script beside the all-axes row "
    "makes 256 samples.",
)


@dataclass(frozen=True)
class Measured:
    """A column: the shipped recipe, what was run, and its summary.json."""

    name: ColumnName
    recipe: Experiment
    used: Experiment
    summary: dict[str, Any]


def build(columns: Sequence[Measured], patients: dict[str, int]) -> dict[str, Any]:
    """What table1.json holds. `patients`: of the archive, by split. Pure: reads nothing."""
    written = [_column(column) for column in columns]
    changed = list(dict.fromkeys(d for column in columns for d in _changed(column)))
    reasons = _reasons(columns, {key for key, _, _ in changed}, patients)
    shown = [n for n in _FURTHER_ROWS if any(n in column.summary["metrics"] for column in columns)]
    return {
        "source": "Hunecke and Chen, Medical Image Generation Using Segmentation-Guided Diffusion, Table 1",
        "rows": PAPER_ROWS,
        "segmenter_messages": {column["title"]: column["segmenter_messages"] for column in written},
        "further_rows": {name: DEFINITIONS[name].label for name in shown},
        "columns": written,
        "patients": patients,
        "not_a_reproduction": reasons,
        "differences": [[key, json.loads(old), json.loads(new)] for key, old, new in changed],
        "always_different": list(ALWAYS_DIFFERENT),
    }


def write(out: Path, table: dict[str, Any]) -> Path:
    """OUT/table1.json, table1.md and table1.html; returns the last."""
    write_atomic(out / "table1.json", json.dumps(table, indent=2) + "\n")
    write_atomic(out / "table1.md", markdown(table))
    write_atomic(out / "table1.html", page(table))
    return out / "table1.html"


def comparability(table: dict[str, Any]) -> str:
    """One sentence that says whether the figures can be compared with the paper's."""
    if table["not_a_reproduction"]:
        return "Not a reproduction of the paper's figures: " + "; ".join(table["not_a_reproduction"]) + "."
    return "Run with the shipped recipes of the paper, unchanged; what differs from the paper is said below."


def headline(table: dict[str, Any]) -> str:
    """One sentence with the figure that a false organ lowers, of every column that has it; else nothing."""
    metric, columns = TOP_METRICS[0], [c for c in table["columns"] if TOP_METRICS[0] in c["measured"]]
    parts = ", ".join(f"{c['title']} {_with_interval(c, metric)}" for c in columns)
    return f"{DEFINITIONS[metric].label}: {parts}." if parts else ""


def marked(table: dict[str, Any]) -> list[str]:
    """A sentence for each column whose segmenter fails on real images, so that its figures carry MARK."""
    return [
        f"{MARK} {title}: {message}" for title, messages in table["segmenter_messages"].items() for message in messages
    ]


def cell(column: dict[str, Any], metric: str) -> str:
    """A measured value, with MARK if it means nothing; a dash if there is none."""
    return format_entry(column["measured"].get(metric), DEFINITIONS[metric].digits)


def interval(column: dict[str, Any], metric: str) -> str:
    """Its 95 % interval over patients, or nothing."""
    return format_interval(column["measured"].get(metric), DEFINITIONS[metric].digits)


def facts(table: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of (name, a value a column): the facts about the figures."""
    names = {
        "size": "Pixels a side",
        "label_set": "Masks",
        "train_images": "Images trained on",
        "num_samples": "Triples measured",
        "num_patients": "Patients measured",
        "split": "Split of their masks",
        "sampling_steps": "Sampling steps",
    }
    return [(label, [_plainly(column[key]) for column in table["columns"]]) for key, label in names.items()]


def missing(table: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the paper that a column could not fill, each with why; said once where the reason is the same."""
    found = {
        (PAPER_ROWS[name], reason): None
        for column in table["columns"]
        for name, reason in column["not_available"].items()
        if name in PAPER_ROWS
    }
    return list(found)


def markdown(table: dict[str, Any]) -> str:
    """The page as Markdown."""
    columns = table["columns"]
    heads = [f"{c['title']}, {kind}" for c in columns for kind in _kinds(c)]
    lines = ["# Table 1", "", comparability(table), ""]
    lines += [line for text in (headline(table), *marked(table)) if text for line in (text, "")]
    lines += [_row(["", *heads]), _row(["---"] * (1 + len(heads)))]
    for metric, label in table["rows"].items():
        values = [v for c in columns for v in _values(c, metric)]
        lines.append(_row([label, *values]))
    lines += ["", "## Further", "", _row(["", *(c["title"] for c in columns)]), _row(["---"] * (1 + len(columns)))]
    lines += [
        _row([label, *(_with_interval(c, metric) for c in columns)]) for metric, label in table["further_rows"].items()
    ]
    lines += [_row([label, *values]) for label, values in facts(table)]
    lines += ["", "Intervals are 95 %, over patients. Not measured:", ""] if missing(table) else [""]
    lines += [f"- {label}: {reason}" for label, reason in missing(table)]
    lines += ["", "## What differs from the paper", ""]
    lines += [f"- {sentence}" for sentence in (*table["not_a_reproduction"], *table["always_different"])]
    if table["differences"]:
        lines += ["", "| setting | recipe | here |", "| --- | --- | --- |"]
        lines += [_row([f"`{key}`", _plainly(before), _plainly(after)]) for key, before, after in table["differences"]]
    return "\n".join(lines) + "\n"


def page(table: dict[str, Any]) -> str:
    """The page as HTML that needs no other file."""
    environment = template_environment("segdiff_dist.reproduce")
    environment.filters["plainly"] = _plainly
    return environment.get_template("table1.html.j2").render(
        table=table,
        comparability=comparability(table),
        headline=headline(table),
        marked=marked(table),
        facts=facts(table),
        missing=missing(table),
        cell=cell,
        interval=interval,
    )


def _column(column: Measured) -> dict[str, Any]:
    used, summary = column.used, column.summary
    shown = [name for name in (*PAPER_ROWS, *_FURTHER_ROWS) if name in summary["metrics"]]
    return {
        "name": column.name,
        "title": TITLES[column.name],
        "published": _published(_PUBLISHED_AS[column.name]),
        "later": _published(f"{_PUBLISHED_AS[column.name]}, later"),
        "measured": {name: summary["metrics"][name] for name in shown},
        "not_available": summary["not_available"],
        "segmenter_messages": segmenter_messages(summary),
        "size": used.loader.crop_size or used.prepare.size,
        "label_set": used.prepare.label_set,
        "train_images": used.train.num_images,
        "num_samples": summary["num_samples"],
        "num_patients": summary["num_patients"],
        "split": used.sample.split,
        "sampling_steps": used.sample.sampler.resolved(used.diffusion.objective).num_steps,
    }


def _published(name: str) -> dict[str, str] | None:
    if name not in PUBLISHED_COLUMNS:
        return None
    return {metric: values[PUBLISHED_COLUMNS.index(name)] for metric, values in PUBLISHED.items()}


def _changed(column: Measured) -> list[tuple[str, str, str]]:
    """(key, the recipe's value, the one used), as JSON, for every difference that changes the measured values."""
    before, after = (as_dict(e) for e in (column.recipe, column.used))
    return [
        (key, json.dumps(old), json.dumps(new))
        for section in _COMPARED
        for key, old, new in differences(before[section], after[section], f"{section}.")
        if key not in _NOT_COMPARED
        and not (".train." in f".{key}" and key.rsplit(".", 1)[-1] in _NOT_COMPARED_IN_TRAINING)
    ]


def _reasons(columns: Sequence[Measured], changed: set[str], patients: dict[str, int]) -> list[str]:
    """The reasons why the figures are not those of the paper's experiment; empty if nothing was scaled or replaced."""
    found = []
    if "prepare.size" in changed:
        found.append(f"slices of {columns[0].used.prepare.size} pixels, the paper's are of 256")
    if "prepare.label_set" in changed:
        found.append("masks are the archive's organs where the paper has 71 whole-body classes")
    others = changed - {"prepare.size", "prepare.label_set"}
    if others:
        found.append(f"{len(others)} other settings are not the recipe's, listed under what differs")
    splits = sorted({column.used.sample.split for column in columns if column.used.sample.split != "test"})
    if splits:
        names = " and ".join(splits)
        found.append(f"masks are those of split {names}, the paper's of test, for which AMOS publishes no labels")
    fewest = min(column.summary["num_samples"] for column in columns)
    if fewest < FEWEST_TRIPLES:
        found.append(f"as few as {fewest:,} triples a column, the paper has at least {FEWEST_TRIPLES:,}")
    if patients != _PATIENTS:
        here, there = ("/".join(str(of[split]) for split in _PATIENTS) for of in (patients, _PATIENTS))
        found.append(f"the archive has {here} patients for training, validation and test, the paper's {there}")
    absent = [TITLES[name] for name in COLUMN_NAMES if name not in {column.name for column in columns}]
    if absent:
        found.append(f"left out: {', '.join(absent)}")
    return found


def _kinds(column: dict[str, Any]) -> list[str]:
    return ["published", *(["later"] if column["later"] else []), "here"]


def _values(column: dict[str, Any], metric: str) -> list[str]:
    later = [column["later"][metric]] if column["later"] else []
    return [column["published"][metric], *later, _with_interval(column, metric)]


def _with_interval(column: dict[str, Any], metric: str) -> str:
    ends = interval(column, metric)
    return cell(column, metric) + (f" ({ends})" if ends else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plainly(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)
