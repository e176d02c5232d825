"""The folder: images, labels and dataset.json as AMOS 2022 has them, made case by case and resumed.

OUT/phantom.json marks the folder as a phantom and has its config; it is written first. OUT/dataset.json comes last: a
folder without it is unfinished. OUT/wholebody/, if the config asks for it, has the layout of `segdiff annotate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.documents import read_json
from data_shards.files import is_leftover, remove_leftovers, write_atomic
from data_shards.ingest.masks import ANNOTATIONS, ANNOTATIONS_VERSION
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.phantom.config import CaseKey, PhantomConfig, case_keys
from data_shards.problems import InputProblems, Problem, explain_full_disk, refuse
from data_shards.progress import progress_bar
from data_shards.store.set_index import file_sha256

# Increased when the same config would give other voxels, so that two versions never fill one folder.
PHANTOM_VERSION = 1
_ABOUT_FILE = "phantom.json"
_DATASET_FILE = "dataset.json"
_WHOLEBODY = "wholebody"
_FOLDER_SUFFIX = {"train": "Tr", "val": "Va", "test": "Ts"}
# As AMOS writes them, misspellings included.
_AMOS_LABELS = (
    "background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota",
    "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip


def write_phantom(out: Path, config: PhantomConfig) -> None:
    """Write the archive to `out`, which may be new, empty, or hold a part of the same phantom: that part is kept.

    Raises InputProblems for a config out of range, an `out` that is something else, or one made with another config.
    labelsTs/ holds the labels of the test cases, which AMOS does not publish; dataset.json leaves them out, as AMOS'
    does.
    """
    check(out, config).write()


@dataclass(frozen=True)
class PhantomArchive:
    """An archive that can be written, made by `check`."""

    out: Path
    config: PhantomConfig

    def write(self) -> None:
        """Write the missing files; errors as of `write_phantom`."""
        out, config = self.out, self.config
        with locked(out / FOLDER_LOCK, out, "is writing it"), explain_full_disk(out):
            refuse(_problems_with_out(out, config))  # another command may have started in it since the check
            _write_archive(out, config)


def check(out: Path, config: PhantomConfig) -> PhantomArchive:
    """Raise InputProblems for all problems that show before work starts."""
    refuse(config.problems() or _problems_with_out(Path(out), config))
    return PhantomArchive(Path(out), config)


def _write_archive(out: Path, config: PhantomConfig) -> None:
    from data_shards.phantom.case import make_case, nifti_gz

    for folder in (out, *(folder for folder in out.iterdir() if folder.is_dir())):
        remove_leftovers(folder)
    if not (out / _ABOUT_FILE).exists():
        write_atomic(out / _ABOUT_FILE, _json(_about(config)))
    keys = case_keys(config)
    for kind in ("images", "labels"):
        for suffix in _FOLDER_SUFFIX.values():
            (out / f"{kind}{suffix}").mkdir(exist_ok=True)
    if config.wholebody:
        (out / _WHOLEBODY).mkdir(exist_ok=True)
    waiting = [key for key in keys if not _path(out, "images", key).exists()]
    for key in progress_bar(waiting, desc="phantom", unit="case", disable=not waiting):
        case = make_case(key, config)
        # The image comes second, so that a case with an image is a finished one.
        write_atomic(_path(out, "labels", key), nifti_gz(case.labels, case.affine))
        if case.wholebody is not None:
            write_atomic(out / _WHOLEBODY / key.file_name, nifti_gz(case.wholebody, case.affine))
        write_atomic(_path(out, "images", key), nifti_gz(case.image, case.affine))
    if config.wholebody and not (out / _WHOLEBODY / ANNOTATIONS).exists():
        write_atomic(out / _WHOLEBODY / ANNOTATIONS, _json(_annotations(out, keys)))
    if not (out / _DATASET_FILE).exists():
        write_atomic(out / _DATASET_FILE, _json(dataset_json(keys)))


def dataset_json(keys: list[CaseKey]) -> dict[str, Any]:
    """AMOS' dataset.json; its `modality` says CT for an archive of CT and MR too, and so does this one."""
    entries: dict[str, list[dict[str, str]]] = {split: [] for split in _FOLDER_SUFFIX}
    for key in sorted(keys, key=lambda k: k.number):
        suffix = _FOLDER_SUFFIX[key.split]
        entry = {"image": f"./images{suffix}/{key.file_name}"}
        if key.split != "test":
            entry["label"] = f"./labels{suffix}/{key.file_name}"
        entries[key.split].append(entry)
    return {
        "name": "segdiff phantom",
        "description": "synthetic abdominal CT and MR in the AMOS 2022 layout",
        "reference": "made by `segdiff phantom`; the layout is that of Ji et al. 2022",
        "licence": "Apache-2.0",
        "release": f"{PHANTOM_VERSION}.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(i): name for i, name in enumerate(_AMOS_LABELS)},
        "training": entries["train"],
        "validation": entries["val"],
        "test": entries["test"],
        "numTraining": len(entries["train"]),
        "numTest": len(entries["test"]),
    }


def _annotations(out: Path, keys: list[CaseKey]) -> dict[str, Any]:
    """The maker of the whole-body masks, in the form of data_shards.ingest.annotate."""
    cases = {}
    for key in keys:
        image, mask = _path(out, "images", key), out / _WHOLEBODY / key.file_name
        case_id = key.file_name.removesuffix(".nii.gz")
        cases[case_id] = {"image_sha256": file_sha256(image), "mask_sha256": file_sha256(mask)}
    return {
        "format_version": ANNOTATIONS_VERSION,
        "tool": "phantom",
        "tool_version": str(PHANTOM_VERSION),
        "command": "segdiff phantom",
        "label_table": "wholebody",
        "cases": cases,
    }


def _about(config: PhantomConfig) -> dict[str, Any]:
    return {"phantom_version": PHANTOM_VERSION, "config": config.to_json()}


def _problems_with_out(out: Path, config: PhantomConfig) -> list[Problem]:
    """Why `out` cannot be this phantom's folder, new or continued."""
    about_file = out / _ABOUT_FILE
    if out.exists() and not out.is_dir():
        return [Problem(str(out), "OUT", "not a folder", "name a new folder")]
    if about_file.exists():
        try:
            problems = read_json(about_file, "delete the folder or name a new one", "JSON")
        except InputProblems as error:
            return list(error.problems)
        return _differences(about_file, problems, _about(config))
    # A process that was killed at its start leaves an unfinished phantom.json.
    if out.exists() and any(entry.name != FOLDER_LOCK and not is_leftover(entry) for entry in out.iterdir()):
        return [Problem(str(out), "OUT", "a folder with other things in it", "name a new or an empty folder")]
    return []


def _differences(where: Path, found: Any, wanted: dict[str, Any]) -> list[Problem]:
    remedy = "name a new folder, or use the settings of this one"
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        return [Problem(str(where), "config", "missing", "delete the folder or name a new one")]
    pairs = [("phantom_version", found.get("phantom_version"), wanted["phantom_version"])]
    there = {"wholebody": False, **found["config"]}
    pairs += [(name, there.get(name), value) for name, value in wanted["config"].items()]
    differing = [(name, f"{old} there, {new} asked for") for name, old, new in pairs if old != new]
    return [Problem(str(where), name, value, remedy) for name, value in differing]


def _path(out: Path, kind: str, key: CaseKey) -> Path:
    return out / f"{kind}{_FOLDER_SUFFIX[key.split]}" / key.file_name


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
