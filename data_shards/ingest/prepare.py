"""A folder of volumes to a shard set: one Ray task a volume, then one a shard.

OUT/.partial/ keeps two files for each finished volume until the whole set is written, so that a killed run, or one with
failed volumes, continues where it stopped. index.json is written last and names the failed volumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.documents import read_json, reading
from data_shards.fan_out import Done, TaskFailure, Workers, runner
from data_shards.files import remove_leftovers, write_atomic
from data_shards.ingest import partials
from data_shards.ingest.case_task import CaseTask, Failed, same_image_notes
from data_shards.ingest.cases import Case, Source, nifti_files, num_bytes
from data_shards.ingest.dataset_json import DATASET_FILE
from data_shards.ingest.masks import annotation_record
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.ingest.survey import Survey, survey
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.problems import InputProblems, OutOfSpace, Problem, explain_full_disk, problem, refuse
from data_shards.records import MASK_SOURCES, SPLITS
from data_shards.store.set_index import INDEX, PARTIAL, SAMPLES, SHARDS, read_index
from data_shards.store.shard_writer import plan_shards, write_shards
from data_shards.wording import in_words

__all__ = ["Preparation", "PrepareConfig", "PrepareReport", "check", "find_problems", "prepare"]

_PLAN = "plan.json"
# Keys that index.json's `preprocessing` has only if they are not the default, or not AMOS'.
_WHERE_SET = {"modality", "layout", "label_ids", "label_names", "channel", "split", "seed", "fold", "patient"}
_WHERE_SET |= {"keep_dicom_ids", "intensities", "channels"}


@dataclass(frozen=True)
class PrepareReport:
    """The result of prepare. `failed`: (case_id, file, reason) for each volume that is not in the set. `masks`: number
    of cases by mask source (records.MASK_SOURCES). `recognised`: by case id, texts about what was converted, left out
    or guessed in a volume; cases without such are not in it. `notes`: texts about the set."""

    num_samples: int
    num_cases: int
    failed: tuple[tuple[str, str, str], ...]
    skipped_done: bool
    masks: dict[str, int]
    recognised: dict[str, list[str]]
    notes: tuple[str, ...] = ()


def prepare(
    amos_root: Path,
    out: Path,
    config: PrepareConfig,
    progress: Callable[[int, int, int], None] | None = None,
    *,
    wholebody: Path | None = None,
) -> PrepareReport:
    """Write the shard set of the folder at `amos_root` to `out`; the same call again continues or does nothing.

    `wholebody`: folder of whole-body masks, for label sets that need one. If the voxels of a volume cannot be used,
    only this volume fails: the others make the set, index.json and the report name it, and the next call tries it
    again. progress(volumes done, volumes in all, failed) is called as they finish.

    Raises InputProblems before any work for problems that find_problems finds, if another process prepares the same
    set, and if `out` cannot be written; OutOfSpace when the disk is full.
    """
    return check(amos_root, out, config, wholebody).run(progress)


@dataclass(frozen=True)
class Preparation:
    """A checked preparation, made by `check`: the only thing that can run. `header`: settings and source, for plan.json
    and the index; `out_state`: the state of the output folder; `survey`: the contents of the archive."""

    amos_root: Path
    out: Path
    config: PrepareConfig
    wholebody: Path | None
    header: dict[str, Any]
    out_state: list[tuple[int, int] | None]
    survey: Survey

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases that are cut."""
        return self.survey.cases

    @property
    def left_out(self) -> list[dict[str, str]]:
        """The skipped cases, in the form of the index."""
        roots = [self.amos_root] if self.wholebody is None else [self.amos_root, self.wholebody]
        return [
            _described(roots, case_id, Failed(found[0].where, "; ".join(f"{p.field}: {p.value}" for p in found)))
            for case_id, found in sorted(self.survey.skipped.items())
        ]

    def run(self, progress: Callable[[int, int, int], None] | None = None) -> PrepareReport:
        """Cut and write the missing parts; errors as of `prepare`."""
        with locked(self.out / FOLDER_LOCK, self.out, "is preparing it"):
            if _state_of(self.out) != self.out_state:  # another command has written there since the check
                refuse(_problems_with_out(self.out, self.header))
            return _prepare(self, progress)


def check(amos_root: Path, out: Path, config: PrepareConfig, wholebody: Path | None = None) -> Preparation:
    """Read the archive's headers; raises InputProblems for problems that find_problems finds."""
    amos_root, out = Path(amos_root).absolute(), Path(out).absolute()
    wholebody = None if wholebody is None else Path(wholebody).absolute()
    state = _state_of(out)
    problems, found, header = _find_problems(amos_root, out, config, wholebody)
    refuse(problems)
    return Preparation(amos_root, out, config, wholebody, header, state, found)


def _prepare(job: Preparation, progress: Callable[[int, int, int], None] | None) -> PrepareReport:
    amos_root, out, config, wholebody, plan = job.amos_root, job.out, job.config, job.wholebody, job.header
    index = read_index(out) if (out / INDEX).exists() else None
    left_out = job.left_out
    if index is not None and index["failed"] == left_out:
        if not left_out:
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
        return _report(index, len(index["source"]), left_out, skipped_done=True)
    labelling = job.survey.labelling
    tasks = [CaseTask(case, out / PARTIAL / case.case_id, config, wholebody, labelling) for case in job.cases]
    # The largest first, so that no worker has a large one at the end while the others wait.
    tasks.sort(key=lambda task: -num_bytes(task.case.image))
    num_workers, address = config.workers.num_on_cores, config.workers.ray_address
    workers: Workers[Any, Any] = Workers(runner, num_workers=num_workers, num_tasks=len(tasks), address=address)
    with explain_full_disk(out), ExitStack() as at_the_end, workers:
        at_the_end.callback(_remove_half_written, out)
        _start(out, plan)
        failed = dict(_cut_volumes(tasks, workers, out, progress))
        roots = [amos_root] if wholebody is None else [amos_root, wholebody]
        missing = [_described(roots, case_id, failure) for case_id, failure in failed.items()] + left_out
        missing.sort(key=lambda entry: entry["case_id"])
        done = [task for task in tasks if task.case.case_id not in failed]
        if not done:
            return PrepareReport(0, 0, _listed(missing), False, {}, {})
        if index is None or index["failed"] != missing:
            index = _write_set(out, done, config, {**plan, "failed": missing}, workers, wholebody)
    if not missing:
        shutil.rmtree(out / PARTIAL)
    return _report(index, len(done), missing)


def _report(
    index: dict[str, Any], num_cases: int, missing: list[dict[str, str]], skipped_done: bool = False
) -> PrepareReport:
    """The report of a complete set."""
    recognised, masks = index.get("recognised", {}), index["mask_sources"]
    notes = tuple(index.get("notes", ()))
    return PrepareReport(index["num_samples"], num_cases, _listed(missing), skipped_done, masks, recognised, notes)


def _listed(missing: list[dict[str, str]]) -> tuple[tuple[str, str, str], ...]:
    return tuple((entry["case_id"], entry["file"], entry["reason"]) for entry in missing)


def find_problems(amos_root: Path, out: Path, config: PrepareConfig, wholebody: Path | None = None) -> list[Problem]:
    """All problems that show before work starts: in the config, the archive's files and headers, those of the
    whole-body masks, and the contents of `out`."""
    return _find_problems(amos_root, out, config, wholebody)[0]


def _find_problems(
    amos_root: Path, out: Path, config: PrepareConfig, wholebody: Path | None
) -> tuple[list[Problem], Survey, dict[str, Any]]:
    """The problems; the contents of the archive, and the settings and source for the index."""
    problems = config.problems()
    found = survey(amos_root, config, wholebody)
    source = None if found.problems else _source(amos_root, found.cases, wholebody)
    header: dict[str, Any] = {"preprocessing": config.result_settings() | found.recorded, "source": source}
    if found.notes:
        header["notes"] = list(found.notes)
    return [*problems, *found.problems, *_problems_with_out(out, header)], found, header


def _state_of(out: Path) -> list[tuple[int, int] | None]:
    """Time and length of the files that say which command made the folder."""
    files = (out / INDEX, out / PARTIAL / _PLAN)
    return [(file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None for file in files]


def _source(root: Path, cases: Sequence[Case], wholebody: Path | None) -> dict[str, dict[str, Any]]:
    """The source of a set: names and lengths, which are fast to compare; each slice has checksums."""

    def described(file: Source | None, of: Path) -> list[Any] | None:
        if file is None:
            return None
        return [os.path.relpath(file, of) if isinstance(file, Path) else str(file), num_bytes(file)]

    source = {}
    for case in cases:
        source[case.case_id] = {
            "split": case.split,
            "image": described(case.image, root),
            "label": described(case.label, root),
        }
        if case.organs:
            source[case.case_id]["organs"] = [described(file, root) for _, file in case.organs]
        if case.patient is not None:
            source[case.case_id]["patient"] = case.patient
        if wholebody is not None:
            masks = nifti_files(wholebody, case.case_id)
            source[case.case_id]["wholebody"] = described(masks[0] if masks else None, wholebody)
    return source


def _problems_with_out(out: Path, plan: dict[str, Any]) -> Iterator[Problem]:
    """Refuses folders that are not this command's: an archive, or a set of another config or source."""
    plan_file = out / PARTIAL / _PLAN
    if (out / INDEX).exists():
        from data_shards.store.shards import ShardSet

        try:
            made = ShardSet.open(out).index
        except InputProblems as error:
            yield from error.problems
            return
        yield from _differences(out / INDEX, made, plan)
    elif plan_file.is_file():
        # Every case of an unfinished set is compared again by its checksums, so only the config counts.
        remedy = f"remove {plan_file.parent}: the volumes are then cut again"
        try:
            with reading(plan_file, "the plan of an unfinished set", remedy):
                yield from list(_differences(plan_file, read_json(plan_file, remedy), {**plan, "source": None}))
        except InputProblems as error:
            yield from error.problems
    elif out.exists() and not out.is_dir():
        yield Problem(str(out), "output folder", "is a file", "choose another folder")
    else:
        # Other files there, such as a tracker's, are neither read nor touched.
        for name in (DATASET_FILE, SHARDS, SAMPLES):
            if (out / name).exists():
                yield Problem(str(out), "output folder", f"holds {name} of something else", "choose a new folder")


def _differences(where: Path, made: dict[str, Any], plan: dict[str, Any]) -> Iterator[Problem]:
    """Differences of a set from the wanted one. Failed cases may have been repaired or removed since."""
    remedy = "choose another folder, or remove this one to make the set anew"
    # Some keys exist only if they were set.
    for name in dict.fromkeys((*plan["preprocessing"], *sorted(_WHERE_SET & made["preprocessing"].keys()))):
        before, value = made["preprocessing"].get(name), plan["preprocessing"].get(name)
        if before != value:
            yield Problem(str(where), name, f"made with {before!r}, asked for {value!r}", remedy)
    if plan["source"] is None:
        return
    made_from = made.get("source") or {}
    failed = {entry["case_id"] for entry in made.get("failed", ())}
    for case_id in sorted(made_from.keys() | plan["source"].keys()):
        then, now = made_from.get(case_id), plan["source"].get(case_id)
        if then != now and case_id not in failed:
            yield Problem(str(where), f"source of {case_id}", f"made from {then}, asked for {now}", remedy)


def _start(out: Path, plan: dict[str, Any]) -> None:
    folder = out / PARTIAL
    folder.mkdir(parents=True, exist_ok=True)
    _remove_half_written(out)
    write_atomic(folder / _PLAN, json.dumps(plan, indent=1, sort_keys=True).encode())


def _remove_half_written(out: Path) -> None:
    """Remove the unfinished files of workers that were stopped."""
    remove_leftovers(out / PARTIAL)


def _cut_volumes(
    tasks: list[CaseTask],
    workers: Workers[Any, Any],
    out: Path,
    progress: Callable[[int, int, int], None] | None,
) -> Iterator[tuple[str, Failed]]:
    """Every volume to its partial files; yields case id and reason of those that failed."""
    from data_shards.progress import progress_bar

    done: Done[CaseTask, Failed | None]
    num_failed = 0
    with progress_bar(total=len(tasks), desc="prepare", unit="volume") as bar:
        for number, done in enumerate(workers.run(tasks), start=1):
            failure = done.result
            if isinstance(failure, TaskFailure):
                failure = Failed(str(done.task.case.image), failure.error)
            if failure is not None:
                if failure.file is None:
                    raise OutOfSpace(out, failure.reason)
                num_failed += 1
                yield done.task.case.case_id, failure
            bar.set_postfix(failed=num_failed)
            bar.update()
            if progress is not None:
                progress(number, len(tasks), num_failed)


def _described(roots: list[Path], case_id: str, failure: Failed) -> dict[str, str]:
    """Without the folders above the archive and the masks, so that the index does not depend on their paths."""
    assert failure.file is not None
    file, reason = "." if failure.file in map(str, roots) else failure.file, failure.reason
    for root in roots:
        file, reason = (text.replace(f"{root}{os.sep}", "") for text in (file, reason))
    return {"case_id": case_id, "file": file, "reason": reason}


def _write_set(
    out: Path,
    done: list[CaseTask],
    config: PrepareConfig,
    header: dict[str, Any],
    workers: Workers[Any, Any],
    wholebody: Path | None,
) -> dict[str, Any]:
    """Shards, samples.arrow and index.json from the partial files, by split, case, axis and slice."""
    table = done[0].labelling.table
    num_samples: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    recognised: dict[str, list[str]] = {}
    images_of: dict[str, tuple[str, str]] = {}
    counted = []
    for task in sorted(done, key=lambda task: (SPLITS.index(task.case.split), task.case.case_id)):
        summary = partials.summarise(task.partial)
        run = partial(partials.PartialRun, task.partial, stamp=summary.stamp, format=config.format)
        counted.append((task.case.split, summary.num_samples, run))
        num_samples[task.case.split] += summary.num_samples
        masks.update(summary.mask_sources)
        images_of[task.case.case_id] = (task.case.split, summary.images)
        if summary.notes:
            recognised[task.case.case_id] = list(summary.notes)
    header = {
        **header,
        "label_table": table.described,
        "mask_sources": {source: masks[source] for source in MASK_SOURCES if masks[source]},
    }
    if recognised:
        header["recognised"] = recognised
    if notes := same_image_notes(images_of):
        header["notes"] = [*header.get("notes", ()), *notes]
    if wholebody is not None:
        header["wholebody"] = annotation_record(wholebody)
    shards = plan_shards(out, counted, config.format)
    if not shards:
        value = f"no slice of {in_words(len(done), 'volume')} is left"
        raise problem(out, "min_labelled_pixels", value, "lower it, or choose more axes and modalities")
    return write_shards(out, shards, dict(num_samples), header, workers)
