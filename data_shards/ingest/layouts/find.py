"""The layout of a folder: the given one, or the first that recognises the folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from data_shards.ingest.cases import Listing
from data_shards.ingest.dataset_json import DATASET_FILE, is_of_layout
from data_shards.ingest.layouts.amos import Amos, Decathlon, content_of
from data_shards.ingest.layouts.base import Layout, Request
from data_shards.ingest.layouts.dicom import Dicom
from data_shards.ingest.layouts.folder import Folder, pairs
from data_shards.ingest.layouts.nnunet import NnUNet
from data_shards.ingest.layouts.other_files import no_folder, seen_in
from data_shards.ingest.layouts.paired import paired_by_words
from data_shards.ingest.layouts.pictures import Pictures
from data_shards.ingest.layouts.totalsegmentator import TotalSegmentator
from data_shards.ingest.pictures import picture_stem
from data_shards.ingest.volume_files import stem
from data_shards.problems import InputProblems, Problem, problem

# In the order in which they are tried: first layouts with a describing file, then layouts by file names.
_FOLDER, _PICTURES = Folder(), Pictures()
LAYOUTS: tuple[Layout, ...] = (Amos(), Decathlon(), NnUNet(), TotalSegmentator(), _FOLDER, Dicom(), _PICTURES)
AUTO = "auto"
_MOST_FOLDERS = 20
_KNOWN = (
    "give a folder with the dataset.json of AMOS, MSD or nnU-Net, with images/ and labels/ of volumes or "
    "pictures (PNG, TIFF, JPEG), a manifest.csv, "
    "TotalSegmentator's CASE/segmentations, or DICOM files (docs/data.md 1)"
)


@dataclass(frozen=True)
class Recognised:
    """A folder's layout, and the reason, as text. `beside`: what auto saw there that this layout does not read, and how
    to read it instead."""

    layout: Layout
    reason: str
    beside: str | None = None

    def read(self, root: Path, request: Request) -> Listing:
        """The layout's cases."""
        return self.layout.read(root, request)


def recognise(root: Path, wanted: str = AUTO) -> Recognised:
    """`wanted`: a layout's name, or `auto`. A folder with a dataset.json that no layout recognises is checked as AMOS',
    which reports what is wrong. Last, images and labels are paired by words of their paths. Refused: anything else that
    no layout recognises."""
    if wanted != AUTO:
        return Recognised(next(one for one in LAYOUTS if one.name == wanted), "as asked for")
    for layout in LAYOUTS:
        if (reason := layout.recognise(root)) is not None:
            return Recognised(layout, reason, layout.not_read(root))
    if not root.is_dir():
        raise problem(root, "data folder", *no_folder(root, _KNOWN))
    content = content_of(root)
    if (root / DATASET_FILE).is_file() and not (content and not is_of_layout(content)):
        return Recognised(LAYOUTS[0], "no other layout was recognised")
    meant = [*_in_a_folder(root), *_described_below(root)]
    for layout, stem_of in (_FOLDER, stem), (_PICTURES, picture_stem):
        if not meant and (reason := paired_by_words(root, stem_of).reason) is not None:
            return Recognised(layout, reason, layout.not_read(root))
    remedy = "; or ".join([*(meant[:1] or seen_in(root)), _KNOWN])
    raise InputProblems([Problem(str(root), "layout", "none was recognised", remedy), *_without_pair(root)])


def _in_a_folder(root: Path) -> Iterator[str]:
    """That a folder in this one can be given, as of nnUNet_raw or of an unpacked archive. Many plain folders are those
    of patients."""
    folders = sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
    layouts = ((one, next((layout for layout in LAYOUTS if layout.recognise(one)), None)) for one in folders)
    found = [(one, layout) for one, layout in islice(layouts, _MOST_FOLDERS) if layout is not None]
    if found and (len(found) == 1 or any(layout.by_file for _, layout in found)):
        folder, layout = next((one for one in found if one[1].by_file), found[0])
        yield f"{folder.name} in it is of layout {layout.name}: give that folder"


def _described_below(root: Path) -> Iterator[str]:
    """That a folder further down, as nnUNet/nnUNet_raw/Dataset001, says itself what it holds."""
    for file in chain(root.glob(f"*/*/{DATASET_FILE}"), root.glob(f"*/*/*/{DATASET_FILE}")):
        if is_of_layout(content_of(file.parent)):
            yield f"{file.parent.relative_to(root)} has a {DATASET_FILE}: give that folder"


def _without_pair(root: Path) -> Iterator[Problem]:
    """Labels in the folders of a plain data set that no image is named like."""
    for stem_of in (stem, picture_stem):
        cases, found = pairs(root, stem_of)
        yield from found if cases else ()
