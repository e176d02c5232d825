"""The report: one HTML file that contains everything it shows, made from summary.json and the figures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.documents import read_bytes
from data_shards.files import write_atomic
from data_shards.modalities import in_order
from segdiff_dist.config import next_command
from segdiff_dist.evaluation.measure.result_files import read_downstream, read_figures, read_summary
from segdiff_dist.evaluation.measure.segmenter_check import MARK, is_unreliable, segmenter_messages
from segdiff_dist.evaluation.measure.trust import warnings
from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.metrics.sharpness import sharpness_messages
from segdiff_dist.evaluation.report.entry_text import format_entry, format_interval, groups_of
from segdiff_dist.evaluation.report.shared_terms import shared_terms
from segdiff_dist.evaluation.report.tables import Table, headline_metrics, run_tables
from segdiff_dist.evaluation.report.tracked import TrackedRun, tracked_run

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
# At the top of the page, after the headline.
_FURTHER_CARDS = ("psnr_db", "ssim")

# Table 1 of Hunecke and Chen, "Medical Image Generation Using Segmentation-Guided Diffusion": AMOS 2022 at 256x256,
# and, for MR, the later rows of the authors' own result file, which are not in the paper.
PUBLISHED_COLUMNS = ("CT axial", "CT all axes", "MR axial", "MR all axes", "MR axial, later", "MR all axes, later")
# Text, so that every digit is the one published.
PUBLISHED = {
    "psnr_db": ("19.06", "20.26", "9.49", "9.80", "13.07", "12.44"),
    "ssim": ("0.637", "0.618", "0.062", "0.170", "0.210", "0.198"),
    "fid": ("47.66", "61.50", "200.31", "202.26", "75.3", "100.4"),
    "legacy_dice_mask_real": ("0.925", "0.927", "0.795", "0.843", "0.793", "0.848"),
    # The paper's text calls this row pred(real) against pred(generated), but its code compares with the mask.
    "legacy_dice_mask_gen": ("0.923", "0.927", "0.712", "0.766", "0.778", "0.807"),
}

# The tables of each section of the page, by the beginnings of their names.
_TABLES: dict[str, tuple[str, ...]] = {
    "results": ("headline", "results"),
    "organs": ("organs_", "outlines_"),
    "texture": ("air", "texture_"),
    "intensity": ("intensity_",),
    "modalities": ("cross_modality",),
}


def write_report(run: Path) -> Path:
    """Write RUN/evaluation/report.html from summary.json, figures/ and, if they are there, config.yaml, mlflow.json and
    downstream/summary.json of RUN."""
    folder = run / "evaluation"
    summary, figures = read_summary(run), read_figures(run)
    for figure in figures:
        figure["source"] = png_url((folder / "figures" / figure["file"]).read_bytes())
    config = run / "config.yaml"
    text = read_bytes(config, "remove it").decode(errors="replace") if config.is_file() else None
    page = render(run.resolve().name, summary, figures, text, tracked_run(run), read_downstream(run), run.resolve())
    return write_page(folder / REPORT, page)


def render(
    title: str,
    summary: dict[str, Any],
    figures: list[dict[str, str]],
    config: str | None,
    tracked: TrackedRun | None = None,
    downstream: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> str:
    """The page as text. `figures`: title, caption, section and source (a data URL) of each; `folder`: of the run, for
    the commands that the page names."""
    groups = groups_of(summary["metrics"], summary["by_modality"])
    shown = [name for name in DEFINITIONS if any(name in entries for entries in groups.values())]
    diversity = summary["diversity"]
    varied = groups_of(diversity.get("metrics", {}), diversity.get("by_modality", {}))
    tables = run_tables(summary)
    defined = {*shown, *PUBLISHED, *(name for entries in varied.values() for name in entries)}
    defined |= {cell.metric for table in tables for row in table.rows for cell in row.cells}
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            command=next_command("evaluate", run=folder or Path(title)).strip("`"),
            summary=summary,
            figures=[{"section": "images"} | figure for figure in figures],
            config=config,
            tracked=tracked,
            groups=groups,
            metrics={name: DEFINITIONS[name] for name in shown},
            definitions=DEFINITIONS,
            defined={name: definition for name, definition in DEFINITIONS.items() if name in defined},
            published=PUBLISHED,
            published_columns=PUBLISHED_COLUMNS,
            tables={kind: _of_kind(tables, kind) for kind in _TABLES},
            body=summary["body"],
            varied=varied,
            varied_metrics={n: DEFINITIONS[n] for n in DEFINITIONS if any(n in entries for entries in varied.values())},
            provenance=_lines(summary["provenance"]),
            top_metrics=[name for name in (*headline_metrics(groups), *_FURTHER_CARDS) if name in shown],
            mark=MARK,
            is_unreliable=is_unreliable,
            segmenter_messages=segmenter_messages(summary),
            sharpness_messages=_sharpness_messages(summary),
            trust=summary.get("trust"),
            missing=_missing(summary),
            memorised=summary.get("trust", {}).get("memorisation"),
            percent="{:.1%}".format,
            trust_warnings=warnings(summary) if "trust" in summary else [],
            **_downstream_values(downstream, summary),
        )
    )


def _downstream_values(downstream: dict[str, Any] | None, summary: dict[str, Any]) -> dict[str, Any]:
    """The template's values on trainings with generated images; `is_other_model`: those of another model's images."""
    values: dict[str, Any] = {"downstream": downstream, "shared_terms": "", "downstream_modalities": ()}
    if downstream is None:
        return values | {"is_other_model": False}
    made_by = summary["provenance"]["sample_job"].get("weights_digest")
    return values | {
        "shared_terms": shared_terms(downstream),
        "downstream_modalities": in_order(m for arm in downstream["arms"] for m in arm["by_modality"]),
        "is_other_model": downstream["settings"]["weights_digest"] != made_by,
    }


def _of_kind(tables: list[Table], kind: str) -> list[Table]:
    return [table for table in tables if table.name.startswith(_TABLES[kind])]


def write_page(path: Path, text: str) -> Path:
    """Write a page so that a reader never sees half of it."""
    write_atomic(path, text)
    return path


def template_environment(package: str = "segdiff_dist.evaluation.report", **settings: Any) -> Environment:
    """Jinja2 for the templates of a package. HTML is escaped, and an unknown name is an error; `settings` win."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    common = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=PackageLoader(package), **{**common, **settings})


def page_environment() -> Environment:
    """For the templates beside this file, with filters that write entries of a summary."""
    environment = template_environment()
    environment.filters["entry"] = format_entry
    environment.filters["interval"] = format_interval
    return environment


def png_url(pixels: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(pixels).decode("ascii")


def _missing(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Labels of the metrics without a value, by the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in summary.get("not_available", {}).items():
        names.setdefault(reason, []).append(DEFINITIONS[name].label if name in DEFINITIONS else name)
    return names


def _sharpness_messages(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences on blur and noise, by group of images."""
    groups = groups_of(summary["metrics"], summary["by_modality"])
    messages = {group: sharpness_messages(entries) for group, entries in groups.items()}
    return {group: lines for group, lines in messages.items() if lines}


def _lines(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as dotted names and values."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{name}.")
        elif value is not None:
            lines.append((f"{prefix}{name}", str(value)))
    return lines
