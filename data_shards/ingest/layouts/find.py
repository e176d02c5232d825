"""Which layout a folder has: the one that is asked for, or the first that recognises it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_shards.ingest.cases import Listing
from data_shards.ingest.layouts.amos import Amos, Decathlon
from data_shards.ingest.layouts.base import Layout, Request
from data_shards.ingest.layouts.folder import Folder
from data_shards.ingest.layouts.nnunet import NnUNet
from data_shards.ingest.layouts.totalsegmentator import TotalSegmentator

# In the order in which they are asked: those that a file names before those that names of files suggest.
LAYOUTS: tuple[Layout, ...] = (Amos(), Decathlon(), NnUNet(), TotalSegmentator(), Folder())
AUTO = "auto"


@dataclass(frozen=True)
class Recognised:
    """A folder's layout, and why it is that one, in words."""

    layout: Layout
    reason: str

    def read(self, root: Path, request: Request) -> Listing:
        """The layout's cases."""
        return self.layout.read(root, request)


def recognise(root: Path, wanted: str = AUTO) -> Recognised:
    """`wanted`: a layout's name, or `auto`. A folder that none recognises is looked at as AMOS', which says what is
    missing."""
    if wanted != AUTO:
        return Recognised(next(one for one in LAYOUTS if one.name == wanted), "as asked for")
    for layout in LAYOUTS:
        if (reason := layout.recognise(root)) is not None:
            return Recognised(layout, reason)
    return Recognised(LAYOUTS[0], "no other layout was recognised")
