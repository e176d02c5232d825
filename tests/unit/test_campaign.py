"""The campaign of docs/reliability.md: a short draw of its damage, and whether it would notice a fault."""

from __future__ import annotations

import gc
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from campaign import record, tour
from campaign.__main__ import main
from campaign.attempts import FAULTS, Watched, made_input, run_attempts
from campaign.inputs import Kind, kinds
from campaign.kills import differences

# Others are drawn by `make campaign`: their readers have tests of damage of their own, or load large libraries.
DRAWN = ("nifti", "nifti-gz", "dataset.json", "tar", "zarr", "index.json", "table.yaml", "png")


@pytest.fixture(scope="module")
def _readers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What reads has been imported before processes are forked to read."""
    for name in ("nifti", "tar"):
        folder = tmp_path_factory.mktemp(name)
        kinds()[name].make(folder)
        kinds()[name].read(folder)


@pytest.mark.usefixtures("_readers")
@pytest.mark.parametrize("name", DRAWN)
def test_damage_is_refused_in_words_or_changes_nothing(name: str, tmp_path: Path) -> None:
    outcomes = Counter()
    for number, outcome, words in run_attempts(kinds()[name], tmp_path, 7, range(15)):
        assert outcome not in FAULTS, f"{name} {number}: {words}"
        outcomes[outcome] += 1
    assert outcomes["refused"] > 3


def write(folder: Path) -> None:
    (folder / "file").write_bytes(bytes(range(256)))


def read(folder: Path, fault: str) -> str:
    content = (folder / "file").read_bytes()
    if content == bytes(range(256)):
        return "good"
    if fault == "hung":
        time.sleep(60)
    if fault == "swollen":
        gc.collect()  # as may happen at any time
        return str(len(bytearray(2**30)))
    if fault == "unclean":
        return {}[content]  # type: ignore[index]
    return "other"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    kind = Kind("file", write, ("file",), partial(read, fault=fault), has_checksums=True)
    garbage: list[object] = [bytearray(2**30 if fault == "swollen" else 1)]
    garbage.append(garbage)  # only the collector frees it; tests before this one may have left such a thing
    del garbage
    watched = Watched(kind, made_input(kind, tmp_path), tmp_path / "copy", 0)
    try:
        most_s = 0.5 if fault == "hung" else 20.0
        outcome, words = watched.outcome(0, most_s)
        assert (outcome, bool(words)) == (fault, True)
        assert watched.outcome(1, most_s)[0] == fault  # the process that read, or another, goes on
    finally:
        watched.end()


def test_a_campaign_continues_where_it_was_and_counts_all(tmp_path: Path) -> None:
    file = tmp_path / "record" / "mutations.jsonl"
    for first in (0, 50):
        record.append(file, {"kind": "tar", "seed": 0, "first": first, "tried": 50, "counts": {"refused": 50}})
    with file.open("a") as stream:
        stream.write('{"kind": "tar", "se')  # killed as it wrote
    assert record.done(file, seed=0) == {"tar": 100}
    assert record.done(file, seed=1) == {}
    assert "| tar | 100 | 100 | 0 |" in record.table_of_mutations(record.lines(file))


def test_a_record_is_of_one_version_of_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, line = tmp_path / "new", {"kind": "tar", "seed": 0}
    record.keep_to_code(out)
    record.append(out / "mutations.jsonl", line)
    record.keep_to_code(out)
    (out / "code.json").write_text('{"commit": "abc", "sources": "other"}')
    with pytest.raises(record.OtherCode, match=r"is of abc .*, and this is .*: give another --out"):
        record.append(out / "mutations.jsonl", line)  # the code was changed during the work
    assert list(record.lines(out / "mutations.jsonl")) == [line]
    assert main(["kills", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    (out / "code.json").unlink()  # a record of before there were such files
    with pytest.raises(record.OtherCode, match="an unknown commit"):
        record.keep_to_code(out)


def test_a_line_of_the_tour_works_or_is_reported(tmp_path: Path) -> None:
    assert len(tour.lines()) > 10
    assert tour.run_line("segdiff --version", tmp_path)["outcome"] == "works"
    failed = tour.run_line("segdiff inspect nowhere", tmp_path)
    assert failed["outcome"] == "exit code 2"
    assert "nowhere" in failed["what"]
    assert tour.run_line("segdiff doctor", tmp_path, most_s=0.1)["outcome"] == "too long"


def test_what_a_kill_left_is_compared_byte_by_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        for file in ("same", "other", "log.jsonl"):
            (tmp_path / name / "run" / file).write_text("x")
    (tmp_path / "b/run/other").write_text("y")
    (tmp_path / "b/run/log.jsonl").write_text("a second later")
    (tmp_path / "b/run/more").touch()
    assert differences(tmp_path / "a", tmp_path / "b") == ["run/more", "run/other"]
