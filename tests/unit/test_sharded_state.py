"""Checkpoints of any layout are read into any other, and what is wrong with one is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.problems import InputProblems
from segdiff_dist.training import sharded_state
from segdiff_dist.training.sharded_state import Extent, SavedState, StateShard, share

SHAPES = {"a": (3, 5), "b": (7,), "c": (1,), "d": (2, 2, 2)}


def numel(name: str) -> int:
    return int(torch.Size(SHAPES[name]).numel())


def row_layout(rank: int, ranks: int) -> tuple[list[Extent], list[int]]:
    """All parameters in a row, padded and cut into equal parts: ZeRO 1 and 2."""
    total = sum(map(numel, SHAPES))
    size = -(-total // ranks) + 1
    extents, at = [], 0
    for name in SHAPES:
        low, high = max(at, rank * size), min(at + numel(name), (rank + 1) * size)
        if low < high:
            extents.append(Extent(name, low - at, high - at, 0, low - rank * size))
        at += numel(name)
    return extents, [size]


def piece_layout(rank: int, ranks: int) -> tuple[list[Extent], list[int]]:
    """Every parameter cut into as many pieces as there are ranks, in two groups: ZeRO 3."""
    extents, sizes = [], []
    for shard, group in enumerate((("a", "b"), ("c", "d"))):
        offset = 0
        for name in group:
            piece = -(-numel(name) // ranks)
            start, stop = min(rank * piece, numel(name)), min((rank + 1) * piece, numel(name))
            if start < stop:
                extents.append(Extent(name, start, stop, shard, offset))
            offset += piece
        sizes.append(offset)
    return extents, sizes


def shared_layout(rank: int, ranks: int) -> tuple[list[Extent], list[int]]:
    """Every rank holds all, and writes its share: ZeRO 0."""
    whole = [Extent(name, 0, numel(name), shard, 0) for shard, name in enumerate(SHAPES)]
    return list(share(whole, rank, ranks)), [numel(name) for name in SHAPES]


LAYOUTS = {"row": row_layout, "pieces": piece_layout, "shared": shared_layout}


def value(kind: int, name: str) -> torch.Tensor:
    return torch.arange(numel(name), dtype=torch.float32) + 100 * list(SHAPES).index(name) + 1000 * kind


def write_all(folder: Path, layout: str, ranks: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        extents, sizes = LAYOUTS[layout](rank, ranks)
        shards = {}
        for number, kind in enumerate(("online", "exp_avg")):
            shards[kind] = [torch.full((size,), float("nan")) for size in sizes]
            for e in extents:
                piece = value(number, e.parameter)[e.start : e.stop]
                shards[kind][e.shard][e.offset : e.offset + len(piece)] = piece
        sharded_state.write(folder, rank, StateShard(SHAPES, tuple(extents), shards, {"step": 7.0}))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9))
def test_any_layout_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, wrote: str, writers: int, reads: str, readers: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    write_all(folder, wrote, writers)
    assert sharded_state.find_damage(folder, writers, read_all=True) is None
    saved = SavedState(folder, writers)
    assert saved.scalars == {"step": 7.0}
    assert saved.kinds == ["exp_avg", "online"]
    assert saved.problems_for(SHAPES) == []
    for rank in range(readers):
        extents, sizes = LAYOUTS[reads](rank, readers)
        filled = [torch.full((size,), float("nan")) for size in sizes]
        saved.fill("exp_avg", extents, filled)
        for e in extents:
            found = filled[e.shard][e.offset : e.offset + e.stop - e.start]
            assert torch.equal(found, value(1, e.parameter)[e.start : e.stop])
    for name, whole in saved.full("online").items():
        assert torch.equal(whole, value(0, name).view(SHAPES[name]))


def test_another_architecture_is_named_key_by_key(tmp_path: Path) -> None:
    write_all(tmp_path, "row", 2)
    other = {**SHAPES, "b": (8,), "e": (4,)}
    del other["c"]
    found = {p.field: p.value for p in SavedState(tmp_path, 2).problems_for(other)}
    assert found == {
        "b": "7 in the checkpoint, 8 in the model",
        "c": "1 in the checkpoint, nothing in the model",
        "e": "nothing in the checkpoint, 4 in the model",
    }


def test_a_file_that_is_not_there_leaves_a_hole(tmp_path: Path) -> None:
    write_all(tmp_path, "row", 3)
    assert "rank_00003" in str(sharded_state.find_damage(tmp_path, 4, read_all=False))
    with pytest.raises(InputProblems, match="of 15 elements of online"):
        SavedState(tmp_path, 1).full("online")


def test_a_flipped_byte_is_found_by_checksum_and_a_cut_by_length(tmp_path: Path) -> None:
    write_all(tmp_path, "pieces", 2)
    file = tmp_path / sharded_state.file_name(1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert sharded_state.find_damage(tmp_path, 2, read_all=False) is None
    assert "checksum" in str(sharded_state.find_damage(tmp_path, 2, read_all=True))
    file.write_bytes(content[:-4])
    assert "bytes of" in str(sharded_state.find_damage(tmp_path, 2, read_all=False))
