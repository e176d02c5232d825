"""The training state in files that any number of ranks and any ZeRO stage can read.

Every kind of state (weights, Adam's moments, averages) is as large as the model. Each rank holds pieces of it in a few
flat tensors, its shards. An Extent is the position of a parameter's elements in them. A rank writes its shards to one
safetensors file with its extents in the header. A reader fills its own extents from the files that hold them.
Safetensors hold numbers only, so a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.documents import read_json, reading, shown
from data_shards.files import new_file, write_atomic
from data_shards.problems import InputProblems, Problem, problem

# Read and checked in pieces of this size.
_PIECE_BYTES = 16 * 2**20
# In a file's header.
_LAYOUT = "layout"
_ANOTHER = "use another checkpoint"


@dataclass(frozen=True)
class Extent:
    """Elements start..stop of a flattened parameter are at `offset` of the rank's `shard`-th flat tensor."""

    parameter: str
    start: int
    stop: int
    shard: int
    offset: int


@dataclass(frozen=True)
class StateShard:
    """One rank's part. shards: kind -> flat fp32 tensors, alike in number and length for every kind; scalars: kind ->
    a number that all elements share (Adam's step)."""

    shapes: dict[str, tuple[int, ...]]
    extents: tuple[Extent, ...]
    shards: dict[str, list[Tensor]]
    scalars: dict[str, float]


def share(extents: Iterable[Extent], rank: int, world_size: int) -> tuple[Extent, ...]:
    """A rank's even share of extents that every rank holds."""
    shared = []
    for e in extents:
        length = e.stop - e.start
        low, high = length * rank // world_size, length * (rank + 1) // world_size
        if high > low:
            shared.append(Extent(e.parameter, e.start + low, e.start + high, e.shard, e.offset + low))
    return tuple(shared)


def file_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank_{rank:05d}.safetensors"


def write(folder: Path, rank: int, state: StateShard) -> None:
    """Write one rank's file and, once it is safely on the disk, its length and checksum: rank_00000.json.

    Raises OSError if the disk is full; then nothing of this rank counts as written.
    """
    from safetensors.torch import save_file

    path = folder / file_name(rank)
    tensors, extents = _packed(state)
    # One entry only: safetensors writes several in random order, and the same state must give the same bytes.
    layout = {"extents": [astuple(e) for e in extents], "shapes": state.shapes, "scalars": state.scalars}
    header = {_LAYOUT: json.dumps(layout)}
    try:
        with new_file(path, durable=True) as unfinished:
            save_file(tensors, unfinished, metadata=header)
            with unfinished.open("rb") as stream:
                checksum = _crc32c(stream)
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own error for errors of the system
        raise OSError(errno_of(error), str(error), str(path)) from error
    written = {"bytes": path.stat().st_size, "crc32c": checksum}
    write_atomic(path.with_suffix(".json"), json.dumps(written) + "\n", durable=True)


def errno_of(error: Exception) -> int:
    """The errno in the text of safetensors' error, "... (os error 28)"; EIO if there is none."""
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else errno.EIO


def find_damage(folder: Path, num_files: int, *, read_all: bool) -> str | None:
    """A message about damaged files, or None. It compares lengths, and with `read_all` checksums."""
    for rank in range(num_files):
        path = folder / file_name(rank)
        try:
            damage = _damage_of(path, read_all=read_all)
        except InputProblems as error:
            damage = f"{path.name}: {error.problems[0].value}"
        except (OSError, ValueError, KeyError) as error:
            damage = f"{path.name}: {shown(error)}"
        if damage is not None:
            return damage
    return None


def _damage_of(path: Path, *, read_all: bool) -> str | None:
    """The same for one rank's file. Raises what reading it and its JSON file raise."""
    expected = read_json(path.with_suffix(".json"), "remove this checkpoint")
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes of {shown(expected['bytes'])}"
    if not read_all:
        return None
    with path.open("rb") as stream:
        is_whole = _crc32c(stream) == expected["crc32c"]
    return None if is_whole else f"{path.name} does not match its checksum"


class SavedState:
    """The state that `num_files` ranks wrote to a folder."""

    def __init__(self, folder: Path, num_files: int) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self._where: dict[str, list[tuple[Extent, int]]] = {}
        with reading(folder, "the state of a training", _ANOTHER):
            try:
                self._files = [safe_open(folder / file_name(rank), "pt") for rank in range(num_files)]
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            for number, file in enumerate(self._files):
                layout = _layout_of(file.metadata())
                sizes = _sizes(file)
                if number == 0:
                    self.shapes = {str(k): tuple(map(int, v)) for k, v in layout["shapes"].items()}
                    self.scalars: dict[str, float] = {str(k): float(v) for k, v in layout["scalars"].items()}
                    self.kinds = sorted({key.rpartition(".")[0] for key in sizes})
                for values in layout["extents"]:
                    extent = Extent(str(values[0]), *map(int, values[1:]))
                    self._refuse_outside(extent, sizes)
                    self._where.setdefault(extent.parameter, []).append((extent, number))

    def _refuse_outside(self, extent: Extent, sizes: Mapping[str, int]) -> None:
        """Raise ValueError for an extent outside its parameter or its file."""
        length = extent.stop - extent.start
        size = math.prod(self.shapes[extent.parameter])
        held = min(sizes.get(f"{kind}.{extent.shard}", -1) for kind in self.kinds)
        if not (0 <= extent.start < extent.stop <= size and 0 <= extent.offset <= held - length):
            raise ValueError(f"{extent} is outside of its file")

    def problems_for(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
        """Problems, key by key, of parameters that differ from those of a model, which then has another
        architecture."""
        problems = []
        for name in sorted(self.shapes.keys() | shapes.keys()):
            saved, wanted = self.shapes.get(name), shapes.get(name)
            if saved != wanted:
                value = f"{_shape(saved)} in the checkpoint, {_shape(wanted)} in the model"
                problems.append(Problem(str(self.folder), name, value, "use the config the run was started with"))
        return problems

    def fill(self, kind: str, extents: Iterable[Extent], shards: Sequence[Tensor]) -> None:
        """Copy the kind's values into flat tensors laid out by `extents`.

        Raises InputProblems if the files do not hold all of them.
        """
        for wanted in extents:
            filled = 0
            for saved, number in self._where.get(wanted.parameter, ()):
                low, high = max(saved.start, wanted.start), min(saved.stop, wanted.stop)
                if low >= high:
                    continue
                start = saved.offset + low - saved.start
                values = self._files[number].get_slice(f"{kind}.{saved.shard}")[start : start + high - low]
                at = wanted.offset + low - wanted.start
                shards[wanted.shard].view(-1)[at : at + high - low].copy_(values)
                filled += high - low
            if filled != wanted.stop - wanted.start:
                value = f"{filled} of {wanted.stop - wanted.start} elements of {kind}"
                raise problem(self.folder, wanted.parameter, value, _ANOTHER)

    def full(self, kind: str) -> dict[str, Tensor]:
        """All parameters of a kind: fp32 on the CPU."""
        parameters = {}
        for name, shape in self.shapes.items():
            held = sum(saved.stop - saved.start for saved, _ in self._where.get(name, ()))
            if held < math.prod(shape):  # before memory is allocated for it
                raise problem(self.folder, name, f"{held} of {math.prod(shape)} elements of {kind}", _ANOTHER)
            flat = torch.empty(math.prod(shape))
            self.fill(kind, [Extent(name, 0, flat.numel(), 0, 0)], [flat])
            parameters[name] = flat.view(shape)
        return parameters


def _packed(state: StateShard) -> tuple[dict[str, Tensor], list[Extent]]:
    """Tensors to write, and the extents in them: the shards themselves if this rank writes all of their elements, else
    only the elements it writes."""
    num_written = sum(e.stop - e.start for e in state.extents)
    sizes = [shard.numel() for shard in next(iter(state.shards.values()))]
    if num_written == sum(sizes):
        tensors = {f"{kind}.{i}": s.view(-1) for kind, shards in state.shards.items() for i, s in enumerate(shards)}
        return tensors, list(state.extents)
    packed, at = [], 0
    for e in state.extents:
        packed.append(Extent(e.parameter, e.start, e.stop, 0, at))
        at += e.stop - e.start
    tensors = {}
    for kind, shards in state.shards.items():
        pieces = [shards[e.shard].view(-1)[e.offset : e.offset + e.stop - e.start] for e in state.extents]
        tensors[f"{kind}.0"] = torch.cat(pieces) if pieces else torch.empty(0)
    return tensors, packed


def _layout_of(header: Mapping[str, str]) -> dict[str, Any]:
    """Extents, shapes and scalars; early versions wrote an entry for each."""
    if _LAYOUT in header:
        return dict(json.loads(header[_LAYOUT]))
    return {name: json.loads(header[name]) for name in ("extents", "shapes", "scalars")}


def _sizes(file: Any) -> dict[str, int]:
    """Elements of each flat tensor of a file."""
    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)
    if any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError("its tensors are not flat")
    return {key: int(shape[0]) for key, shape in shapes.items()}


def _crc32c(stream: Any) -> int:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    while piece := stream.read(_PIECE_BYTES):
        checksum.update(piece)
    return int.from_bytes(checksum.digest(), "big")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else "x".join(map(str, shape)) or "a number"
