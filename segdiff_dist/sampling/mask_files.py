"""The masks of a folder, their names, and the digest of all of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.ingest.png_files import PNG
from data_shards.problems import problem
from data_shards.records import LONGEST_CASE_ID, is_case_id
from data_shards.store.set_index import file_sha256
from segdiff_dist.config import read_yaml
from segdiff_dist.sampling.config import SampleConfig

ENDINGS = (".nii.gz", ".nii", ".png")
# Files that Jupyter, a Mac's zip, Synology and Windows create in folders. Some of them (copies, resource forks,
# thumbnails) have the endings of masks.
_SYSTEM = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
)
# Endings that a PNG may have by mistake.
_PICTURES = (".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", "")


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder: masks, by name; hidden and system files; others."""

    masks: tuple[Path, ...]
    hidden: tuple[Path, ...]
    others: tuple[Path, ...]

    def passed_over(self) -> str | None:
        """A message about files that are not masks; None if there are none."""
        words = []
        if self.others:
            endings = [file.suffix or file.name for file in self.others]
            others = f"{_counted(self.others, 'other file')} skipped ({_some(endings)})"
            words.append(f"{others}: masks are NIfTI and PNG files")
        if self.hidden:
            parts = [next(part for part in file.parts[::-1] if _is_hidden(part)) for file in self.hidden]
            words.append(f"{_counted(self.hidden, 'hidden or system file')} skipped ({_some(parts)})")
        if png := [file for file in self.others if file.suffix.lower() in _PICTURES and _is_png(file)]:
            words.append(f"{png[0].name} is PNG by its bytes: if it is a mask, let its name end in .png")
        return "; ".join(words) or None


def list_folder(folder: Path) -> FolderFiles:
    """The files below a folder. A name that begins with a dot, or is a system's name, makes a file or a whole folder
    hidden."""
    found: dict[str, list[Path]] = {"masks": [], "hidden": [], "others": []}
    for parent, _, names in os.walk(folder):
        within = Path(parent).relative_to(folder).parts
        for name in names:
            file = Path(parent) / name
            if any(_is_hidden(part) for part in (*within, name)):
                found["hidden"].append(file)
            elif file.is_file():
                found["masks" if ending(file) else "others"].append(file)
    return FolderFiles(*(tuple(sorted(files)) for files in found.values()))


def mask_files(folder: Path) -> tuple[Path, ...]:
    """The masks below a folder, by name; a folder without masks is refused."""
    files = list_folder(folder)
    if not files.masks:
        passed_over = files.passed_over()
        value = f"none there: {passed_over}" if passed_over else "none there"
        raise problem(folder, "masks", value, f"give a folder of {', '.join(ENDINGS)} files")
    return files.masks


def ending(file: Path) -> str:
    """The ending of ENDINGS that a file has, in upper or lower case; empty if it is not a mask."""
    name = file.name.lower()
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def folder_digest(folder: Path, config: SampleConfig) -> str:
    """sha256 over the names and bytes of a folder's masks and of the label map. No file is held in memory."""
    digest = hashlib.sha256()
    for file in mask_files(folder):
        try:
            sha256 = file_sha256(file)
        except OSError as error:
            raise problem(file, "file", f"cannot be read ({error.strerror})", "make it readable") from error
        digest.update(os.fsencode(file.relative_to(folder)) + bytes.fromhex(sha256))
    if config.label_map is not None:
        read_yaml(config.label_map)  # refused if it is not there
        digest.update(config.label_map.read_bytes())
    return digest.hexdigest()


def case_id_of(file: Path) -> str:
    """The case id of a mask file, from its path below the folder: / and . become _. Other characters that an id cannot
    hold, such as spaces and accented letters, become _ too; then a digest of the whole name makes the id unique."""
    name = _joined_name(file)
    if is_case_id(name):
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[: LONGEST_CASE_ID - 9] + f"_{digest}"


def is_named_after(file: Path) -> bool:
    """Whether a mask's id is its file's name, folders joined by _."""
    return case_id_of(file) == _joined_name(file)


def without_ending(file: Path) -> str:
    """The path without the ending of a mask."""
    return file.as_posix().removesuffix(file.name[len(file.name) - len(ending(file)) :])


def _joined_name(file: Path) -> str:
    return str(file)[: -len(ending(file))].replace("/", "_").replace(".", "_")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _counted(files: Sequence[Path], what: str) -> str:
    return f"{len(files):,} {what}{'s' if len(files) > 1 else ''}"


def _some(words: Iterable[str]) -> str:
    known = sorted(set(words))
    return ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")


def _is_png(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(PNG)) == PNG
    except OSError:
        return False
