"""Whole-body masks for an archive: an installed tool run on every volume, one Ray task a volume.

WHOLEBODY/<case id>.nii.gz appears when it is complete and its ids have been checked. WHOLEBODY/annotations.json has the
tool, its version, and the image of each mask. Both are complete after every volume, so a killed run can continue.
WHOLEBODY/.partial/ holds unfinished masks, and the output of tools that failed.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.documents import read_json
from data_shards.fan_out import TaskFailure, fan_out
from data_shards.files import write_atomic
from data_shards.ingest.annotate_config import TOTALSEGMENTATOR, AnnotateConfig, task_of
from data_shards.ingest.cases import Case, Listing, read_header
from data_shards.ingest.dicom_series import DicomSeries
from data_shards.ingest.layouts.base import Request
from data_shards.ingest.layouts.find import recognise
from data_shards.ingest.masks import (
    ANNOTATIONS,
    ANNOTATIONS_VERSION,
    annotation_record,
    read_annotations,
    read_wholebody,
    resampled_to_grid,
)
from data_shards.ingest.tool import ask, last_words, run_tool
from data_shards.ingest.totalsegmentator import to_wholebody_ids
from data_shards.ingest.volume_files import read_geometry
from data_shards.ingest.volumes import UnreadableVolume, read_volume
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.modalities import in_order
from data_shards.problems import (
    InputProblems,
    OutOfSpace,
    Problem,
    explain_full_disk,
    is_about_full_disk,
    out_of_space,
    refuse,
)
from data_shards.store.set_index import file_sha256

__all__ = ["AnnotateConfig", "AnnotateReport", "Annotation", "annotate", "annotation_record", "check", "tool_version"]

_INSTALL = "pip install TotalSegmentator in an environment of its own and put its bin folder on PATH"
_PARTIAL = ".partial"
# If less is free when a tool fails, lack of space counts as the cause: a compressed mask takes some 100 KB.
_LEAST_FREE_BYTES = 64 * 1024


@dataclass(frozen=True)
class AnnotateReport:
    """The result of annotate. `failed`: (case_id, reason) for each volume without a mask of this run; `num_kept` of the
    `num_masks` existed before."""

    num_masks: int
    num_kept: int
    tool_version: str | None
    failed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Task:
    case: Case
    wholebody: Path
    config: AnnotateConfig
    recorded: dict[str, Any] | None


@dataclass(frozen=True)
class _Made:
    """The result of a volume: its record, or the reason why there is none. `kept`: it existed before. `full`: no space
    left."""

    record: dict[str, Any] | None
    reason: str = ""
    kept: bool = False
    full: bool = False


@dataclass(frozen=True)
class Annotation:
    """A checked annotation, made by `check`: the only thing that can run. `version`: as the tool reports it."""

    amos_root: Path
    wholebody: Path
    config: AnnotateConfig
    version: str | None

    @property
    def num_cases(self) -> int:
        """Volumes of the archive that get a mask."""
        return len(self._cases)

    @property
    def num_missing(self) -> int:
        """Those of them whose mask is not recorded."""
        return sum(case.case_id not in self._recorded for case in self._cases)

    @property
    def seconds(self) -> float | None:
        """Approximate time of the missing masks, from those that were made; None if there are none."""
        took = [one["seconds"] for one in self._recorded.values() if isinstance(one.get("seconds"), int | float)]
        return self.num_missing * float(np.mean(took)) / self.config.num_workers if took else None

    @property
    def most_seconds(self) -> float | None:
        """The longest time of the missing masks, by `timeout_s`; None without it."""
        each = self.config.timeout_s
        return None if each is None else -(-self.num_missing // self.config.num_workers) * each

    @cached_property
    def _cases(self) -> Sequence[Case]:
        return _listing(self.amos_root, self.config).cases

    @cached_property
    def _recorded(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = (read_annotations(self.wholebody) or {"cases": {}})["cases"]
        return found

    def run(self) -> AnnotateReport:
        """Make the missing masks; errors as of `annotate`."""
        where = self.wholebody
        with locked(where / FOLDER_LOCK, where, "is annotating it"), explain_full_disk(where):
            # Another command may have written masks there since the check.
            refuse(_folder_problems(where, _new_annotations(self.config, self.version), []))
            return _run(self.amos_root, where, self.config, self.version)


def check(amos_root: Path, wholebody: Path, config: AnnotateConfig) -> Annotation:
    """Raise InputProblems for all problems that show before work starts: config, archive, folder, and a tool that is
    missing or does not answer."""
    amos_root, wholebody = Path(amos_root).absolute(), Path(wholebody).absolute()
    refuse(config.problems())
    listing = _listing(amos_root, config)
    problems = [*listing.all_problems, *_problems_with_tasks(listing, config)]
    version, wrong = tool_version(config)
    refuse([*problems, *wrong, *_folder_problems(wholebody, _new_annotations(config, version), wrong)])
    return Annotation(amos_root, wholebody, config, version)


def annotate(amos_root: Path, wholebody: Path, config: AnnotateConfig) -> AnnotateReport:
    """Make WHOLEBODY/<case id>.nii.gz for every case of the folder, whatever its layout; the same call again makes what
    is missing.

    A mask stays while its image is, byte for byte, the one it was made from; a mask that was changed by hand is never
    overwritten. If a volume fails, the others go on. Raises InputProblems before any work for problems that `check`
    finds, if another process annotates into the same folder, and if the folder cannot be written; OutOfSpace when the
    disk is full.
    """
    return check(amos_root, wholebody, config).run()


def _listing(root: Path, config: AnnotateConfig) -> Listing:
    """The cases of the folder, in the layout that it has."""
    return recognise(root).read(root, Request(config.modalities, config.modality, unlabelled=True))


def _run(amos_root: Path, wholebody: Path, config: AnnotateConfig, version: str | None) -> AnnotateReport:
    from data_shards.progress import progress_bar

    (wholebody / _PARTIAL).mkdir(parents=True, exist_ok=True)
    content = read_annotations(wholebody) or _new_annotations(config, version)
    _adopt(wholebody, content["cases"])
    _write_json(wholebody / ANNOTATIONS, content)
    cases = _listing(amos_root, config).cases
    tasks = [_Task(case, wholebody, config, content["cases"].get(case.case_id)) for case in cases]
    workers = config.workers
    results = fan_out(
        _make_worker,
        tasks,
        num_workers=config.num_workers,
        threads_per_worker=workers.threads_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        address=workers.ray_address,
        watched=False,  # a tool may work in a container, whose processes are not the worker's; timeout_s bounds it
    )
    failed: list[tuple[str, str]] = []
    num_kept = 0
    with progress_bar(total=len(tasks), desc="annotate", unit="volume") as bar:
        for done in results:
            case_id = done.task.case.case_id
            made = _Made(None, done.result.error) if isinstance(done.result, TaskFailure) else done.result
            if made.full:
                raise OutOfSpace(wholebody, made.reason)
            num_kept += made.kept
            if made.record is None:
                failed.append((case_id, made.reason))
            elif not made.kept:
                content["cases"][case_id] = made.record
                _write_json(wholebody / ANNOTATIONS, content)
                _record_file(wholebody, case_id).unlink(missing_ok=True)
            bar.set_postfix(failed=len(failed), kept=num_kept)
            bar.update()
    if not failed:
        shutil.rmtree(wholebody / _PARTIAL, ignore_errors=True)
    return AnnotateReport(len(tasks) - len(failed), num_kept, version, tuple(sorted(failed)))


def _problems_with_tasks(listing: Listing, config: AnnotateConfig) -> Iterator[Problem]:
    """Modalities that the tool does not know."""
    unknown = in_order(case.modality for case in listing.cases if task_of(case.modality) is None)
    if config.tool == TOTALSEGMENTATOR.lower() and unknown:
        remedy = "leave them out with --annotate.modalities, or use a tool that knows them (--annotate.tool command)"
        yield Problem("annotate", "tool", f"{TOTALSEGMENTATOR} has no task for {', '.join(unknown)}", remedy)


def _folder_problems(wholebody: Path, asked: dict[str, Any], wrong: list[Problem]) -> Iterator[Problem]:
    """Problems if the folder has masks of another or an unknown tool: they are neither mixed with new ones nor
    overwritten."""
    if not wholebody.exists():
        return
    if not wholebody.is_dir():
        yield Problem(str(wholebody), "wholebody", "is a file", "choose another folder")
        return
    try:
        content = read_annotations(wholebody)
    except InputProblems as error:
        yield from error.problems
        return
    if content is not None and not wrong:
        for name in ("tool", "tool_version", "command"):
            if content.get(name) != asked[name]:
                value = f"made with {content.get(name)!r}, asked for {asked[name]!r}"
                yield Problem(str(wholebody / ANNOTATIONS), name, value, "choose another folder, or use the same tool")
    named = content["cases"] if content is not None else {}
    # Hidden files are not masks: a Mac creates forks called ._NAME.
    case_ids = sorted(file.name.split(".nii")[0] for file in wholebody.glob("[!.]*.nii*"))
    strange = [i for i in case_ids if i not in named and not _record_file(wholebody, i).exists()]
    if strange:
        value = f"{len(strange)} that {ANNOTATIONS} does not name: {', '.join(strange[:3])}"
        value += ", ..." if len(strange) > 3 else ""
        yield Problem(str(wholebody), "masks", value, "choose an empty folder, or move them away")


def tool_version(config: AnnotateConfig) -> tuple[str | None, list[Problem]]:
    """The version that the tool reports, and the problem if it reports none."""
    executable = shlex.split(config.template)[0]
    if "{" not in executable and shutil.which(executable) is None:
        remedy = "give the path of a program that this machine can run"
        if config.tool == "totalsegmentator":
            remedy = f"{_INSTALL}, or use tool command"
        return None, [Problem("annotate", config.tool, f"no {executable} on PATH", remedy)]
    words = [TOTALSEGMENTATOR, "--version"]
    if config.tool == "command":
        if config.version_command is None:
            return None, []
        words = shlex.split(config.version_command)
    answer, wrong = ask(words)
    if wrong:
        return None, [Problem("annotate", "version", wrong, "make the tool run first")]
    return answer[-1 if config.tool == "totalsegmentator" else 0], []


def _new_annotations(config: AnnotateConfig, version: str | None) -> dict[str, Any]:
    return {
        "format_version": ANNOTATIONS_VERSION,
        "tool": config.tool,
        "tool_version": version,
        "command": config.template,
        "label_table": "wholebody",
        "cases": {},
    }


def _adopt(wholebody: Path, cases: dict[str, Any]) -> None:
    """Record masks that were finished after the process that writes the records had died."""
    for file in (wholebody / _PARTIAL).glob("*.json"):
        mask = wholebody / f"{file.stem}.nii.gz"
        try:
            record = read_json(file, "remove it")
        except InputProblems:  # unusable: the mask is made again
            continue
        if mask.is_file() and file_sha256(mask) == record.get("mask_sha256"):
            cases[file.stem] = record


def _make_worker() -> Callable[[_Task], _Made]:
    return _annotate_case


def _annotate_case(task: _Task) -> _Made:
    try:
        return _make_mask(task)
    except OSError as error:
        if out_of_space(error):
            return _Made(None, str(error), full=True)
        raise


def _make_mask(task: _Task) -> _Made:
    """Run the tool on one case, check its mask, and put mask and record in place."""
    case, recorded = task.case, task.recorded
    mask = task.wholebody / f"{case.case_id}.nii.gz"
    image_sha256 = file_sha256(case.image) if isinstance(case.image, Path) else case.image.sha256()
    if recorded is not None and mask.is_file():
        if file_sha256(mask) != recorded.get("mask_sha256"):
            return _Made(None, f"{mask.name} was changed since it was made; move it away to have it made anew")
        if image_sha256 == recorded.get("image_sha256"):
            return _Made(recorded, kept=True)
    work = task.wholebody / _PARTIAL / case.case_id
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    made, started = work / "made.nii.gz", time.monotonic()
    try:
        words = task.config.words(_with_file(case, work), made)
    except UnreadableVolume as error:
        return _Made(None, error.reason)
    reason = run_tool(words, work / "tool.log", task.config.timeout_s)
    if reason:
        made.unlink(missing_ok=True)
        # If the disk is full, a tool may not even be able to report it.
        full = is_about_full_disk(reason) or shutil.disk_usage(work).free < _LEAST_FREE_BYTES
        return _Made(None, reason, full=full)
    if not made.is_file():
        return _Made(None, f"the tool ended well but wrote no mask{last_words(work / 'tool.log')}")
    try:
        checked = _checked(made, case, task.config)
    except UnreadableVolume as error:
        return _Made(None, f"the tool's mask cannot be used: {error.reason}")
    record = {
        "image_sha256": image_sha256,
        "mask_sha256": file_sha256(checked),
        "seconds": round(time.monotonic() - started, 2),
    }
    _write_json(_record_file(task.wholebody, case.case_id), record)
    checked.rename(mask)
    shutil.rmtree(work, ignore_errors=True)
    return _Made(record)


def _checked(made: Path, case: Case, config: AnnotateConfig) -> Path:
    """The mask in the whole-body table's ids, read once as prepare will read it."""
    if config.tool == "totalsegmentator":
        in_our_ids = made.with_name("mask.nii.gz")
        to_wholebody_ids(made, in_our_ids)
        made = in_our_ids
    problems: list[Problem] = []
    header = read_header(made, problems) and _header_of(case.image, problems)
    if header is None:
        raise UnreadableVolume(str(made), f"{problems[0].field}: {problems[0].value}")
    mask = read_wholebody(made)
    if not mask.voxels_IJK.any():
        raise UnreadableVolume(str(made), "it labels nothing")
    resampled_to_grid(mask, *header, made)
    return made


def _header_of(image: Path | DicomSeries, problems: list[Problem]) -> tuple[tuple[int, ...], np.ndarray] | None:
    if isinstance(image, Path):
        return read_header(image, problems)
    geometry = read_geometry(image)
    return geometry.shape, geometry.affine


def _with_file(case: Case, work: Path) -> Case:
    """The case with its image in a file: tools read a DICOM series from a NIfTI file in the working folder."""
    if isinstance(case.image, Path):
        return case
    import nibabel as nib

    file, volume = work / "image.nii.gz", read_volume(case.image)
    nib.save(nib.Nifti1Image(volume.voxels_IJK, volume.affine), file)
    return replace(case, image=file)


def _record_file(wholebody: Path, case_id: str) -> Path:
    return wholebody / _PARTIAL / f"{case_id}.json"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomic(file, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
