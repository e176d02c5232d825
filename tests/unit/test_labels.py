"""Label tables: ids that files on disk rely on, and the organs that two tables share."""

from __future__ import annotations

import pytest

from data_shards.labels import AMOS, AMOS_TO_WHOLEBODY, LABEL_TABLES, MERGED, WHOLEBODY, LabelTable


def test_tables_by_name_and_size() -> None:
    assert {name: table.num_classes for name, table in LABEL_TABLES.items()} == {
        "amos": 17,
        "wholebody": 74,
        "merged": 74,
    }
    assert all(table.name == name for name, table in LABEL_TABLES.items())
    assert [len(table.organ_ids) for table in (AMOS, WHOLEBODY, MERGED)] == [15, 71, 71]
    assert [table.body_id for table in (AMOS, WHOLEBODY, MERGED)] == [16, 73, 73]


@pytest.mark.parametrize(
    ("class_id", "name"),
    [(1, "spleen"), (5, "liver"), (18, "intestine"), (19, "duodenum"), (20, "unused"), (21, "urinary_bladder"),
     (25, "aorta"), (36, "inferior_vena_cava"), (52, "spinal_cord"), (65, "subcutaneous_fat"), (72, "bone_other")],
)  # fmt: skip
def test_wholebody_keeps_totalvibes_ids(class_id: int, name: str) -> None:
    assert WHOLEBODY.names[class_id] == name


def test_an_unused_id_is_no_organ() -> None:
    assert 20 not in WHOLEBODY.organ_ids
    assert 20 not in MERGED.organ_ids
    assert not {0, 73} & set(WHOLEBODY.organ_ids)


def test_amos_organs_have_the_same_name_in_the_merged_table() -> None:
    assert [MERGED.names[i] for i in AMOS_TO_WHOLEBODY] == [name for name in AMOS.names if name != "body"]
    assert AMOS_TO_WHOLEBODY[:6] == (0, 1, 2, 3, 4, 15)
    assert AMOS_TO_WHOLEBODY[15] == 22


def test_merged_and_wholebody_differ_in_one_name_only() -> None:
    differing = [(a, b) for a, b in zip(WHOLEBODY.names, MERGED.names, strict=True) if a != b]
    assert differing == [("prostate", "prostate_uterus")]


@pytest.mark.parametrize(
    "names", [(), ("liver",), ("background", "liver", "liver"), ("background", *map(str, range(256)))]
)
def test_a_table_that_cannot_be_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="label table 'x'"):
        LabelTable("x", names)
