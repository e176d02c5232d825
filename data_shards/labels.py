"""Label tables: the meaning of each id. A set's index.json contains its table.

amos the fifteen organs that AMOS 2022's experts drew (Ji et al. 2022, its dataset.json), then `body` wholebody
TotalVIBE's classes under TotalVIBE's ids (Graf et al. 2024, TotalVibeSegmentator), then `body` merged the same ids,
with AMOS' organs over them; its prostate is `prostate_uterus`, as AMOS' class is both
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BACKGROUND = "background"
BODY = "body"
UNUSED = "unused"

_COLOUR = re.compile(r"[0-9a-f]{6}")

# Ids and names of AMOS 2022 (Ji et al. 2022, dataset.json), misspelt names put right.
_AMOS_ORGANS = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
    "duodenum",
    "urinary_bladder",
    "prostate_uterus",
)
# TotalVIBE's ids 1 to 72 (Graf et al. 2024, the label overview of its repository, robert-graf/VIBESegmentator). Id 20
# is unused (TotalSegmentator's colon there is part of `intestine` here): 72 ids, 71 classes.
_WHOLEBODY_CLASSES = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland_right",
    "adrenal_gland_left", "lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right",
    "lung_middle_lobe_right", "lung_lower_lobe_right", "esophagus", "trachea", "thyroid_gland", "intestine", "duodenum",
    "unused", "urinary_bladder", "prostate", "sacrum", "heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk",
    "subclavian_artery_right", "subclavian_artery_left", "common_carotid_artery_right", "common_carotid_artery_left",
    "brachiocephalic_vein_left", "brachiocephalic_vein_right", "atrial_appendage_left", "superior_vena_cava",
    "inferior_vena_cava", "portal_vein_and_splenic_vein", "iliac_artery_left", "iliac_artery_right", "iliac_vena_left",
    "iliac_vena_right", "humerus_left", "humerus_right", "scapula_left", "scapula_right", "clavicula_left",
    "clavicula_right", "femur_left", "femur_right", "hip_left", "hip_right", "spinal_cord", "gluteus_maximus_left",
    "gluteus_maximus_right", "gluteus_medius_left", "gluteus_medius_right", "gluteus_minimus_left",
    "gluteus_minimus_right", "autochthon_left", "autochthon_right", "iliopsoas_left", "iliopsoas_right", "sternum",
    "costal_cartilages", "subcutaneous_fat", "muscle", "inner_fat", "IVD", "vertebra_body",
    "vertebra_posterior_elements", "spinal_channel", "bone_other",
)  # fmt: skip


def shown_name(name: str, most: int = 40) -> str:
    """A label's name for display: on one line, without control characters, with its middle left out if it is long."""
    plain = "".join(c if c.isprintable() else " " for c in name.replace("_", " "))
    plain = " ".join(plain.split()) or "(no name)"
    return plain if len(plain) <= most else f"{plain[: most // 2]}\u2026{plain[-(most // 2 - 1) :]}"


def is_colour(value: object) -> bool:
    """Whether it is a colour of a table: six hexadecimal digits, in small letters."""
    return isinstance(value, str) and _COLOUR.fullmatch(value) is not None


@dataclass(frozen=True)
class LabelTable:
    """Names by id. Id 0 is background; `body`, if present, is the rest of the patient; `unused` is not a class.

    colours: RGB of each class in hexadecimal for pictures, None for a class that gets one of ours. They are no part of
    the table's identity."""

    name: str
    names: tuple[str, ...]
    colours: tuple[str | None, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.names or self.names[0] != BACKGROUND or len(set(self.names)) != len(self.names):
            raise ValueError(f"label table {self.name!r}: names must be unique and start with {BACKGROUND!r}")
        if len(self.names) > 256:
            raise ValueError(f"label table {self.name!r}: {len(self.names)} ids do not fit into uint8")
        colours = self.colours if self.colours is not None else (None,) * len(self.names)
        if len(colours) != len(self.names) or not all(one is None or is_colour(one) for one in colours):
            raise ValueError(f"label table {self.name!r}: colours must be one for each name, as b5533c, or null")

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> LabelTable:
        """The table that `described` gives. Raises KeyError, TypeError, ValueError."""
        colours = described.get("colours")
        names = tuple(map(str, described["names"]))
        return cls(str(described["name"]), names, None if colours is None else tuple(colours))

    @property
    def described(self) -> dict[str, Any]:
        """For JSON. Colours are there only if there are any."""
        colours = {} if self.colours is None else {"colours": list(self.colours)}
        return {"name": self.name, "names": list(self.names)} | colours

    @property
    def num_classes(self) -> int:
        """Number of ids, background and body included."""
        return len(self.names)

    @property
    def body_id(self) -> int | None:
        """The id of `body`, or None if the table has none."""
        return self.names.index(BODY) if BODY in self.names else None

    @property
    def organ_ids(self) -> tuple[int, ...]:
        """Ids of organs: without background, body and unused ids."""
        return tuple(i for i, n in enumerate(self.names) if n not in (BACKGROUND, BODY, UNUSED))


AMOS = LabelTable("amos", (BACKGROUND, *_AMOS_ORGANS, BODY))
WHOLEBODY = LabelTable("wholebody", (BACKGROUND, *_WHOLEBODY_CLASSES, BODY))
MERGED = LabelTable("merged", tuple("prostate_uterus" if name == "prostate" else name for name in WHOLEBODY.names))
LABEL_TABLES = {table.name: table for table in (AMOS, WHOLEBODY, MERGED)}

# For each of AMOS' ids, background to prostate_uterus, the id of the same organ in WHOLEBODY and MERGED.
AMOS_TO_WHOLEBODY = tuple(MERGED.names.index(name) for name in AMOS.names if name != BODY)

# Label sets with only the experts' masks: the id in the set for each of AMOS' ids, background to prostate_uterus.
FROM_EXPERTS = {AMOS.name: tuple(range(len(_AMOS_ORGANS) + 1))}
