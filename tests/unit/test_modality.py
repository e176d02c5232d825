"""CT or MR: what is stated wins, AMOS' numbers count for AMOS' names, and doubt is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_shards.ingest.archive import find_problems, read_archive
from data_shards.ingest.modality import find_modalities
from data_shards.ingest.prepare_config import PrepareConfig


def _of(content: dict[str, Any], *case_ids: str, stated: str | None = None) -> dict[str, str] | str:
    """Modality by case, or what is refused."""
    found, _, problems = find_modalities("dataset.json", content, case_ids, stated)
    return "\n".join(map(str, problems)) if problems else found


CT_STATED = [{"0": "CT"}, "CT", ["CT"], {"0": "ct"}, {"0": "Computed Tomography"}, {"0": "CT (portal venous)"}]
MR_STATED = [{"0": "MRI"}, {"0": "MR"}, "mri", ["MR"], {"0": "MR", "1": "MRI"}]
OWN_STATED = [({"0": "T2w"}, "T2"), ({"0": "T2-SPIR"}, "T2"), ("T2 FLAIR", "FLAIR"), (["t1gd"], "T1ce"), ("pet", "PET"),
              ({"0": "CBCT"}, "CBCT"), ("T1w (native)", "T1"), ({"0": "T1_post"}, "T1ce"), ("T1 C+", "T1ce"),
              ("post-contrast T1w", "T1ce"), ("T1 without contrast", "T1"), ("T1 pre", "T1")]  # fmt: skip


@pytest.mark.parametrize("key", ["modality", "channel_names"])
@pytest.mark.parametrize(
    ("statement", "modality"), [*((one, "CT") for one in CT_STATED), *((one, "MR") for one in MR_STATED), *OWN_STATED]
)
def test_a_statement_counts_for_names_that_are_not_amos(key: str, statement: Any, modality: str) -> None:
    ids = ("s0512", "BRATS_012", "amos22_0001", "case_0001_0000", "patient-3")
    assert _of({key: statement}, *ids) == dict.fromkeys(ids, modality)


def test_amos_numbers_count_for_amos_names_whatever_else_its_file_says_of_ct() -> None:
    expected = {"amos_0001": "CT", "amos_0500": "CT", "amos_0501": "MR", "amos_0600": "MR"}
    for content in ({"modality": {"0": "CT"}}, {}, {"modality": {"0": "CT", "1": "MRI"}}, {"modality": "CT and MR"}):
        assert _of(content, *expected) == expected
    assert _of({"modality": {"0": "MRI"}}, "amos_0507") == {"amos_0507": "MR"}


def test_a_statement_against_amos_numbers_is_refused() -> None:
    message = _of({"modality": {"0": "MRI"}}, "amos_0001", "amos_0002", "amos_0507")
    assert "amos_0001, amos_0002 are CT" in message
    assert "--prepare.modality" in message


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"modality": None},
        {"modality": {}},
        {"modality": {"0": "CT", "1": "MR"}},
        {"modality": {"0": "T1", "1": "T2"}},
        {"modality": "PET/CT"},
        {"modality": []},
    ],
)
def test_names_of_ones_own_without_a_statement_are_refused(content: dict[str, Any]) -> None:
    assert "--prepare.modality" in _of(content, "s0512", "s0513", "BRATS_012", "liver_7", "liver_8")


@pytest.mark.parametrize("statement", ["zscore", "Foo", "T2*", 7, {"0": 3}, {"0": {"a": "CT"}}, [["CT"]], True, "CTX"])
def test_a_statement_that_is_not_understood_is_refused(statement: Any) -> None:
    message = _of({"modality": statement}, "amos_0001")
    assert "modality" in message
    assert _of({"modality": statement}, "s0512", stated="MR") == {"s0512": "MR"}


def test_the_setting_states_it_for_every_case_and_what_it_is_against_is_noted() -> None:
    assert _of({}, "s0512", stated="CT") == {"s0512": "CT"}
    found, notes, problems = find_modalities("", {"modality": {"0": "CT"}}, ["amos_0001"], "MR")
    assert (found, problems) == ({"amos_0001": "MR"}, [])
    assert "CT in dataset.json" in notes["amos_0001"][0]
    assert find_modalities("", {"modality": "MR"}, ["a1"], "MR")[1] == {"a1": ()}


def test_the_setting_cannot_make_amos_one_modality() -> None:
    """Who writes `modality` for `modalities` would have the MR of AMOS cut by the HU window."""
    message = _of({"modality": {"0": "CT"}}, "amos_0001", "amos_0507", stated="CT")
    assert "--prepare.modalities CT" in message


def _renamed(archive, old: str, new: str, folders: tuple[str, ...]) -> None:
    for folder in folders:
        (archive.root / folder / f"{old}.nii.gz").rename(archive.root / folder / f"{new}.nii.gz")
    text = (archive.root / "dataset.json").read_text()
    for folder in folders:
        text = text.replace(f"{folder}/{old}.nii.gz", f"{folder}/{new}.nii.gz")
    (archive.root / "dataset.json").write_text(text)


def test_nnunet_s_channel_is_no_part_of_a_case_s_name(archive) -> None:
    _renamed(archive, "amos_0501", "amos_0501_0000", ("imagesTr",))  # the label without it
    _renamed(archive, "amos_0502", "amos_0502_0000", ("imagesVa", "labelsVa"))
    _renamed(archive, "amos_0504", "amos_0504_0000", ("imagesTs", "labelsTs"))
    assert find_problems(archive.root) == []
    cases = {case.case_id: case for case in read_archive(archive.root)}
    for case_id in ("amos_0501", "amos_0502", "amos_0504"):
        assert cases[case_id].modality == "MR"
        assert cases[case_id].label is not None
        assert cases[case_id].label.is_file()


def test_channels_of_other_names_are_known_by_their_labels(archive) -> None:
    for old, new, folders in (
        ("amos_0001", "BRATS_001_0000", ("imagesTr",)),
        ("amos_0501", "BRATS_002_0000", ("imagesTr",)),
        ("amos_0003", "BRATS_003_0000", ("imagesTs",)),
        ("amos_0002", "s1_0000", ("imagesVa", "labelsVa")),  # its own number: the label has it too
    ):
        _renamed(archive, old, new, folders)
    for old, new in (("amos_0001", "BRATS_001"), ("amos_0501", "BRATS_002")):
        _renamed(archive, old, new, ("labelsTr",))
    archive.edit(lambda d: d.update(modality={"0": "MRI"}))
    assert find_problems(archive.root) == []
    cases = read_archive(archive.root)
    assert [case.case_id for case in cases] == [
        "BRATS_001",
        "BRATS_002",
        "BRATS_003",
        "amos_0502",
        "amos_0504",
        "s1_0000",
    ]
    assert {case.modality for case in cases} == {"MR"}


def test_a_second_channel_is_refused(archive) -> None:
    _renamed(archive, "amos_0504", "amos_0504_0001", ("imagesTs",))
    assert "channel 1 of amos_0504" in "\n".join(map(str, find_problems(archive.root)))


def test_a_file_of_nnunet_2_is_one_problem(archive) -> None:
    names = {"background": 0, "spleen": 1, "right kidney": 2}
    content = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 2, "file_ending": ".nii.gz"}
    (archive.root / "dataset.json").write_text(json.dumps(content))
    (found,) = find_problems(archive.root)
    assert "nnU-Net" in found.value
    assert "`training`" in found.value
    assert "id: name" in found.remedy


def test_labels_as_nnunet_2_writes_them_are_read_beside_the_lists(archive) -> None:
    archive.edit(lambda d: d.update(labels={"background": 0, "spleen": 1, "liver": 6}))
    assert find_problems(archive.root) == []
    archive.edit(lambda d: d.update(labels={"background": 0, "liver": 1}))
    assert "labels.1" in str(find_problems(archive.root)[0])


@pytest.mark.parametrize(
    "image",
    ["/etc/amos_0001.nii.gz", "../amos/imagesTr/amos_0001.nii.gz", "imagesTr/../../amos_0001.nii", "a\0/amos_0001.nii",
     "\ud800/amos_0001.nii", f"{'a' * 300}/amos_0001.nii", "imagesTr/amos_\u0660\u0661.nii.gz", "", "amos_0001/.."],
)  # fmt: skip
def test_an_entry_that_leads_elsewhere_is_refused(archive, image: str) -> None:
    archive.edit(lambda d: d["test"].append({"image": image}))
    (found,) = find_problems(archive.root)
    assert found.where.endswith("dataset.json")


def test_the_stated_modality_is_part_of_the_set_and_absent_where_it_is_not_stated() -> None:
    assert "modality" not in PrepareConfig().result_settings()
    assert PrepareConfig(modality="MR").result_settings()["modality"] == "MR"
    assert PrepareConfig(modality="P E T").problems()[0].field == "modality"


def test_an_odd_setting_is_refused_among_the_settings_alone(tmp_path: Path, archive) -> None:
    from data_shards.ingest.prepare import find_problems as all_problems

    found = all_problems(archive.root, tmp_path / "set", PrepareConfig(modality="same"))
    assert [one.field for one in found] == ["modality"]
