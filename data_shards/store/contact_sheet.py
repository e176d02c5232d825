"""A picture of a shard set: for each modality, axis and split a few slices, plain and with their masks as an
overlay."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_shards.files import write_atomic
from data_shards.labels import LabelTable, shown_name
from data_shards.records import AXES, SPLITS
from data_shards.store.shards import ShardSet

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_CELL, _CAPTION, _GAP, _SIDE, _TOP = 160, 16, 6, 96, 34
_PAIRS_OF_SPLIT = 2
_INK, _PAPER, _FAINT = (235, 235, 235), (18, 18, 20), (150, 150, 155)
# The legend of a small table lists all classes; that of a large one lists only classes that occur, in small letters.
_FEW_CLASSES = 20
_LEGEND_LARGE, _LEGEND_SMALL = (8, 24, 12), (7, 15, 10)  # columns, pixels a line, pixels of a letter
_ORGAN_ALPHA = 0.55
_BODY_COLOUR = (120, 134, 156)
# Twenty colours that can be distinguished on grey (Trubetskoy 2017), without its greys, white and black.
_COLOURS = np.array(
    [
        [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180], [70, 240, 240],
        [240, 50, 230], [210, 245, 60], [250, 190, 212], [0, 128, 128], [220, 190, 255], [170, 110, 40],
        [255, 250, 200], [128, 0, 0], [170, 255, 195], [128, 128, 0], [255, 215, 180], [0, 0, 117],
    ],
    dtype=np.float32,
)  # fmt: skip


# The same organ has the same colour in every table and on every picture. Neighbours differ; left and right of a pair
# are shades of one hue; vessels are as in an atlas. Hexadecimal RGB.
_ORGAN_COLOURS = {
    "spleen": "a56cc1",
    "kidney_right": "e0a12b",
    "kidney_left": "f5cf6a",
    "gallbladder": "4caf6a",
    "esophagus": "c79a7b",
    "liver": "b5533c",
    "stomach": "f2a0a1",
    "aorta": "e5383b",
    "inferior_vena_cava": "3f7fd9",
    "pancreas": "d6e06b",
    "adrenal_gland_right": "1fa6a0",
    "adrenal_gland_left": "86dcd4",
    "duodenum": "f47b20",
    "urinary_bladder": "7cc4f0",
    "prostate_uterus": "dd5fb0",
    "prostate": "dd5fb0",
}


def class_colours(table: LabelTable) -> np.ndarray:
    """uint8 [num_classes, 3], read-only: one colour a class on every picture of the project; background black.

    They are the table's own; else those of _ORGAN_COLOURS; all other organs each take the colour farthest from all
    before it, as the eye sees it (_perceived).
    """
    return _class_colours(table, table.colours)


@lru_cache
def _class_colours(table: LabelTable, own: tuple[str | None, ...] | None) -> np.ndarray:
    colours = np.zeros((table.num_classes, 3), dtype=np.uint8)
    if table.body_id is not None:
        colours[table.body_id] = np.array(_BODY_COLOUR, dtype=np.uint8)
    stated = dict(enumerate(own or ()))
    given = {i: stated.get(i) or _ORGAN_COLOURS.get(name) for i, name in enumerate(table.names)}
    named = [i for i in table.organ_ids if given[i]]
    for class_id in (i for i, colour in given.items() if colour):
        colours[class_id] = tuple(bytes.fromhex(str(given[class_id])))
    levels = np.linspace(0, 255, 11)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    seen = _perceived(candidates)
    # Too dark to be distinguished from black, or too grey to be distinguished from the image.
    usable = (seen[:, 0] > 0.35) & (np.hypot(seen[:, 1], seen[:, 2]) > 0.06)
    taken = _perceived(np.array([*colours[named], _BODY_COLOUR], dtype=np.float64))
    nearest = np.where(usable, np.linalg.norm(seen[:, None] - taken, axis=2).min(axis=1), 0.0)
    for class_id in table.organ_ids:
        if class_id not in named:
            best = int(nearest.argmax())
            colours[class_id] = np.rint(candidates[best])
            nearest = np.minimum(nearest, np.linalg.norm(seen - seen[best], axis=1))
    colours.flags.writeable = False
    return colours


def _perceived(rgb_N3: np.ndarray) -> np.ndarray:
    """[N, 3] lightness, green to red, blue to yellow of sRGB 0..255, in which distances correspond to perception: Oklab
    (Ottosson 2020, https://bottosson.github.io/posts/oklab)."""
    s = rgb_N3 / 255.0
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    return np.asarray(
        cones
        @ np.array(
            [
                [0.2104542553, 1.9779984951, 0.0259040371],
                [0.7936177850, -2.4285922050, 0.7827717662],
                [-0.0040720468, 0.4505937099, -0.8086757660],
            ]
        )
    )


class NotSaved(OSError):
    """A picture could not be written; the message is the system's reason."""


def _save(picture: Image.Image, path: Path) -> None:
    try:
        content = BytesIO()
        picture.save(content, format="PNG")
        write_atomic(path, content.getvalue())
    except OSError as error:
        raise NotSaved(error.strerror or str(error)) from error


def overlay(image_HW: np.ndarray, mask_HW: np.ndarray, table: LabelTable) -> np.ndarray:
    """uint8 [H, W, 3]: the image with organs tinted and the body's outline drawn."""
    grey = np.repeat(image_HW[:, :, None].astype(np.float32), 3, axis=2)
    colours = class_colours(table).astype(np.float32)[mask_HW]
    is_organ = np.isin(mask_HW, table.organ_ids)[:, :, None]
    tinted = np.where(is_organ, (1.0 - _ORGAN_ALPHA) * grey + _ORGAN_ALPHA * colours, grey)
    inside = np.pad(mask_HW > 0, 1)
    core = inside[1:-1, :-2] & inside[1:-1, 2:] & inside[:-2, 1:-1] & inside[2:, 1:-1]
    outline = (inside[1:-1, 1:-1] & ~core)[:, :, None] & ~is_organ
    drawn = _BODY_COLOUR if table.body_id is None else class_colours(table)[table.body_id]
    return np.where(outline, np.array(drawn, dtype=np.float32), tinted).astype(np.uint8)


def draw_contact_sheet(shard_set: ShardSet, path: Path) -> None:
    """Write the picture to `path` (PNG): a row a modality and axis, in each split pairs of image and overlay."""
    from PIL import Image, ImageDraw

    present = set(zip(*(shard_set.samples[name].to_pylist() for name in ("modality", "axis")), strict=True))
    lines = [(modality, axis) for modality in shard_set.modalities for axis in AXES if (modality, axis) in present]
    width = _SIDE + len(SPLITS) * (_PAIRS_OF_SPLIT * (2 * _CELL + _GAP) + 3 * _GAP)
    legend = _legend_ids(shard_set)
    columns, line_height, _ = _LEGEND_LARGE if len(legend) <= _FEW_CLASSES else _LEGEND_SMALL
    legend_height = line_height * -(-len(legend) // columns)
    height = _TOP + len(lines) * (_CELL + _CAPTION + _GAP) + legend_height + 2 * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, (modality, axis) in enumerate(lines):
        top = _TOP + line * (_CELL + _CAPTION + _GAP)
        draw_text(draw, (_GAP * 2, top + _CELL // 2 - 18), modality, _INK, 18)
        draw_text(draw, (_GAP * 2, top + _CELL // 2 + 4), axis, _FAINT, 14)
        for column, split in enumerate(SPLITS):
            left = _SIDE + column * (_PAIRS_OF_SPLIT * (2 * _CELL + _GAP) + 3 * _GAP)
            if line == 0:
                draw_text(draw, (left, 8), split, _INK, 16)
            for number, row in enumerate(_examples(shard_set, split, modality, axis)):
                _draw_pair(sheet, draw, shard_set, row, (left + number * (2 * _CELL + _GAP), top))
    _draw_legend(draw, shard_set.label_table, legend, height - legend_height - _GAP, width)
    _save(sheet, path)


def draw_class_histogram(
    table: LabelTable, pixels: dict[tuple[str, str], np.ndarray], path: Path, floor: float = 1e-6
) -> None:
    """Write a picture (PNG) to `path`: each class's share of the labelled pixels, a bar for every (split, modality), on
    a logarithmic scale from `floor` on. Classes that occur nowhere are left out."""
    from PIL import Image, ImageDraw

    groups = [group for group, counts in pixels.items() if counts.any()]
    shown = [i for i in range(table.num_classes) if any(pixels[group][i] for group in groups)]
    bar, width, left = 7, 560, 200
    height = _TOP + len(shown) * (bar * len(groups) + _GAP) + 24
    picture = Image.new("RGB", (left + width + 4 * _GAP, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    shades = [tuple(int(c) for c in _COLOURS[k]) for k in range(len(groups))]
    for k, group in enumerate(groups):
        at = left + k * (width // max(len(groups), 1))
        draw.rectangle((at, 12, at + 10, 22), fill=shades[k])
        draw_text(draw, (at + 15, 10), " ".join(group), _INK, 12)
    decades = -np.log10(floor)

    def reach(share: float) -> int:
        return int(width * max(0.0, 1.0 + np.log10(max(share, floor)) / decades))

    for power in range(int(decades) + 1):
        at = left + reach(10.0**-power)
        draw.line((at, _TOP - 4, at, height - 22), fill=(60, 60, 64))
        draw_text(draw, (at - 14, height - 18), f"{100 * 10.0**-power:g} %", _FAINT, 10)
    for line, class_id in enumerate(shown):
        top = _TOP + line * (bar * len(groups) + _GAP)
        draw_text(draw, (8, top + (bar * len(groups)) // 2 - 7), shown_name(table.names[class_id]), _INK, 11)
        for k, group in enumerate(groups):
            share = pixels[group][class_id] / max(int(pixels[group].sum()), 1)
            if share > 0:
                y = top + k * bar
                draw.rectangle((left, y, left + max(1, reach(share)), y + bar - 2), fill=shades[k])
    _save(picture, path)


def _examples(shard_set: ShardSet, split: str, modality: str, axis: str) -> list[int]:
    """Rows to show, each of another patient if there are several: the middle one of the slices with most classes, or
    the middle slice of an unlabelled patient."""
    rows = shard_set.select(split=split, modalities=[modality], axes=[axis], labelled_only=False)
    chosen = shard_set.samples.take(rows).select(["case_id", "labels_present"]).to_pylist()
    by_case: dict[str, list[tuple[int, int]]] = {}
    for row, sample in zip(rows.tolist(), chosen, strict=True):
        by_case.setdefault(sample["case_id"], []).append((row, len(sample["labels_present"])))
    cases = sorted(by_case)
    picks = []
    for number in np.unique(np.linspace(0, len(cases) - 1, _PAIRS_OF_SPLIT).round().astype(int)) if cases else []:
        slices = by_case[cases[number]]
        most = max(count for _, count in slices)
        fullest = [row for row, count in slices if count == most]
        picks.append(fullest[len(fullest) // 2])
    return picks


def _draw_pair(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, shard_set: ShardSet, row: int, at: tuple[int, int]
) -> None:
    from PIL import Image

    record = shard_set.read(row)
    image = Image.fromarray(record.image_uint8()).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
    mask = Image.fromarray(record.mask_HW).resize((_CELL, _CELL), Image.Resampling.NEAREST)
    tinted = Image.fromarray(overlay(np.asarray(image), np.asarray(mask), shard_set.label_table))
    sheet.paste(image.convert("RGB"), at)
    sheet.paste(tinted, (at[0] + _CELL, at[1]))
    label = f"{record.meta.case_id}  slice {record.meta.slice_index}" + ("" if record.meta.labelled else "  no label")
    draw_text(draw, (at[0] + 2, at[1] + _CELL + 1), label, _FAINT, 11)


def _legend_ids(shard_set: ShardSet) -> list[int]:
    """The classes to name: all of a small table, and those of a large table that occur in the set."""
    import pyarrow.compute as pc

    table = shard_set.label_table
    shown = [*table.organ_ids, *([] if table.body_id is None else [table.body_id])]
    if len(shown) <= _FEW_CLASSES:
        return shown
    occurring = set(pc.unique(pc.list_flatten(shard_set.samples["labels_present"])).to_pylist())
    return [class_id for class_id in shown if class_id in occurring]


def _draw_legend(draw: ImageDraw.ImageDraw, table: LabelTable, class_ids: list[int], top: int, width: int) -> None:
    colours = class_colours(table)
    columns, line_height, letters = _LEGEND_LARGE if len(class_ids) <= _FEW_CLASSES else _LEGEND_SMALL
    step = (width - 4 * _GAP) // columns
    for order, class_id in enumerate(class_ids):
        left, line = 2 * _GAP + step * (order % columns), top + line_height * (order // columns)
        draw.rectangle((left, line + 3, left + letters, line + 3 + letters), fill=tuple(map(int, colours[class_id])))
        draw_text(draw, (left + letters + 6, line + 2), shown_name(table.names[class_id]), _INK, letters)


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int
) -> None:
    """Write `text` at (x, y), in Pillow's own font of this size, which has only Latin letters."""
    from PIL import ImageFont

    draw.text(at, text, fill=colour, font=ImageFont.load_default(size))
