"""The tables of a run's report, as values: the page, CSV, LaTeX and PDF show the same ones. Headline first.

Each title and caption says by itself what the table holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_shards.labels import shown_name
from segdiff_dist.evaluation.measure.segmenter_check import rests_on_segmenter, weakness
from segdiff_dist.evaluation.measure.summary_text import FEW, top_metrics
from segdiff_dist.evaluation.metrics.air import AIR_METRICS
from segdiff_dist.evaluation.metrics.columns import GREY_METRICS, HU_METRICS
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.organ_texture import ORGAN_TEXTURE_METRICS
from segdiff_dist.evaluation.report.entry_text import DASH, format_entry, format_interval, groups_of

_FALSE_ORGANS = "false_positive_rate_mask_gen"
_INTERVALS = "95 % bootstrap intervals over patients are below the values, where there are at least two patients."


@dataclass(frozen=True)
class Cell:
    """A value of summary.json with its metric, or a count. `grey`: why it says little, empty if it may be read."""

    metric: str = ""
    entry: dict[str, Any] | None = None
    text: str = ""
    grey: str = ""
    best: bool = False

    @property
    def digits(self) -> int:
        """After the point."""
        return DEFINITIONS[self.metric].digits

    @property
    def value(self) -> str:
        """The count, or the value with a mark where it means nothing; a dash if there is none."""
        return self.text or (format_entry(self.entry, self.digits) if self.metric else "")

    def interval(self, between: str = " to ") -> str:
        """Its 95 % interval, or nothing."""
        return format_interval(self.entry, self.digits, between) if self.metric else ""


@dataclass(frozen=True)
class Row:
    """A row: its label, the name of the metric or organ that it shows, and a cell a column."""

    label: str
    name: str
    cells: tuple[Cell, ...]
    better: str = ""

    @property
    def has_intervals(self) -> bool:
        """Whether any of its values has one."""
        return any(cell.interval() for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """`name`: of its files. `first`: the header above the labels. `group`: what all of it is of, for example CT.
    `marks`: what a marked cell is, a class of the page's style."""

    name: str
    title: str
    caption: str
    first: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    group: str = ""
    marks: str = "best"

    @property
    def notes(self) -> list[str]:
        """Why rows are grey, one sentence for each."""
        return list(dict.fromkeys(f"{row.label}: {c.grey}" for row in self.rows for c in row.cells if c.grey))


def run_tables(summary: dict[str, Any]) -> list[Table]:
    """All tables that the run has numbers for."""
    found = [headline(summary), further_results(summary), air_table(summary)]
    for modality, organs in summary["by_modality_organ"].items():
        found += [make(modality, organs) for make in (dice_table, outline_table, texture_table, intensity_table)]
    return [table for table in [*found, across_table(summary)] if table.rows]


def headline(summary: dict[str, Any]) -> Table:
    """The first numbers to look at."""
    groups = groups_of(summary["metrics"], summary["by_modality"])
    caption = (
        f"Generated against real images: {summary['num_samples']} images of {summary['num_patients']} patients. Dice "
        "counts false organs and compares the mask with the segmenter's labels on the generated image (whether it "
        "follows its mask), and on the real image (the best that the segmenter can do). Sharpness is 1 where the "
        "images have the power of the real ones at every wavelength. The Fréchet distance, and precision (fidelity) "
        "and recall "
        "(variety), are of the features of the networks they are named after; distances have no interval. " + _INTERVALS
    )
    names = [name for name in headline_metrics(groups) if any(name in entries for entries in groups.values())]
    if any(of[name].get("too_few") for name in names for of in groups.values() if name in of):
        caption += f" {FEW}: a distance of fewer images than twice its features, which is mostly bias."
    return Table("headline", "Headline", caption, "Metric", *_by_group(groups, names))


def further_results(summary: dict[str, Any]) -> Table:
    """All other metrics of the headline images."""
    groups = groups_of(summary["metrics"], summary["by_modality"])
    first = headline_metrics(groups)
    names = [n for n in DEFINITIONS if n not in first and any(n in entries for entries in groups.values())]
    caption = (
        "Further metrics of generated against real images; samples without a real counterpart count only where no "
        "sample has one. Metrics of a pair of label maps name both: the mask, and the segmenter's labels on the real "
        "(pred. real) or on the generated image (pred. gen.). Distances have no interval. "
        f"{_INTERVALS}"
    )
    return Table("results", "Further results", caption, "Metric", *_by_group(groups, names))


def headline_metrics(groups: dict[str, dict[str, Any]]) -> list[str]:
    """Dice with false organs, sharpness, distances, precision and recall: the metrics that come first."""
    top = top_metrics(groups.values())
    distances = [name for name in DEFINITIONS if name == "fid" or name.endswith("_frechet")]
    at = top.index("segmenter_frechet") if "segmenter_frechet" in top else len(top)
    return list(dict.fromkeys([*top[:at], *distances, *top[at:]]))


def _by_group(groups: dict[str, dict[str, Any]], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """Columns and rows: a metric a row, a group a column, then how many images there are and how many are left out."""
    rows = []
    for name in names:
        entries = [of.get(name) for of in groups.values()]
        counted = max((entry for entry in entries if entry), key=lambda entry: int(entry.get("n", 0)))
        counts = (Cell(text=str(counted.get("n", DASH))), Cell(text=str(counted.get("num_left_out", DASH))))
        cells = (*(Cell(name, entry) for entry in entries), *counts)
        rows.append(Row(DEFINITIONS[name].label, name, cells, DEFINITIONS[name].better))
    return (*groups, "Images", "Left out"), tuple(rows)


_DICE = {
    "Dice, real": "dice_mask_real",
    "Dice, gen.": "dice_mask_gen",
    "Sens., real": "sensitivity_mask_real",
    "Sens., gen.": "sensitivity_mask_gen",
    "Prec., real": "precision_mask_real",
    "Prec., gen.": "precision_mask_gen",
}


def dice_table(modality: str, organs: dict[str, Any]) -> Table:
    """How well the labels on real and on generated images follow the mask, by organ."""
    caption = (
        f"Organs on {modality} images: Dice, sensitivity (share of the mask's pixels that are labelled) and precision "
        "(share of the labelled pixels that are in the mask, 0 where the mask does not hold the organ) of the "
        "segmenter's labels on the real and on the generated images, against the mask. Images: those whose mask holds "
        f"the organ. {_INTERVALS}"
    )
    return _organ_table(f"organs_{modality.lower()}", f"{modality}: organs", caption, (modality, organs), _DICE)


_OUTLINE = {
    "Surface Dice": "surface_dice_mask_gen",
    "Area error": "area_error_mask_gen",
    "Volume error": "volume_error_mask_gen",
    "False organ": _FALSE_ORGANS,
    "False, mm²": "false_positive_area_mm2_mask_gen",
}


def outline_table(modality: str, organs: dict[str, Any]) -> Table:
    """Outlines, sizes and false organs on the generated images, by organ."""
    caption = (
        f"Organs on generated {modality} images, the segmenter's labels against the mask: surface Dice (share of both "
        "outlines that is near the other); area and volume error (difference of the sizes divided by the mask's, on "
        "a slice, and over a patient's slices along an axis); of the images whose mask does not hold the organ, the "
        "share where it appears, and its mean area over these images. Images: those whose mask holds the organ. "
        f"{_INTERVALS}"
    )
    name = f"outlines_{modality.lower()}"
    return _organ_table(name, f"{modality}: outlines, sizes and false organs", caption, (modality, organs), _OUTLINE)


def texture_table(modality: str, organs: dict[str, Any]) -> Table:
    """Noise and autocorrelation inside organs, real and generated."""
    columns = {"Texture, gen. / real": "texture"}
    labels = {"noise_std": "Noise", "autocorrelation_1": "Corr. 1 px", "autocorrelation_2": "Corr. 2 px"}
    for name in ORGAN_TEXTURE_METRICS:
        kind, _, side = name.rpartition("_")
        columns[f"{labels[kind]}, {side}{'.' * (side == 'gen')}"] = name
    caption = (
        f"Texture inside organs of the mask on real and on generated {modality} images. Texture: standard deviation "
        "of fine detail (grey values less their 3x3 binomial mean), generated divided by real; below 1 organs are "
        "too smooth, above 1 too grainy. Noise: the standard deviation in grey values of the white noise that has "
        "this fine detail. Corr.: correlation of grey values 1 and 2 pixels apart, less the plane fitted to the "
        "organ; white noise has 0. Only pixels whose eight neighbours belong to the same organ count. Images: those "
        "with enough of them. " + _INTERVALS
    )
    name = f"texture_{modality.lower()}"
    return _organ_table(name, f"{modality}: texture inside organs", caption, (modality, organs), columns)


def air_table(summary: dict[str, Any]) -> Table:
    """Air around the patient, and the lattice of 2x2 pixels, real and generated: a row a group of images."""
    groups = groups_of(summary["metrics"], summary["by_modality"])
    labels = {"air_mean": "Air, mean", "air_std": "Air, spread", "air_lattice": "Air, lattice"}
    labels["patient_lattice"] = "Patient, lattice"
    columns = {}
    for name in AIR_METRICS:
        kind, _, side = name.rpartition("_")
        if any(name in entries for entries in groups.values()):
            columns[f"{labels[kind]}, {side}{'.' * (side == 'gen')}"] = name
    rows = []
    for group, entries in groups.items():
        counted = [entries[name].get("n", DASH) for name in columns.values() if name in entries]
        if counted:
            cells = [Cell(name, entries.get(name)) for name in columns.values()]
            rows.append(Row(group, group, (*cells, Cell(text=str(counted[0])))))
    caption = (
        "Air around the patient and the lattice of 2x2 pixels on real and on generated images, in grey values (0 to "
        "255), each of an image, averaged over images. Air: background at least 3 pixels from any label; mean and "
        "spread (standard deviation). Lattice: pixels are divided by their place in a square of 2x2; the largest less "
        "the smallest of the four means of fine detail (grey values less their 3x3 binomial mean), in air and inside "
        "the patient. A pattern that repeats every two pixels raises it above that of the real images. " + _INTERVALS
    )
    return Table("air", "Air and lattice", caption, "Images", (*columns, "Number"), tuple(rows))


def intensity_table(modality: str, organs: dict[str, Any]) -> Table:
    """Mean and spread of HU by organ, or of grey values."""
    in_hu = any(name in entries for entries in organs.values() for name in HU_METRICS)
    metrics = HU_METRICS if in_hu else GREY_METRICS
    unit = "HU" if in_hu else "grey values (0 to 255)"
    labels = {"mean_real": "Mean, real", "mean_gen": "Mean, gen.", "mean_error": "Error of the mean"}
    labels |= {"std_real": "Spread, real", "std_gen": "Spread, gen."}
    columns = {labels[name.split("_", 1)[1]]: name for name in metrics}
    caption = (
        f"{unit[0].upper()}{unit[1:]} inside organs of the mask on real and on generated {modality} images: mean, and "
        "spread (standard deviation inside the organ), each of an image, averaged over the images whose mask holds the "
        "organ. "
    )
    if in_hu:
        caption += "Error: absolute difference of an image's two means. HU outside the window are clipped. "
    name, title = f"intensity_{modality.lower()}", f"{modality}: {unit} inside organs"
    return _organ_table(name, title, caption + _INTERVALS, (modality, organs), columns)


def _organ_table(
    name: str, title: str, caption: str, group: tuple[str, dict[str, Any]], columns: dict[str, str]
) -> Table:
    """A row an organ. Columns that no organ has are left out, and organs that have nothing."""
    modality, organs = group
    columns = {label: metric for label, metric in columns.items() if any(metric in e for e in organs.values())}
    rows = []
    for organ, entries in organs.items():
        measured = [entries[metric] for metric in columns.values() if metric in entries]
        # An organ that no mask holds is shown where it appears in generated images.
        is_shown = "dice_mask_gen" in entries or entries.get(_FALSE_ORGANS, {"value": 0})["value"] > 0
        if not measured or not is_shown:
            continue
        reason = weakness(entries)
        cells = [
            Cell(metric, entries.get(metric), grey=reason if rests_on_segmenter(metric) and metric in entries else "")
            for metric in columns.values()
        ]
        in_mask = [e for metric, e in entries.items() if metric in columns.values() and _is_of_masks(metric)]
        count = Cell(text=str(in_mask[0].get("n", DASH)) if in_mask else DASH)
        rows.append(Row(shown_name(organ), organ, (*cells, count)))
    return Table(name, title, caption, "Organ", (*columns, "Images"), tuple(rows), modality)


def _is_of_masks(metric: str) -> bool:
    """Whether its n counts the images whose mask holds the organ."""
    return not metric.startswith(("false_", "precision_", "volume_"))


_ACROSS = ("dice_either_mask_gen", "dice_mask_gen", "sharpness", "segmenter_frechet", "segmenter_precision")


def across_table(summary: dict[str, Any]) -> Table:
    """Images of the other modality."""
    directions = summary["cross_modality"]
    names = [name for name in _ACROSS if any(name in entries for entries in directions.values())]
    rows = []
    for direction, entries in directions.items():
        count = Cell(text=str(entries["dice_mask_gen"].get("n", DASH)) if "dice_mask_gen" in entries else DASH)
        cells = (*(Cell(name, entries.get(name)) for name in names), count)
        rows.append(Row(f"{direction.replace('_to_', ' masks to ')} images", direction, cells))
    caption = (
        "Images of one modality generated from masks of the other. They are in no other table. They have no real "
        "counterpart, so they are compared with their mask and with real images of other patients. " + _INTERVALS
    )
    columns = (*(DEFINITIONS[name].label for name in names), "Images")
    return Table("cross_modality", "Images of the other modality", caption, "Samples", columns, tuple(rows))
