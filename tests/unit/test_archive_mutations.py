"""Archives that somebody spoilt, by the hundred: each is refused in words, costs its volume, or is read."""

from __future__ import annotations

import gzip
import json
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.ingest.archive import find_problems, read_archive
from data_shards.ingest.case_slices import slices_of
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.volumes import UnreadableVolume

CONFIG = PrepareConfig(size=16, slice_stride=9)
NIFTI = ("imagesTr/amos_0001", "labelsTr/amos_0001", "imagesTr/amos_0501")
ODD = [
    None,
    True,
    0,
    -1,
    1e308,
    10**400,
    "",
    "CT",
    "x" * 5000,
    "\0",
    "../../etc/passwd",
    [],
    {},
    [[]],
    {"0": {"1": []}},
    "\ud800",
]
NUMBERS = (0.0, -1.0, 1e-30, 0.04, 1e4, 1e12, 3e38, -3e38, float("nan"), float("inf"))
# Byte and type of fields of a NIfTI-1 header (nifti1.h): what the reader makes sizes, places and values of.
FIELDS = {
    "h": (40, 42, 44, 46, 48, 70, 72, 252, 254),
    "f": (76, 80, 84, 88, 108, 112, 116, 256, 260, 264, 268, 280, 284, 288, 292, 300, 320),
    "B": (123,),
    "i": (0,),
}


def _outcome(root: Path) -> str:
    """refused, unreadable or read. Anything else than these is a fault of ours and goes through."""
    found = find_problems(root)
    if found:
        assert all(one.where and one.field and one.remedy for one in found)
        assert len("\n".join(map(str, found))) < 50_000
        return "refused"
    outcome = "read"
    for case in read_archive(root):
        if case.case_id in ("amos_0001", "amos_0501"):
            try:
                for _ in slices_of(case, CONFIG, None):
                    pass
            except UnreadableVolume:
                outcome = "unreadable"
    return outcome


def _spoilt_nifti(rng: np.random.Generator, plain: bytes) -> bytes:
    """The file's bytes, changed; packed or not."""
    raw = bytearray(plain)
    kind = rng.integers(6)
    if kind == 0:  # a field
        layout = str(rng.choice(list(FIELDS)))
        at = int(rng.choice(FIELDS[layout]))
        value: Any = int(rng.integers(-(2**15), 2**15)) if layout == "h" else int(rng.integers(256))
        struct.pack_into("<" + layout, raw, at, float(rng.choice(NUMBERS)) if layout == "f" else value)
    elif kind == 1:  # several bytes of the header
        for at in rng.integers(0, 352, 4):
            raw[at] = int(rng.integers(256))
    elif kind == 2:  # cut off
        del raw[int(rng.integers(len(raw))) :]
    elif kind == 3:  # bytes in between
        at = int(rng.integers(len(raw)))
        raw[at:at] = rng.bytes(int(rng.integers(1, 400)))
    elif kind == 4:  # a bit anywhere
        raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    else:  # something else
        raw = bytearray(rng.bytes(int(rng.integers(0, 500))))
    packed = gzip.compress(bytes(raw), 1)
    if rng.integers(4) == 0:  # the packed bytes too
        spoilt = bytearray(packed)
        spoilt[int(rng.integers(len(spoilt)))] ^= 1 << int(rng.integers(8))
        return bytes(spoilt)
    return packed if rng.integers(2) else bytes(raw)


@pytest.mark.parametrize("seed", range(3))
def test_spoilt_volumes_are_refused_or_cost_themselves(archive, seed: int) -> None:
    rng = np.random.default_rng(seed)
    archive.edit(lambda d: d.update(validation=[], test=[]))
    outcomes: Counter[str] = Counter()
    for number in range(100):
        file = archive.root / f"{NIFTI[number % 3]}.nii.gz"
        good = file.read_bytes()
        file.write_bytes(_spoilt_nifti(rng, gzip.decompress(good)))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # overflow and NaN: an image of nonsense
            outcomes[_outcome(archive.root)] += 1
        file.write_bytes(good)
    assert set(outcomes) == {"refused", "unreadable", "read"}


def _spoilt_json(rng: np.random.Generator, value: Any) -> Any:
    """A copy of the value in which something is another."""
    if not isinstance(value, dict | list) or not value or rng.integers(4) == 0:
        return ODD[int(rng.integers(len(ODD)))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    chosen = keys[int(rng.integers(len(keys)))]
    kind = int(rng.integers(4))
    if isinstance(value, list):
        return [_spoilt_json(rng, one) if i == chosen else one for i, one in enumerate(value) if kind or i != chosen]
    changed = {key: _spoilt_json(rng, one) if key == chosen else one for key, one in value.items()}
    if kind == 0:
        changed["9" * int(rng.integers(1, 6000)) if rng.integers(2) else str(ODD[11])] = changed.pop(chosen)
    return changed


@pytest.mark.parametrize("seed", range(3))
def test_a_spoilt_dataset_json_is_refused_or_read(archive, seed: int) -> None:
    rng = np.random.default_rng(seed)
    file = archive.root / "dataset.json"
    good = json.loads(file.read_text())
    outcomes: Counter[str] = Counter()
    for _ in range(100):
        text = json.dumps(_spoilt_json(rng, good)).encode()
        if rng.integers(5) == 0:
            at = int(rng.integers(len(text)))
            text = text[:at] + rng.bytes(3) + text[at + int(rng.integers(9)) :]
        file.write_bytes(text)
        outcomes["refused" if find_problems(archive.root) else "fine"] += 1
    assert outcomes["refused"] > 50


DEEP = "[" * 10_000 + "]" * 10_000
BREAKERS = {
    "deep list": DEEP,
    "deep": f'{{"training": {DEEP}}}',
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "long number": f'{{"training": 1{"0" * 10_000}}}',
    "long id": f'{{"training": [], "labels": {{"{"1" * 5000}": "liver"}}}}',
    "no UTF-8": "\xff\xfe",
    "NaN": "NaN",
}


@pytest.mark.parametrize("text", BREAKERS.values(), ids=BREAKERS.keys())
def test_a_dataset_json_made_to_break_readers_is_refused(archive, text: str) -> None:
    (archive.root / "dataset.json").write_bytes(text.encode("latin-1"))
    (found, *_) = find_problems(archive.root)
    assert "dataset.json" in found.where
    assert len(str(found)) < 1000
