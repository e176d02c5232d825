"""The picture of a model card: masks in their classes' colours, and below each the image that was made of it.

Dimensions: N pairs, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from data_shards.labels import LabelTable
from data_shards.problems import InputProblems
from data_shards.store.contact_sheet import class_colours
from segdiff_dist.sampling.store import SampleStore

_GAP, _TOP, _CELL = 4, 18, 192
_INK, _PAPER = (235, 235, 235), (18, 18, 20)
# Columns, and how many samples are looked at for each modality.
_NUM_SHOWN, _NUM_LOOKED_AT = 6, 24


def draw_gallery(mask_NHW: np.ndarray, image_NHW: np.ndarray, names: Sequence[str], table: LabelTable) -> bytes:
    """A PNG of uint8 masks and images, with a line of text above each column."""
    from PIL import Image, ImageDraw, ImageFont

    num, side = mask_NHW.shape[:2]
    cell = min(side * max(1, round(_CELL / side)), 2 * _CELL)
    sheet = Image.new("RGB", (num * (cell + _GAP) - _GAP, _TOP + 2 * (cell + _GAP) - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (mask_HW, image_HW, name) in enumerate(zip(mask_NHW, image_NHW, names, strict=True)):
        left = column * (cell + _GAP)
        draw.text((left + 2, 2), name, fill=_INK, font=ImageFont.load_default(11))
        for line, pixels in enumerate((class_colours(table)[mask_HW], image_HW)):
            shown = Image.fromarray(pixels).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, _TOP + line * (cell + _GAP)))
    content = BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def gallery_of(samples: SampleStore, table: LabelTable) -> bytes | None:
    """A PNG of finished samples of each modality: those whose masks show the most classes, one of a mask. None if there
    is none, or if a file cannot be read."""
    missing = set(samples.missing())
    items = [item for item in samples.items.to_pylist() if item["item_id"] not in missing and item["seed_index"] == 0]
    modalities = sorted({item["target_modality"] for item in items})
    chosen = []
    try:
        for modality in modalities:
            own = [item["item_id"] for item in items if item["target_modality"] == modality]
            some = [own[at] for at in np.unique(np.linspace(0, len(own) - 1, _NUM_LOOKED_AT).astype(int))]
            richest = sorted(some, key=lambda at: -len(np.unique(samples.mask[at])))
            chosen += [(at, modality) for at in richest[: max(1, _NUM_SHOWN // len(modalities))]]
        chosen = chosen[:_NUM_SHOWN]
        mask_NHW, image_NHW = (
            np.stack([part[at] for at, _ in chosen]) if chosen else np.empty((0, 1, 1))
            for part in (samples.mask, samples.image)
        )
    except (InputProblems, OSError, ValueError):
        return None
    return draw_gallery(mask_NHW, image_NHW, [f"synthetic {m}" for _, m in chosen], table) if chosen else None
