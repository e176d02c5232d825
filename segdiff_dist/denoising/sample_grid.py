"""Pictures of masks, real images and generated images, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.files import new_file
from data_shards.labels import LabelTable
from data_shards.records import SliceRecord
from data_shards.store.contact_sheet import class_colours

if TYPE_CHECKING:
    from segdiff_dist.tracking.tracker import Tracker

# The side of a picture's cells: small slices are enlarged by a whole factor to about this many pixels.
_CELL = 160
_GAP, _TOP, _CAPTION, _SIDE = 6, 34, 34, 92
_INK, _FAINT, _PAPER = (235, 235, 235), (150, 150, 155), (18, 18, 20)
# Room for the title over a single picture.
_LEAST_WIDTH = 460


class SampleGrids:
    """Draws a validation's images to FOLDER/samples_<images_seen>.png, and gives each file to the tracker."""

    def __init__(self, folder: Path, table: LabelTable, tracker: Tracker | None = None) -> None:
        self._folder, self._table, self._tracker = folder, table, tracker

    def __call__(self, records: list[SliceRecord], generated_PHW: np.ndarray, title: str, images_seen: int) -> None:
        """A validation.DrawGrid."""
        path = self._folder / f"samples_{images_seen:012d}.png"
        draw_sample_grid(records, generated_PHW, self._table, title, path)
        if self._tracker is not None:
            self._tracker.log_artifact(path, "pictures")


def draw_sample_grid(
    records: list[SliceRecord],
    generated_PHW: np.ndarray,
    table: LabelTable,
    title: str,
    path: Path,
    *,
    names: Sequence[str] = ("mask", "real", "generated"),
) -> None:
    """Write a PNG to `path`: a column a slice, with its mask at the top, the real image, and the generated one."""
    from PIL import Image, ImageDraw

    side = generated_PHW.shape[-1]
    cell = side * max(1, round(_CELL / side))
    width = max(_SIDE + len(records) * (cell + _GAP) + _GAP, _LEAST_WIDTH)
    sheet = Image.new("RGB", (width, _TOP + _CAPTION + 3 * (cell + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (2 * _GAP, 9), title, _INK, 15)
    for line, name in enumerate(names):
        _text(draw, (2 * _GAP, _TOP + _CAPTION + line * (cell + _GAP) + cell // 2 - 8), name, _INK, 14)
    for column, (record, generated_HW) in enumerate(zip(records, generated_PHW, strict=True)):
        left = _SIDE + column * (cell + _GAP)
        meta = record.meta
        _text(draw, (left, _TOP), f"{meta.modality} {meta.axis}", _INK, 12)
        _text(draw, (left, _TOP + 15), f"{meta.case_id} / {meta.slice_index}", _FAINT, 11)
        lines = (class_colours(table)[record.mask_HW], record.image_uint8(), generated_HW)
        for line, pixels in enumerate(lines):
            shown = Image.fromarray(pixels).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, _TOP + _CAPTION + line * (cell + _GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        sheet.save(unfinished, format="PNG")


def _text(draw: Any, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int) -> None:
    from PIL import ImageFont

    draw.text(at, text, fill=colour, font=ImageFont.load_default(size))
