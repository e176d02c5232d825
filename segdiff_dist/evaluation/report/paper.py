"""What goes into a paper: tables as CSV and LaTeX, figures as vector PDF with their captions, the report as one PDF.

FOLDER/NAME.csv     a line a number: value, 95 % interval, n
FOLDER/NAME.tex     a table for \\input; needs the package booktabs alone
FOLDER/NAME.pdf     a figure, its fonts embedded as TrueType
FOLDER/captions.txt, captions.tex    each figure's caption; captions.tex includes the figures (package graphicx)
FOLDER/report.pdf   tables, figures and definitions
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.figure_style import Figure, save_vector, styled
from segdiff_dist.evaluation.report.page import template_environment
from segdiff_dist.evaluation.report.pdf_report import PdfReport
from segdiff_dist.evaluation.report.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure as Canvas

HTML = "html"
FORMATS = (HTML, "csv", "latex", "pdf")
PDF_REPORT = "report.pdf"
_FIELDS = (
    *("table", "group", "row", "column", "metric", "value", "ci95_low", "ci95_high", "n", "num_patients", "unit"),
    *("better", "unreliable", "too_few", "grey"),
)
# So many rows with intervals fit on a page.
_ROWS_A_TABLE = 22
# Letters in a line of a column's label.
_HEAD_LETTERS = 12
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "\u2212": r"$-$", "\u2191": r"$\uparrow$", "\u2193": r"$\downarrow$", "\u2192": r"$\to$", "\u00b2": r"$^2$",
    "\u00d7": r"$\times$", "\u2021": r"$\ddagger$", "\u2020": r"$\dagger$", "\u2013": "--", "\u2026": r"\ldots{}",
    "\u00e9": r"\'e", "\u00e4": r"\"a", "\u00f6": r"\"o", "\u00fc": r"\"u", "\u201c": "``", "\u201d": "''",
    "\u2019": "'",
}  # fmt: skip


def csv_text(table: Table) -> str:
    """A line a number, in the order of rows and columns."""
    file = io.StringIO()
    writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=False):
            entry = cell.entry
            if entry is None:
                continue
            low, high = entry.get("ci95") or ("", "")
            named = {"table": table.name, "group": table.group, "row": row.name, "column": column}
            values = {"metric": cell.metric, "value": entry["value"], "ci95_low": low, "ci95_high": high}
            kept = {name: entry.get(name, "") for name in ("n", "num_patients", "unit")}
            judged = {name: entry.get(name, False) for name in ("unreliable", "too_few")}
            judged |= {"better": DEFINITIONS[cell.metric].better, "grey": cell.grey}
            writer.writerow(named | values | kept | judged)
    return file.getvalue()


def latex_text(table: Table) -> str:
    """The table as LaTeX, in parts that fit on a page. It needs the package booktabs."""
    parts = [table.rows[k : k + _ROWS_A_TABLE] for k in range(0, len(table.rows), _ROWS_A_TABLE)]
    return _environment().get_template("table.tex.j2").render(table=table, parts=parts)


def captions_latex(figures: Sequence[Figure]) -> str:
    """A figure environment for each figure."""
    return _environment().get_template("captions.tex.j2").render(figures=figures)


def captions_text(figures: Sequence[Figure]) -> str:
    """Each figure's file, title and caption, for any word processor."""
    return "\n\n".join(f"{_vector_name(figure)}\n{figure.title}. {figure.caption}" for figure in figures) + "\n"


def latex_escaped(text: str) -> str:
    """Text as LaTeX shows it; letters of other scripts stay as they are (XeLaTeX and LuaLaTeX show them)."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


@dataclass
class Paper:
    """Writes a paper's files into `folder`, which exists. Figures are added as they are drawn."""

    folder: Path
    formats: Sequence[str]
    pdf: PdfReport | None = None
    figures: list[Figure] = field(default_factory=list)

    @property
    def needs_figures(self) -> bool:
        """Whether a format shows figures."""
        return bool({"latex", "pdf"} & set(self.formats))

    def tables(self, tables: Sequence[Table]) -> None:
        """Write tables as CSV and LaTeX, as far as they were asked for."""
        for table in tables:
            if "csv" in self.formats:
                (self.folder / f"{table.name}.csv").write_text(csv_text(table), encoding="utf-8")
            if "latex" in self.formats:
                (self.folder / f"{table.name}.tex").write_text(latex_text(table), encoding="utf-8")

    def figure(self, canvas: Canvas, figure: Figure) -> None:
        """A figure as vector PDF, and as a page of the report."""
        save_vector(canvas, self.folder / _vector_name(figure))
        self.figures.append(figure)
        if self.pdf is not None:
            self.pdf.figure(canvas, figure)

    def captions(self) -> None:
        """Write the captions of the figures added."""
        if self.figures:
            (self.folder / "captions.txt").write_text(captions_text(self.figures), encoding="utf-8")
            (self.folder / "captions.tex").write_text(captions_latex(self.figures), encoding="utf-8")


@contextmanager
def bound(paper: Paper, title: str, above: Sequence[str], tables: Sequence[Table]) -> Iterator[None]:
    """Around drawing the figures: the first table before them, the others and the definitions after them."""
    if "pdf" not in paper.formats:
        with styled():
            yield
        return
    # The report embeds its fonts when it is closed, in the style's way.
    with styled(), PdfReport.open(paper.folder / PDF_REPORT, title) as pdf:
        pdf.table(tables[0], above)
        paper.pdf = pdf
        yield
        for table in tables[1:]:
            pdf.table(table)
        used = {cell.metric for table in tables for row in table.rows for cell in row.cells}
        pdf.definitions([name for name in DEFINITIONS if name in used])


def _vector_name(figure: Figure) -> str:
    return Path(figure.file).with_suffix(".pdf").name


def _environment() -> Environment:
    environment = template_environment(
        autoescape=False,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    filters: dict[str, Callable[..., str]] = {"tex": latex_escaped, "tex_head": _latex_head, "tex_name": _latex_name}
    environment.filters |= filters | {"vector": _vector_name}
    return environment


def _latex_head(column: str) -> str:
    """A column's label on as many lines as it needs, so that columns are as narrow as their numbers."""
    lines = textwrap.wrap(column, _HEAD_LETTERS) or [""]
    stacked = r" \\ ".join(latex_escaped(line) for line in lines)
    return stacked if len(lines) == 1 else rf"\shortstack[r]{{{stacked}}}"


def _latex_name(name: str) -> str:
    """A name for \\label."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
