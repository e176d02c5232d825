"""Mix keys to groups of rows, and the messages on impossible mixes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from data_shards.feed.mixing import make_order, mix_groups, mix_problems, parse_mix
from data_shards.problems import InputProblems
from data_shards.records import AXES, MODALITIES


@dataclass
class TwoSets:
    """Set 0: 600 CT and 60 MR slices over three axes; set 1: 90 MR slices."""

    modality_N: np.ndarray
    axis_N: np.ndarray
    member_N: np.ndarray
    modalities: tuple[str, ...] = MODALITIES


@pytest.fixture
def shards() -> TwoSets:
    modality_N = np.repeat([0, 1, 1], [600, 60, 90]).astype(np.uint8)
    return TwoSets(
        modality_N, (np.arange(750) % 3).astype(np.uint8), np.repeat([0, 0, 1], [600, 60, 90]).astype(np.uint8)
    )


ALL = np.arange(750)


def said(shards: TwoSets, mix: dict[str, float], rows: np.ndarray = ALL) -> set[str]:
    """`key: value` of everything that is refused."""
    with pytest.raises(InputProblems) as refused:
        mix_groups(shards, rows, mix)
    return {f"{p.field.removeprefix('loader.mix.')}: {p.value}" for p in refused.value.problems}


def test_keys() -> None:
    groups, problems = parse_mix({"CT": 2, "1:MR/axial": 0.5, "0:*": 1, "*": 3}, modalities=MODALITIES)
    assert [(g.weight, g.set_index, g.modality, g.axis) for g in groups] == [
        (2, None, MODALITIES.index("CT"), None),
        (0.5, 1, MODALITIES.index("MR"), AXES.index("axial")),
        (1, 0, None, None),
        (3, None, None, None),
    ]
    assert not problems


def test_groups_hold_the_rows_of_their_keys(shards: TwoSets) -> None:
    mix = {"0:CT": 4, "0:MR/axial": 1, "0:MR/coronal": 1, "0:MR/sagittal": 1, "1:*": 3}
    groups, weights = mix_groups(shards, ALL, mix)
    assert list(weights) == [4, 1, 1, 1, 3]
    assert groups[0].tolist() == list(range(600))
    assert groups[2].tolist() == list(range(601, 660, 3))
    assert groups[4].tolist() == list(range(660, 750))


def test_rows_out_of_play_need_no_key(shards: TwoSets) -> None:
    groups, _ = mix_groups(shards, np.arange(650, 700), {"0:MR": 1, "1:MR": 2})
    assert [len(rows) for rows in groups] == [10, 40]


def test_the_order_has_the_proportions(shards: TwoSets) -> None:
    row_P = make_order(shards, ALL, {"CT": 0.5, "0:MR": 0.3, "1:MR": 0.2}, seed=3).rows_at(np.arange(1000))
    assert [((row_P >= low) & (row_P < high)).sum() for low, high in ((0, 600), (600, 660), (660, 750))] == [
        500,
        300,
        200,
    ]


def test_without_a_mix_an_epoch_is_every_row(shards: TwoSets) -> None:
    assert sorted(make_order(shards, ALL[::2], {}, seed=3).rows_at(np.arange(375))) == ALL[::2].tolist()


def test_everything_wrong_is_said_at_once(shards: TwoSets) -> None:
    mix = {"CT": 1, "PET": 1, "MR/oblique": 1, "2:MR": 1, "MR/axial": 0, "0:": 1, "CT/axial/x": 1, "1:MR": float("nan")}
    assert said(shards, mix) == {
        "PET: no modality 'PET'",
        "MR/oblique: no axis 'oblique'",
        "2:MR: no shard set 2",
        "MR/axial: 0",
        "0:: not a key",
        "CT/axial/x: not a key",
        "1:MR: nan",
        "1:MR: selects slices that MR/axial selects too",
    }
    # Without the sets any name may be one.
    assert len(mix_problems(mix)) == 5


def test_keys_that_overlap(shards: TwoSets) -> None:
    assert said(shards, {"CT": 1, "MR": 1, "1:*": 1}) == {
        f"1:*: selects slices that {key} selects too" for key in ("CT", "MR")
    }


def test_slices_without_a_key_are_counted(shards: TwoSets) -> None:
    with pytest.raises(InputProblems) as refused:
        mix_groups(shards, ALL, {"CT": 1, "0:MR": 1, "1:MR/axial": 1})
    assert [str(problem) for problem in refused.value.problems] == [
        f"config: loader.mix: 30 slices 1:MR/{axis} belong to no key; add 1:MR/{axis}, or leave them out with "
        "loader.modalities and loader.axes"
        for axis in ("coronal", "sagittal")
    ]


def test_a_key_without_slices(shards: TwoSets) -> None:
    assert said(shards, {"0:*": 1, "1:CT": 1, "1:MR": 1}) == {"1:CT: matches none of the used slices"}


def test_weights_too_far_apart(shards: TwoSets) -> None:
    assert said(shards, {"CT": 1, "MR": 1e-6}) == {
        "loader.mix: weights[1]: 1e-06 is less than 1/10000 of weights[0]: 1"
    }
