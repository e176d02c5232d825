"""The training state in files that any number of ranks and any ZeRO stage can read, whoever wrote them.

Every kind of state (weights, Adam's moments, averages) is as large as the model, and each rank holds pieces of it in a
few flat tensors, its shards. An Extent says which elements of which parameter lie where in them. A rank writes its
shards to one safetensors file with its extents in the header; a reader fills its own extents from whatever files hold
them. Safetensors hold numbers only, so a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.problems import Problem, problem

# Read and checked in pieces of this size.
_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Extent:
    """Elements start..stop of a flattened parameter lie at `offset` of the rank's `shard`-th flat tensor."""

    parameter: str
    start: int
    stop: int
    shard: int
    offset: int


@dataclass(frozen=True)
class ShardOfState:
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


def write(folder: Path, rank: int, state: ShardOfState) -> None:
    """Write one rank's file and, once it is safely on the disk, what to check it by: rank_00000.json.

    Raises OSError where the disk is full; nothing of this rank then counts as written.
    """
    from safetensors.torch import save_file

    path = folder / file_name(rank)
    unfinished = path.with_suffix(".unfinished")
    tensors, extents = _packed(state)
    header = {
        "extents": json.dumps([astuple(e) for e in extents]),
        "shapes": json.dumps(state.shapes),
        "scalars": json.dumps(state.scalars),
    }
    try:
        save_file(tensors, unfinished, metadata=header)
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
            checksum = _crc32c(stream)
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    except Exception as error:  # safetensors gives its own error for what the system refused
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from error
    written = {"bytes": path.stat().st_size, "crc32c": checksum}
    write_durably(path.with_suffix(".json"), json.dumps(written) + "\n")


def write_durably(path: Path, text: str) -> None:
    """Write beside `path`, wait for the disk and rename: even after a power cut all of it is there, or what was before.

    Raises OSError where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems sync files alone
            os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(folder: Path, num_files: int, *, read_all: bool) -> str | None:
    """What is wrong with a checkpoint's files, in words, or None. Lengths alone unless `read_all`, which also compares
    checksums."""
    for rank in range(num_files):
        path = folder / file_name(rank)
        try:
            expected = json.loads(path.with_suffix(".json").read_text())
            found = path.stat().st_size
            if found != expected["bytes"]:
                return f"{path.name} has {found} bytes of {expected['bytes']}"
            if read_all:
                with path.open("rb") as stream:
                    if _crc32c(stream) != expected["crc32c"]:
                        return f"{path.name} does not match its checksum"
        except (OSError, ValueError, KeyError) as error:
            return f"{path.name}: {error}"
    return None


class SavedState:
    """The state that `num_files` ranks wrote to a folder."""

    def __init__(self, folder: Path, num_files: int) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._files = [safe_open(folder / file_name(rank), "pt") for rank in range(num_files)]
        self._where: dict[str, list[tuple[Extent, int]]] = {}
        for number, file in enumerate(self._files):
            header = file.metadata()
            for values in json.loads(header["extents"]):
                extent = Extent(*values)
                self._where.setdefault(extent.parameter, []).append((extent, number))
            if number == 0:
                self.shapes = {k: tuple(v) for k, v in json.loads(header["shapes"]).items()}
                self.scalars: dict[str, float] = json.loads(header["scalars"])
                self.kinds = sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118 (no mapping)

    def problems_for(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
        """How the parameters differ from those of a model: another architecture, key by key."""
        found = []
        for name in sorted(self.shapes.keys() | shapes.keys()):
            saved, wanted = self.shapes.get(name), shapes.get(name)
            if saved != wanted:
                value = f"{_shape(saved)} in the checkpoint, {_shape(wanted)} in the model"
                found.append(Problem(str(self.folder), name, value, "use the config the run was started with"))
        return found

    def fill(self, kind: str, extents: Iterable[Extent], shards: Sequence[Tensor]) -> None:
        """Copy the kind's values into flat tensors laid out by `extents`.

        Raises InputProblems where the files do not hold all of them.
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
                raise problem(self.folder, wanted.parameter, value, "use another checkpoint")

    def full(self, kind: str) -> dict[str, Tensor]:
        """Every parameter of a kind, whole: fp32 on the CPU."""
        whole = {}
        for name, shape in self.shapes.items():
            flat = torch.empty(math.prod(shape))
            self.fill(kind, [Extent(name, 0, flat.numel(), 0, 0)], [flat])
            whole[name] = flat.view(shape)
        return whole


def _packed(state: ShardOfState) -> tuple[dict[str, Tensor], list[Extent]]:
    """Tensors to write, and extents in them: the shards as they are where all of their elements are this rank's to
    write, and only those elements otherwise."""
    whole = sum(e.stop - e.start for e in state.extents)
    sizes = [shard.numel() for shard in next(iter(state.shards.values()))]
    if whole == sum(sizes):
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


def _crc32c(stream: Any) -> int:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    while piece := stream.read(_PIECE_BYTES):
        checksum.update(piece)
    return int.from_bytes(checksum.digest(), "big")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else "x".join(map(str, shape)) or "a number"
