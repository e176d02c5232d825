"""TotalSegmentator's classes by name, and its multi-label files in the whole-body table's ids.

Its ids differ between tasks and have changed between versions (ribs, MR), so only names are trusted: with --ml it
writes the table of a file's ids into the NIfTI header, as a CaretExtension in XML. Wasserthal et al. 2023 (CT),
Akinci D'Antonoli et al. 2025 (MR); names and header as in github.com/wasserth/TotalSegmentator (map_to_binary.py,
nifti_ext_header.py), versions 2.0 to 2.4.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.ingest.nifti import read_geometry
from data_shards.ingest.volumes import UnreadableVolume, whole_numbers
from data_shards.labels import WHOLEBODY

# Classes that TotalVIBE's table holds under another name or within another class; None if it holds no such class, so
# that they become part of `body`. MR's whole lungs become the lower lobes, which are the part of a lung that an
# abdominal MR shows most.
_RENAMED: dict[str, str | None] = {
    "small_bowel": "intestine",
    "colon": "intestine",
    "kidney_cyst_left": "kidney_left",
    "kidney_cyst_right": "kidney_right",
    "lung_left": "lung_lower_lobe_left",
    "lung_right": "lung_lower_lobe_right",
    "vertebrae": "vertebra_body",
    "vertebrae_S1": "sacrum",
    "intervertebral_discs": "IVD",
    "skull": "bone_other",
    "brain": None,
}
_RENAMED_BY_START = {"vertebrae_": "vertebra_body", "rib_": "bone_other"}
# TotalSegmentator's tasks have at most a few hundred classes.
_LARGEST_ID = 2**16
_LABEL = re.compile(rb'<Label\s[^>]*?Key="(\d+)"[^>]*>\s*(?:<!\[CDATA\[)?\s*([\w .-]+?)\s*(?:\]\]>)?\s*</Label>')


def wholebody_id(name: str) -> int | None:
    """The whole-body table's id for one of TotalSegmentator's classes (0: it has none), None for an unknown name."""
    if name in _RENAMED:
        ours = _RENAMED[name]
        return 0 if ours is None else WHOLEBODY.names.index(ours)
    for start, ours in _RENAMED_BY_START.items():
        if name.startswith(start):
            return WHOLEBODY.names.index(ours)
    known = name in WHOLEBODY.names and WHOLEBODY.names.index(name) in WHOLEBODY.organ_ids
    return WHOLEBODY.names.index(name) if known else None


def class_names(header: Any) -> dict[int, str]:
    """Names by id from the NIfTI header of a file written with --ml; empty if it holds none."""
    names: dict[int, str] = {}
    for extension in header.extensions:
        content = extension.get_content()
        if isinstance(content, bytes):
            names |= {int(key): name.decode() for key, name in _LABEL.findall(content)}
    return names


def to_wholebody_ids(made: Path, out: Path) -> None:
    """Write the multi-label file that TotalSegmentator made to `out`, ids of the whole-body table, uint8, same grid.

    Raises UnreadableVolume for a file that cannot be read, holds no names, or a class that is not known here.
    """
    import nibabel as nib

    try:
        read_geometry(made)
        image = nib.load(made)
        ids = whole_numbers(np.asanyarray(image.dataobj), 1.0, 0.0)
    except Exception as error:  # nibabel raises whatever the bytes lead it to
        raise UnreadableVolume(str(made), f"not NIfTI ({' '.join(str(error).split())[:120]})") from error
    names = class_names(image.header)
    if not names:
        raise UnreadableVolume(str(made), "no class names in its header: TotalSegmentator 2 with --ml writes them")
    present = np.unique(ids)
    if present[0] < 0 or present[-1] > _LARGEST_ID:
        wrong = present[0] if present[0] < 0 else present[-1]
        raise UnreadableVolume(str(made), f"id {wrong:g} is not a class of TotalSegmentator 2")
    table = np.zeros(int(present.max()) + 1, dtype=np.uint8)
    for value in present.tolist():
        if value == 0:
            continue
        name = names.get(value) if value == int(value) and value > 0 else None
        ours = None if name is None else wholebody_id(name)
        if ours is None:
            raise UnreadableVolume(str(made), f"id {value} is {name!r}: not among the classes of TotalSegmentator 2")
        table[int(value)] = ours
    mapped = nib.Nifti1Image(table[ids.astype(np.intp)], image.affine, image.header, dtype=np.uint8)
    mapped.header.extensions.clear()
    mapped.header.set_slope_inter(1, 0)
    nib.save(mapped, out)
