"""Classes that the data name, tables of one's own, and splits that are drawn by patient."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts_support import (
    CONFIG,
    LIVER,
    SPLEEN,
    edit,
    save,
    slices,
    volumes,
    write_amos,
    write_folder,
    write_nnunet,
    write_set,
)
from tests_support import bytes_of

from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.cases import Case
from data_shards.ingest.label_tables import find_labelling
from data_shards.ingest.prepare import PrepareConfig, check, find_problems
from data_shards.ingest.splits import patient_notes, with_splits
from data_shards.labels import AMOS, MERGED
from data_shards.records import SliceRecord
from data_shards.store.contact_sheet import class_colours
from data_shards.store.shards import ShardSet


@pytest.fixture(scope="module")
def of_amos(tmp_path_factory: pytest.TempPathFactory) -> list[SliceRecord]:
    root = tmp_path_factory.mktemp("amos") / "data"
    return slices(root, **write_amos(root))


def test_classes_that_the_data_name_are_the_set_s_table(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "Dataset007_Mine")
    preparation = check(tmp_path / "Dataset007_Mine", tmp_path / "set", replace(CONFIG, channel=1, fold=1))
    labelling = preparation.survey.labelling
    assert labelling.table.names == ("background", "Liver", "spleen", "body")
    records = slices(tmp_path / "Dataset007_Mine", channel=1, fold=1)
    assert {i for one in records for i in one.meta.labels_present} == {1, 2, 3}
    assert preparation.header["preprocessing"]["label_set"] == labelling.table.name


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("names: [a]", "content"),  # no name
        ("name: t\nnames: [a, a]", "names"),
        ("name: t\nnames: {-1: a}", "names"),
        ("name: t\nnames: {0: a, 1: b}", "names"),
        ("name: t\nnames: [a]\nlabel_map: {99999999999: a}", "names"),
        ("name: t\nnames: [a]\ncolour: red", "colour"),
        ("name: t\nnames: [a]\ncolours: {b: 'ff0000'}", "colours"),
        ("name: t\nnames: [a]\ncolours: {a: red}", "colours.a"),
        ("name: t\nnames: [a]\ncolours: {a: 112233}", "colours.a"),  # YAML's number
        ("name: t\nnames: [a]\ncolours: {a: #e5383b\n}", "colours.a"),  # YAML's comment
        ("name: t\nnames: [a]", "label_map"),  # nothing for liver and spleen
    ],
)
def test_a_table_that_cannot_be_used_is_refused(content: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(content)
    _, found = find_labelling("amos", str(tmp_path / "t.yaml"), {0: "background", 1: "liver", 2: "spleen"})
    assert [one.field for one in found] == [field]


def test_data_whose_classes_nobody_names_are_refused(tmp_path: Path) -> None:
    """Before work starts, and so is what nobody says the modality of."""
    settings = write_folder(".nii.gz")(tmp_path / "data")
    for labels, fields in ((settings["labels"], []), (None, ["names"]), ("amos", ["names"])):
        config = replace(CONFIG, modality="CT", labels=labels)
        assert [one.field for one in find_problems(tmp_path / "data", tmp_path / "set", config)] == fields
    config = replace(CONFIG, labels=settings["labels"])
    (found,) = find_problems(tmp_path / "data", tmp_path / "set", config)
    assert (found.field, "is not stated" in found.value) == ("modality", True)


@pytest.mark.parametrize(
    ("labels", "table"),
    [
        ({"background": 0, "whole": [1, 2], "core": [2]}, "names: {1: rim, 2: core}"),
        ({"background": 0, "rim": 1, "ignore": 2}, "names: [rim, core]\nlabel_map: {ignore: core}"),
    ],
)
def test_a_table_says_what_regions_and_ignore_are(labels: dict[str, Any], table: str, tmp_path: Path) -> None:
    write_nnunet(tmp_path / "data")
    edit(tmp_path / "data", labels=labels)
    (tmp_path / "t.yaml").write_text(f"name: parts\n{table}\n")
    records = slices(tmp_path / "data", channel=1, fold=1, labels=str(tmp_path / "t.yaml"))
    assert {i for one in records for i in one.meta.labels_present} == {1, 2, 3}


def test_sets_of_the_same_classes_have_the_same_table() -> None:
    tables = [find_labelling("amos", None, names)[0].table for names in ({0: "bg", 1: "a"}, {3: "a"}, {1: "b"})]
    assert tables[0] == tables[1]
    assert tables[0].name != tables[2].name


def test_a_table_of_one_s_own_counts_for_amos_organs_too(tmp_path: Path, of_amos: list[SliceRecord]) -> None:
    """And another table asks for another set."""
    write_amos(tmp_path / "data")
    file = tmp_path / "large.yaml"
    others = ", ".join(f"{name}: background" for name in AMOS.names[1:-1] if name not in ("liver", "spleen"))
    file.write_text(f"name: large\nnames: [trunk]\nlabel_map: {{liver: trunk, spleen: trunk, {others}}}\n")
    for ours, theirs in zip(slices(tmp_path / "data", labels=str(file)), of_amos, strict=True):
        np.testing.assert_array_equal(ours.mask_HW == 1, np.isin(theirs.mask_HW, (LIVER, SPLEEN)))
    file.write_text("name: large\nnames: [trunk]\nlabel_map: {liver: trunk, heart: background, 2: lung}\n")
    found = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, labels=str(file)))
    assert [(one.field, one.value) for one in found] == [("label_map.2", "lung")]


def test_a_label_map_puts_classes_together(tmp_path: Path, of_amos: list[SliceRecord]) -> None:
    write_nnunet(tmp_path / "data")
    (tmp_path / "large.yaml").write_text("name: large\nnames: [trunk]\nlabel_map: {liver: trunk, 2: trunk}\n")
    records = slices(tmp_path / "data", channel=1, fold=1, labels=str(tmp_path / "large.yaml"))
    for ours, theirs in zip(records, of_amos, strict=True):
        np.testing.assert_array_equal(ours.mask_HW == 1, np.isin(theirs.mask_HW, (LIVER, SPLEEN)))


def test_cases_without_labels_go_in_where_masks_come_from_a_whole_body_tool(tmp_path: Path) -> None:
    """And the experts' classes, by AMOS' names, are laid over those masks."""
    write_nnunet(tmp_path / "data")
    (tmp_path / "data/labelsTr/p1_1.nii.gz").unlink()
    for case, _, _, label in volumes():
        save(tmp_path / f"masks/{case}.nii.gz", np.where(label == SPLEEN, 25, 0).astype(np.uint8))  # an aorta
    settings = {"channel": 1, "fold": 1, "label_set": "merged", "labels": "amos"}
    found = find_problems(tmp_path / "data", tmp_path / "set", PrepareConfig(**{**vars(CONFIG), **settings}))
    assert [one.field for one in found] == ["wholebody"]
    preparation = check(tmp_path / "data", tmp_path / "set", replace(CONFIG, **settings), tmp_path / "masks")
    sources, present = {}, set[int]()
    for case in preparation.cases:
        masks = tmp_path / "masks"
        for record in slices_of(case, preparation.config, masks, [], preparation.survey.labelling):
            sources[case.case_id] = record.meta.mask_source
            present |= set(record.meta.labels_present)
    assert sources == {"p1_1": "wholebody", "p1_2": "merged", "p2_1": "merged", "p3_1": "merged"}
    assert {MERGED.names[i] for i in present} == {"spleen", "liver", "aorta", "body"}


def test_patients_are_drawn_whole_and_the_same_each_time() -> None:
    cases = [Case(f"p{n // 2}_{n}", "CT", "", Path(), Path(), patient=f"p{n // 2}") for n in range(40)]
    drawn = with_splits(cases, (0.7, 0.1, 0.2), 3)
    assert drawn == with_splits(cases, (0.7, 0.1, 0.2), 3) != with_splits(cases, (0.7, 0.1, 0.2), 4)
    split_of = {case.patient: case.split for case in drawn}
    assert all(split_of[case.patient] == case.split for case in drawn)
    assert [sum(s == split for s in split_of.values()) for split in ("train", "val", "test")] == [14, 2, 4]


def test_a_stated_split_stays_and_others_are_drawn_around_it() -> None:
    cases = [Case(f"c{n}", "CT", "test" if n == 0 else "", Path(), Path()) for n in range(9)]
    splits = [case.split for case in with_splits(cases, None, 0)]
    assert splits[0] == "test"
    assert splits.count("test") == 1
    assert splits.count("val") == 1


def test_test_cases_without_labels_are_no_test_split_of_masks() -> None:
    """imagesTs of nnU-Net and MSD: patients with labels are drawn for it too."""
    cases = [Case(f"c{n}", "CT", "test" if n < 2 else "", Path(), None if n < 2 else Path()) for n in range(12)]
    drawn = with_splits(cases, None, 0)
    assert [case.split for case in drawn[:2]] == ["test", "test"]
    assert [sum(case.split == split for case in drawn[2:]) for split in ("train", "val", "test")] == [7, 1, 2]
    assert {case.split for case in with_splits(cases, None, 0, by_tool=True)[2:]} == {"train", "val"}


def test_a_patient_pattern_keeps_scans_together(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "data")
    (tmp_path / "data" / "splits_final.json").unlink()
    config = replace(CONFIG, channel=1, patient="(p[0-9]+)_", split=(0.5, 0.25, 0.25))
    cases = check(tmp_path / "data", tmp_path / "set", config).cases
    assert {case.patient for case in cases} == {"p1", "p2", "p3"}
    assert len({case.split for case in cases if case.patient == "p1"}) == 1


COLOURED = "name: mine\nnames: [liver, spleen]\ncolours: {spleen: '#0000ff', body: 8899AA}\n"


def test_colours_of_a_table_are_those_of_pictures_and_travel_with_the_set(tmp_path: Path) -> None:
    """Sets with and without them go together, and differ in nothing else."""
    write_nnunet(tmp_path / "data")
    settings, sets = {"channel": 1, "fold": 1}, {}
    for name, content in (("plain", COLOURED.split("colours")[0]), ("coloured", COLOURED)):
        (tmp_path / f"{name}.yaml").write_text(content)
        sets[name] = write_set(tmp_path / "data", tmp_path / name, labels=str(tmp_path / f"{name}.yaml"), **settings)
    plain, coloured = (ShardSet.open(sets[name]) for name in ("plain", "coloured"))
    assert "colours" not in plain.index["label_table"]
    assert "label_colours" not in plain.index["preprocessing"]
    assert coloured.label_table.colours == (None, None, "0000ff", "8899aa")
    ours, theirs = class_colours(coloured.label_table).tolist(), class_colours(plain.label_table).tolist()
    assert ours == [theirs[0], theirs[1], [0, 0, 255], [0x88, 0x99, 0xAA]]
    assert len(ShardSet.open([sets["plain"], sets["coloured"]])) == 2 * len(plain)
    different = {
        name for name, content in bytes_of(sets["plain"]).items() if content != bytes_of(sets["coloured"])[name]
    }
    assert different == {"index.json"}


def test_classes_of_one_colour_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("name: t\nnames: [liver, spleen]\ncolours: {liver: 'ff0000', spleen: '#FF0000'}\n")
    labelling, problems = find_labelling("amos", str(file), {1: "liver", 2: "spleen"})
    assert not problems
    assert "t.yaml: colours: liver, spleen look alike" in labelling.notes[0]


def test_a_table_of_a_thousand_equal_names_is_refused_in_a_few_lines(tmp_path: Path) -> None:
    (file := tmp_path / "table.yaml").write_text(f"name: x\nnames: {['0'] * 1000}\n")
    _, problems = find_labelling("amos", str(file), None)
    assert 0 < len(problems) < 10


def _parted(*names: str) -> list[Case]:
    cases = [Case(name, "CT", "", Path(), Path()) for name in names]
    return list(with_splits(cases, (0.4, 0.3, 0.3), 0))


def test_scans_that_may_be_of_one_patient_are_said() -> None:
    """By their names, if nothing says the patient; a name that all cases have is that of the data set."""
    (note,) = patient_notes(_parted("p1_1", "p1_2", "p1_3", "p2_1", "p2_2", "p2_3"))
    assert "--prepare.patient '(.+)[_-]' keeps them in one split" in note
    (note,) = patient_notes(_parted(*(f"{name}_2019-0{month}-01" for name in "ab" for month in range(1, 7))))
    assert re.match(note.split("'")[1], "a_2019-04-01")[1] == "a"  # type: ignore[index]
    assert not patient_notes(_parted(*(f"liver_{n}" for n in range(9))))
    assert not patient_notes([replace(case, patient=case.case_id) for case in _parted("p1_1", "p1_2", "p2_1", "p2_2")])


def test_a_pattern_that_fits_no_case_is_refused(tmp_path: Path) -> None:
    write_amos(tmp_path / "data")
    config = replace(CONFIG, patient="(s[0-9]+)_")
    (problem,) = find_problems(tmp_path / "data", tmp_path / "set", config)
    assert "fits no case id, as p1_1" in problem.value
    (problem,) = find_problems(tmp_path / "data", tmp_path / "set", replace(CONFIG, patient="(p)"))
    assert problem.value == "test and train and val"
