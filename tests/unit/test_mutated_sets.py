"""Shard sets, configurations and unfinished work of strangers: readers give values, or InputProblems with a remedy."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from mutations_support import changed_bytes, changed_json
from tests_support import write_shapes

from data_shards.ingest.partials import stamp_of, summarise, write_partial
from data_shards.problems import InputProblems
from data_shards.store.codecs import decode_into, encode
from data_shards.store.inspect import inspect_shards
from data_shards.store.set_index import parse_index
from data_shards.store.shards import ShardSet
from segdiff_dist.cli import main
from segdiff_dist.config import read_yaml, validate
from segdiff_dist.experiment import Experiment, load_experiment


@pytest.fixture(scope="module")
def shapes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("mutated") / "set", num_patients=2, slices=2)


def test_indexes(shapes_set: Path, tmp_path: Path) -> None:
    rng, good = random.Random(0), (shapes_set / "index.json").read_bytes()
    values, refused = json.loads(good), []
    assert parse_index(good, "index.json") == values
    for number in range(400):
        content = changed_json(values, rng) if number % 3 else changed_bytes(good, rng)
        try:
            parse_index(content, "index.json")
        except InputProblems as error:
            refused.append(error)
    assert len(refused) > 200
    assert {one.where for error in refused for one in error.problems} == {"index.json"}


def test_sets_with_another_index_are_opened_and_counted_or_refused(shapes_set: Path) -> None:
    file = shapes_set / "index.json"
    rng, good = random.Random(1), file.read_bytes()
    values = json.loads(good)
    try:
        for _ in range(150):
            file.write_bytes(changed_json(values, rng))
            with suppress(InputProblems):
                shards = ShardSet.open(shapes_set)
                assert (len(shards), shards.bits in (8, 16), shards.size <= 4096) == (24, True, True)
                assert shards.label_table.num_classes <= 256
                with suppress(ValueError):  # a sample that is not what was written
                    shards.read(0)
                inspect_shards(shapes_set)
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("size", [0, -1, 300_000, 2**40, 32.0, "32", None, True])
def test_absurd_sizes_are_refused(shapes_set: Path, size: object) -> None:
    index = json.loads((shapes_set / "index.json").read_bytes())
    index["preprocessing"]["size"] = size
    with pytest.raises(InputProblems, match=r"index\.json: content: not a shard set's index \(preprocessing\.size"):
        parse_index(json.dumps(index).encode(), "index.json")


@pytest.mark.parametrize("name", ["x" * 10**6, "a\nb", "\x1b[31m", ["liver"], None, "background"])
def test_label_tables_with_absurd_names_are_refused(shapes_set: Path, name: object) -> None:
    index = json.loads((shapes_set / "index.json").read_bytes())
    index["label_table"]["names"][1] = name
    with pytest.raises(InputProblems, match=r"index\.json: content: not a shard set's index") as caught:
        parse_index(json.dumps(index).encode(), "index.json")
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("codec", ["zstd", "png", "jpeg2000"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_payloads(codec: str, dtype: type) -> None:
    rng = random.Random(2)
    pixels_HW = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (16, 16)).astype(dtype)
    good, out_HW = encode(pixels_HW, codec), np.empty_like(pixels_HW)
    decode_into(good, codec, out_HW)
    np.testing.assert_array_equal(out_HW, pixels_HW)
    for _ in range(300):
        with suppress(ValueError):
            decode_into(changed_bytes(good, rng), codec, out_HW)


@pytest.mark.parametrize("kind", ["structure", "bytes"])
def test_configurations(tmp_path: Path, kind: str) -> None:
    rng, file = random.Random(3), tmp_path / "config.yaml"
    good = yaml.safe_load((Path(__file__).parents[2] / "launch/configs/smoke.yaml").read_text())
    for _ in range(120):
        content = changed_json(good, rng)
        file.write_bytes(content if kind == "structure" else changed_bytes(content, rng))
        try:
            load_experiment(file, None)
        except InputProblems as error:
            assert max(len(str(found)) for found in error.problems) < 4_000  # noqa: PT017


def test_a_text_of_megabytes_is_not_printed_whole() -> None:
    with pytest.raises(InputProblems) as caught:
        validate(Experiment, {"train": {"lr": "x" * 10**7}, "y" * 10**7: 1}, "config.yaml")
    assert len(str(caught.value)) < 10_000


def test_billion_laughs(tmp_path: Path) -> None:
    (file := tmp_path / "config.yaml").write_text(
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    )
    with pytest.raises(InputProblems, match=r"config\.yaml: content: .*is an alias; write out .* \(line 2"):
        read_yaml(file)


def test_damaged_parts_of_an_unfinished_set_are_made_again(shapes_set: Path, tmp_path: Path) -> None:
    meta = ShardSet.open(shapes_set).meta(0)
    write_partial(tmp_path / "a", [(meta, {"image": b"abc", "mask": b"d"})], "stamp")
    file, rng = tmp_path / "a.json", random.Random(4)
    good = file.read_bytes()
    assert stamp_of(tmp_path / "a") == "stamp"
    for number in range(200):
        file.write_bytes(changed_json(json.loads(good), rng) if number % 2 else changed_bytes(good, rng))
        if stamp_of(tmp_path / "a") is not None:
            summarise(tmp_path / "a")


def test_a_set_whose_pixels_are_of_another_size_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shapes(tmp_path / "set", num_patients=1, slices=1, held_out=0, size=16)
    index = json.loads((folder / "index.json").read_text())
    index["preprocessing"]["size"] = 8
    (folder / "index.json").write_text(json.dumps(index))
    assert main(["inspect", str(folder)]) == 1
    assert "mask: 256 bytes of pixels, 64 expected; verify the set with" in capsys.readouterr().err


def test_a_net_that_no_machine_can_build_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "config.yaml").write_text(
        f"denoiser: {{block_out_channels: [{2**63}], layers_per_block: 9999}}"
    )
    assert main(["train", "--config", str(file), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "denoiser.block_out_channels" in said
    assert "denoiser.layers_per_block: 9999; give a whole number from 1 to 64" in said
