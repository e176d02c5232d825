"""dataset.json of an archive: AMOS' lists of cases and its table of labels, from any writer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as short
from typing import Any

from data_shards.documents import read_json
from data_shards.ingest.modality import AMOS_NAME
from data_shards.problems import Problem, problem
from data_shards.records import is_case_id

DATASET_FILE = "dataset.json"
# dataset.json's lists, and the splits they are. AMOS publishes no labels for its test cases.
_SPLIT_OF = {"training": "train", "validation": "val", "test": "test"}
_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".png", ".tif", ".tiff")
# Keys that nnU-Net 2 writes and AMOS does not.
_NNUNET_KEYS = ("channel_names", "file_ending", "numTraining")
# Ids as dataset.json names them, its misspellings (`arota`, `postcava`) and their corrections.
_ORGAN_NAMES: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split("|"))
    for names in (
        "background",
        "spleen",
        "right kidney|kidney right",
        "left kidney|kidney left",
        "gall bladder|gallbladder",
        "esophagus|oesophagus",
        "liver",
        "stomach",
        "arota|aorta",
        "postcava|inferior vena cava",
        "pancreas",
        "right adrenal gland|adrenal gland right",
        "left adrenal gland|adrenal gland left",
        "duodenum",
        "bladder|urinary bladder",
        "prostate uterus",
    )
)
# Number of wrong names that are listed one by one: enough for a table in another order.
_MOST_NAMED = 20
# nnU-Net adds the channel's number to an image's name but not to its label's: CASE_0000.nii.gz.
_CHANNEL = re.compile(r"(.*[0-9])_([0-9]{4})")
_FIRST_CHANNEL = "0000"
_NUMBERED = re.compile(r"(.*?)([0-9]+)")
# A shard's member is named CASE-sagittal-0000.image.npy.zst, and a plain tar holds names of up to 100 characters.
_LONGEST_CASE_ID = 64
# What Linux allows (limits.h): longer ones are an error of the file system, not a file that is missing.
_LONGEST_PATH, _LONGEST_NAME = 4096, 255
_DRIVE = re.compile("[A-Za-z]:")


@dataclass(frozen=True)
class Entry:
    """A case as dataset.json lists it: paths below the archive. `case_id` is the image's name without ending and
    without a channel's number."""

    split: str
    image: str
    label: str | None
    case_id: str


def read_dataset(root: Path) -> dict[str, Any]:
    """The content of ROOT/dataset.json, which has at least one list of cases. Raises InputProblems."""
    remedy = "give the folder of an AMOS 2022 archive: dataset.json beside imagesTr, labelsTr, ..."
    if not root.is_dir():
        raise problem(root, "AMOS folder", "not a folder", remedy)
    file = root / DATASET_FILE
    if not file.is_file():
        raise problem(root, DATASET_FILE, "missing", remedy)
    content = read_json(file, "restore the file from the archive", "the content of an archive")
    if not any(name in content for name in _SPLIT_OF):
        value = "lists no cases: it has no `training`, `validation` or `test`"
        if any(name in content for name in _NNUNET_KEYS):
            value = f"is nnU-Net's and {value}{_unlike_nnunet(content)}"
        remedy = (
            "list each case as AMOS does, {image, label} in `training` and `validation`, and give `labels` as id: name"
        )
        raise problem(file, "JSON", value, remedy)
    for name in _SPLIT_OF:
        if not isinstance(content.get(name, []), list):
            raise problem(file, name, type(content[name]).__name__, "give a list of {image, label} entries")
    return content


def _unlike_nnunet(content: dict[str, Any]) -> str:
    """Why a data set of nnU-Net is not read as one."""
    ending = str(content.get("file_ending", ".nii.gz")).lower()
    if ending not in _ENDINGS:
        return f"; files of {ending[:20]} are not read: give one of {', '.join(_ENDINGS)}"
    if "dataset" in content:
        return "; `dataset` names files elsewhere: put them, or links, into imagesTr and labelsTr"
    return "; imagesTr has no CASE_0000 with a label CASE in labelsTr"


def is_of_layout(content: dict[str, Any]) -> bool:
    """Whether it lists cases, or is nnU-Net 2's."""
    return any(name in content for name in (*_SPLIT_OF, *_NNUNET_KEYS))


def read_entries(where: str, content: dict[str, Any]) -> tuple[list[Entry], list[Problem]]:
    """The cases that dataset.json lists, and everything wrong with its entries; `where` is its name."""
    listed = [(split, entry) for name, split in _SPLIT_OF.items() for entry in content.get(name, [])]
    # Test entries are plain file names in some releases of the format.
    pairs = [(split, {"image": entry} if isinstance(entry, str) else entry) for split, entry in listed]
    # If one label shows that the number in its image's name is a channel, the number in other names is a channel too.
    has_channels = any(_shows_channel(entry) for _, entry in pairs)
    is_renamed = len({names for _, entry in pairs if (names := _names_before_number(entry)) is not None}) == 1
    entries: list[Entry] = []
    problems: list[Problem] = []
    for split, raw in pairs:
        entry, wrong = _read_entry(where, split, raw, has_channels, is_renamed)
        problems += wrong
        if entry is not None:
            entries.append(entry)
    return entries, problems


def file_stem(file: str) -> str:
    """A NIfTI file's name without folders and ending."""
    return re.sub(r"\.nii(\.gz)?$", "", PurePosixPath(file).name, flags=re.I)


def amos_id(name: str) -> int | None:
    """AMOS' id of a class of this name, in any of its spellings; None for a class that AMOS does not have."""
    plain = words(name)
    return next((number for number, names in enumerate(_ORGAN_NAMES) if plain in names), None)


def words(name: str) -> str:
    """A name in the form that is compared: lower case, one blank between words."""
    return " ".join(re.split(r"[\s_/-]+", name.strip().lower()))


def _read_entry(
    where: str, split: str, raw: Any, has_channels: bool, is_renamed: bool
) -> tuple[Entry | None, list[Problem]]:
    """The entry, None if its case cannot be determined, and its problems. `is_renamed`: all labels have another word
    before the case's number than their images."""
    image = _path(raw.get("image")) if isinstance(raw, dict) else None
    if not isinstance(image, str):
        return None, [Problem(where, split, short(raw), "give an object with `image` and `label`")]
    label = None if split == "test" else _path(raw.get("label"))
    for path in (image, label):
        if isinstance(path, str) and not is_below(path):
            remedy = "give a path inside the archive's folder, as ./imagesTr/amos_0001.nii.gz"
            return None, [Problem(where, split, short(path), remedy)]
    stem = file_stem(image)
    if len(stem) > _LONGEST_CASE_ID:
        return None, [Problem(where, split, image, f"name cases with at most {_LONGEST_CASE_ID} characters")]
    # A tar's member is named by its case, and WebDataset splits names at the first dot.
    if not (is_case_id(stem) and re.fullmatch(r"[^.]*[0-9]", stem)):
        remedy = "name files by case, as amos_0001.nii.gz: letters, digits, _ and -, ending in the case's number"
        return None, [Problem(where, split, image, remedy)]
    channel = _CHANNEL.fullmatch(stem)
    if channel and AMOS_NAME.fullmatch(channel[1]) and channel[2] != _FIRST_CHANNEL:
        remedy = f"list {channel[1]}_{_FIRST_CHANNEL} alone: a case has one image"
        return None, [Problem(where, split, f"{image} is channel {int(channel[2])} of {channel[1]}", remedy)]
    if split == "test":
        return Entry(split, image, None, _case_id(stem, None, has_channels)), []
    if not isinstance(label, str):
        return None, [Problem(where, split, f"{image} has no label", "name its label file, or list it under `test`")]
    label_stem = file_stem(label)
    entry = Entry(split, image, label, _case_id(stem, label_stem, has_channels))
    if _case_id(label_stem, None, False) != entry.case_id and not (is_renamed and _names_before_number(raw)):
        remedy = "image and label of a case carry the same file name"
        return entry, [Problem(where, split, f"{image} is labelled by {label}", remedy)]
    return entry, []


def _path(value: Any) -> Any:
    """A path as other systems write it: blanks around it, backslashes between folders."""
    return value.strip().replace("\\", "/") if isinstance(value, str) else value


def is_below(path: str) -> bool:
    """Whether a path can be that of a file below the archive: files elsewhere are not allowed."""
    parts = PurePosixPath(path).parts
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and a file name cannot
        return False
    whole = bool(parts) and sum(lengths) < _LONGEST_PATH and max(lengths) <= _LONGEST_NAME
    is_elsewhere = path.startswith("/") or _DRIVE.match(path) or ".." in parts
    return whole and not is_elsewhere and all(ord(letter) >= 32 for letter in path)


def _shows_channel(raw: Any) -> bool:
    """Whether an entry's label is named like its image without a channel's number."""
    image, label = (_path(raw.get("image")), _path(raw.get("label"))) if isinstance(raw, dict) else (None, None)
    if not isinstance(image, str) or not isinstance(label, str):
        return False
    return file_stem(image) == f"{file_stem(label)}_{_FIRST_CHANNEL}"


def _names_before_number(raw: Any) -> tuple[str, str] | None:
    """What is before the same number in the names of an entry's image and label, as img0001 and label0001; None if the
    numbers differ, or there is no label."""
    files = [_path(raw.get(key)) if isinstance(raw, dict) else None for key in ("image", "label")]
    named = [_NUMBERED.fullmatch(file_stem(one)) for one in files if isinstance(one, str)]
    if len(named) < 2 or named[0] is None or named[1] is None or named[0][2] != named[1][2]:
        return None
    return named[0][1], named[1][1]


def _case_id(stem: str, label_stem: str | None, has_channels: bool) -> str:
    """The case of an image, or of a label, of this name: without the first channel's number where that is one.

    The number is a channel if the label shows it, after AMOS' own names, and, for an image without a label, if the
    archive has channels. Otherwise it may be a part of the case's name.
    """
    channel = _CHANNEL.fullmatch(stem)
    if channel is None or channel[2] != _FIRST_CHANNEL:
        return stem
    shown = channel[1] == label_stem or (label_stem is None and has_channels)
    return channel[1] if shown or AMOS_NAME.fullmatch(channel[1]) else stem


def problems_with_organs(where: str, organs: Any) -> Iterator[Problem]:
    """Problems of `labels`. It may be missing: ids are compared with the table voxel by voxel anyway."""
    if organs is None:
        return
    if not isinstance(organs, dict):
        yield Problem(where, "labels", type(organs).__name__, "give an object of id: name")
        return
    if organs and all(isinstance(value, int) and not isinstance(value, bool) for value in organs.values()):
        organs = {str(value): name for name, value in organs.items()}  # nnU-Net 2 writes name: id
    num_wrong = 0
    for text, name in organs.items():
        is_id = text.isascii() and text.isdecimal() and len(text) < 4 and int(text) < len(_ORGAN_NAMES)
        known = _ORGAN_NAMES[int(text)] if is_id else frozenset()
        if not isinstance(name, str) or words(name) not in known:
            num_wrong += 1
            if num_wrong > _MOST_NAMED:
                yield Problem(where, "labels", f"{len(organs)} entries", "give AMOS' table of 15 organs")
                return
            expected = f"'{sorted(known)[0]}'" if known else f"no id above {len(_ORGAN_NAMES) - 1}"
            remedy = f"AMOS has {expected} there: renumber the labels to AMOS' table"
            remedy += ", or keep these classes with --prepare.layout msd"
            yield Problem(where, f"labels.{text[:20]}", short(name), remedy)
