"""The embedded data: synthetic abdomens, CT and MR, with the fifteen organs of AMOS 2022, laid out as that archive is.

A patient is drawn (patient.py), painted (trunk.py, organs.py, on canvas.py, with the solids of shapes.py), imaged
(scanner.py) and stored (archive.py). Crude, but every organ is where and what it should be.
"""

from data_shards.phantom.archive import PhantomArchive, check, write_phantom
from data_shards.phantom.config import PhantomConfig

__all__ = ["PhantomArchive", "PhantomConfig", "check", "write_phantom"]
