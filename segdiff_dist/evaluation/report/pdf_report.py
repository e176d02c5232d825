"""The report as a PDF: pages of A4 shape with tables, figures (vector) and definitions. Text stays text.

A page is as wide as what it shows needs, and keeps the shape of A4, so that all pages print alike.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdiff_dist.evaluation.metrics.definitions import DEFINITIONS
from segdiff_dist.evaluation.report.figure_style import VECTOR_DPI, Figure, plain
from segdiff_dist.evaluation.report.tables import Cell, Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Inches: A4, its margin, the least width of a column of numbers, and what a letter of one point takes (DejaVu Sans).
_WIDTH, _SHAPE, _MARGIN, _COLUMN, _LETTER = 8.27, 297 / 210, 0.6, 0.74, 0.0082
_INK, _SOFT, _GREY = "#1f2933", "#5a6876", "#9aa5b1"
_LABEL_LETTERS = 30


class PdfReport:
    """Writes pages to a PDF file, in order."""

    def __init__(self, pages: Any) -> None:
        self._pages = pages

    @classmethod
    @contextmanager
    def open(cls, path: Path, title: str) -> Iterator[PdfReport]:
        """A report in the file `path`."""
        from matplotlib.backends.backend_pdf import PdfPages

        # Without a date, the same numbers make the same file.
        metadata = {"Title": title, "Creator": "segdiff report", "CreationDate": None}
        with PdfPages(path, metadata=metadata) as pages:
            yield cls(pages)

    def figure(self, canvas: Canvas, figure: Figure) -> None:
        """A page with a drawn figure between its title and its caption. The canvas keeps its layout from then on."""
        from matplotlib.transforms import Bbox

        _freeze(canvas)
        caption = textwrap.fill(plain(figure.caption), max(60, int(canvas.get_figwidth() / (8 * _LETTER))))
        texts = [
            canvas.text(0.0, 1.01, plain(figure.title), va="bottom", fontsize=11, weight="bold", color=_INK),
            canvas.text(0.0, -0.01, caption, va="top", fontsize=8, color=_SOFT, linespacing=1.5),
        ]
        box = canvas.get_tightbbox()
        wide = max(box.width + 2 * _MARGIN, _WIDTH, (box.height + 2 * _MARGIN) / _SHAPE)
        left, top = box.x0 + box.width / 2 - wide / 2, box.y1 + _MARGIN
        self._pages.savefig(canvas, bbox_inches=Bbox([[left, top - wide * _SHAPE], [left + wide, top]]), dpi=VECTOR_DPI)
        for text in texts:
            text.remove()

    def table(self, table: Table, above: Sequence[str] = ()) -> None:
        """As many pages as a table needs; `above`: a title and lines over it."""
        page = _Page.of(self._pages, len(table.columns))
        for k, line in enumerate(above):
            page.write(line, 8 if k else 15, weight="normal" if k else "bold", colour=_SOFT if k else _INK)
        page.space(0.15 if above else 0.0)
        page.write(table.title, 11, weight="bold")
        page.write(table.caption, 7.5, colour=_SOFT)
        page.header(table)
        for row in table.rows:
            if not page.fits(0.42):
                page.finish()
                page = _Page.of(self._pages, len(table.columns))
                page.write(f"{table.title} (continued)", 11, weight="bold")
                page.header(table)
            page.row(row)
        page.rule(1.0)
        if table.notes:
            page.space(0.08)
            page.write(f"Grey: the segmenter fails on real images. {'; '.join(table.notes)}.", 7.5, colour=_SOFT)
        page.finish()

    def definitions(self, names: Sequence[str]) -> None:
        """What each metric is."""
        page = _Page.of(self._pages, 0)
        page.write("Definitions", 15, weight="bold")
        for name in names:
            if not page.fits(0.8):
                page.finish()
                page = _Page.of(self._pages, 0)
            page.write(f"{DEFINITIONS[name].label} ({name})", 8, weight="bold")
            page.write(DEFINITIONS[name].text, 7.5, colour=_SOFT)
            page.space(0.05)
        page.finish()


def _freeze(canvas: Canvas) -> None:
    """Lay the figure out for the last time. Its legends are at a side of the figure, which is not that of the page."""
    canvas.canvas.draw()
    canvas.set_layout_engine("none")
    for legend in canvas.legends:
        corner = canvas.transFigure.inverted().transform(legend.get_window_extent().min)
        legend.set_loc("lower left")
        legend.borderaxespad = 0.0
        legend.set_bbox_to_anchor(tuple(corner), transform=canvas.transFigure)


class _Page:
    """A page of text, filled from the top."""

    def __init__(self, pages: Any, width: float, num_columns: int) -> None:
        from matplotlib import pyplot as plt

        self._pages, self._width, self._height = pages, width, width * _SHAPE
        self._canvas = plt.figure(figsize=(self._width, self._height))
        self._y = self._height - _MARGIN
        self._labels = min(2.1, 0.4 * (width - 2 * _MARGIN))
        self._step = (width - 2 * _MARGIN - self._labels) / max(num_columns, 1)

    @classmethod
    def of(cls, pages: Any, num_columns: int) -> _Page:
        return cls(pages, max(_WIDTH, 2 * _MARGIN + 2.1 + num_columns * _COLUMN), num_columns)

    def fits(self, height: float) -> bool:
        return self._y - height > _MARGIN

    def space(self, height: float) -> None:
        self._y -= height

    def write(self, text: str, size: float, *, weight: str = "normal", colour: str = _INK) -> None:
        """A paragraph over the page's width."""
        letters = int((self._width - 2 * _MARGIN) / (size * _LETTER))
        lines = textwrap.wrap(text, letters) or [""]
        self._put(_MARGIN, "\n".join(lines), size, weight=weight, color=colour, linespacing=1.45)
        self._y -= len(lines) * size * 1.45 * 1.17 / 72 + 0.06

    def header(self, table: Table) -> None:
        """The column labels of a table, between two rules."""
        letters = max(6, int(self._step / (7 * _LETTER)) - 1)
        columns = [textwrap.wrap(column, letters) or [""] for column in table.columns]
        most = max(map(len, columns))
        self.space(0.05)
        self.rule(1.0)
        self.space(0.06)
        top = self._y
        for k, lines in enumerate(columns):
            self._put(self._right(k), "\n".join(lines), 7, ha="right", color=_SOFT, linespacing=1.2)
        self._put(_MARGIN, table.first, 7, color=_SOFT)
        self._y = top - most * 0.135 - 0.04
        self.rule(0.5)
        self.space(0.05)

    def row(self, row: Row) -> None:
        """A label and its numbers, with their intervals below."""
        lines = textwrap.wrap(row.label, _LABEL_LETTERS) or [""]
        self._put(_MARGIN, "\n".join(lines), 7.5, color=_INK, linespacing=1.2)
        for k, cell in enumerate(row.cells):
            self._cell(k, cell)
        has_interval = any(cell.interval() for cell in row.cells)
        self._y -= max(0.14 * len(lines), 0.27 if has_interval else 0.14) + 0.06

    def rule(self, width: float) -> None:
        from matplotlib.lines import Line2D

        at = self._y / self._height
        ends = [_MARGIN / self._width, 1 - _MARGIN / self._width]
        self._canvas.add_artist(Line2D(ends, [at, at], lw=width, color=_INK))

    def finish(self) -> None:
        from matplotlib import pyplot as plt

        self._pages.savefig(self._canvas)
        plt.close(self._canvas)

    def _cell(self, k: int, cell: Cell) -> None:
        colour, weight = (_GREY if cell.grey else _INK), ("bold" if cell.best else "normal")
        self._put(self._right(k), cell.value, 7.5, ha="right", color=colour, weight=weight)
        self._y -= 0.13
        self._put(self._right(k), cell.interval("\u2013"), 5.5, ha="right", color=_GREY if cell.grey else _SOFT)
        self._y += 0.13

    def _right(self, k: int) -> float:
        return _MARGIN + self._labels + (k + 1) * self._step

    def _put(self, x: float, text: str, size: float, **look: Any) -> None:
        self._canvas.text(x / self._width, self._y / self._height, plain(text), va="top", fontsize=size, **look)
