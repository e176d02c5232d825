"""An AMOS folder to a shard set: one Ray task a volume, then one pass that writes the shards in a fixed order.

OUT/.partial/ keeps one file for each finished volume until the whole set stands, so that a killed run, or one with
failed volumes, goes on where it stopped. index.json is written last and names what failed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data_shards import __version__, archive
from data_shards.archive import Case
from data_shards.fan_out import Done, TaskFailure, fan_out
from data_shards.labels import LABEL_TABLES
from data_shards.problems import InputProblems, Problem, refuse
from data_shards.records import AXES, MODALITIES, SPLITS, SliceMeta
from data_shards.shards import (
    CODECS,
    INDEX,
    PARTIAL,
    SAMPLES,
    SHARDS,
    ShardSet,
    ShardWriter,
    encode,
    file_sha256,
    read_index,
)
from data_shards.slices import FITS, cut

_PLAN = "plan.json"
# How the work is spread, which changes no byte of the set.
_NOT_IN_THE_SET = ("num_workers", "ray_address")


@dataclass(frozen=True)
class PrepareConfig:
    """How volumes become slices. The defaults are the paper's: 1 mm, 256 x 256, CT to [-256, 256] HU, MR to its 1st to
    99th percentile, three axes. `min_labelled_pixels` leaves out slices of labelled cases with fewer organ pixels."""

    axes: tuple[str, ...] = AXES
    modalities: tuple[str, ...] = MODALITIES
    size: int = 256
    spacing_mm: float = 1.0
    slice_stride: int = 1
    min_labelled_pixels: int = 0
    hu_window: tuple[float, float] = (-256.0, 256.0)
    mr_percentiles: tuple[float, float] = (1.0, 99.0)
    fit: str = "auto"
    label_set: str = "amos"
    codec: str = "raw"
    samples_per_shard: int = 2048
    num_workers: int | None = None
    ray_address: str | None = None

    def problems(self, where: str = "prepare") -> list[Problem]:
        """Everything out of range, each with what to do about it; empty when the config can be used."""
        found = []

        def check(name: str, good: bool, remedy: str) -> None:
            if not good:
                found.append(Problem(where, name, repr(getattr(self, name)), remedy))

        for name, allowed in (("axes", AXES), ("modalities", MODALITIES)):
            chosen = getattr(self, name)
            good = bool(chosen) and len(set(chosen)) == len(chosen) and set(chosen) <= set(allowed)
            check(name, good, f"choose from {', '.join(allowed)}, each once")
        for name, choices in (("fit", FITS), ("label_set", tuple(LABEL_TABLES)), ("codec", CODECS)):
            check(name, getattr(self, name) in choices, f"use one of {', '.join(choices)}")
        check("size", 8 <= self.size <= 2048, "use 8 to 2048 pixels")
        check("spacing_mm", 0.1 <= self.spacing_mm <= 20.0, "use 0.1 to 20 mm")
        for name in ("slice_stride", "samples_per_shard"):
            check(name, getattr(self, name) >= 1, "use 1 or more")
        check("min_labelled_pixels", self.min_labelled_pixels >= 0, "use 0 or more")
        check("num_workers", self.num_workers is None or self.num_workers >= 1, "use 1 or more, or leave it out")
        check("hu_window", self.hu_window[0] < self.hu_window[1], "give the lower end first")
        low, high = self.mr_percentiles
        check("mr_percentiles", 0.0 <= low < high <= 100.0, "use two rising values from 0 to 100")
        return found

    def of_the_set(self) -> dict[str, Any]:
        """The values that the set's bytes depend on, as index.json holds them."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_THE_SET}
        values["axes"] = [axis for axis in AXES if axis in self.axes]
        values["modalities"] = [modality for modality in MODALITIES if modality in self.modalities]
        return dict(json.loads(json.dumps(values)))


@dataclass(frozen=True)
class PrepareReport:
    """What prepare left behind. `failed`: (case_id, file, reason) for each volume that is not in the set."""

    num_samples: int
    num_cases: int
    failed: tuple[tuple[str, str, str], ...]
    skipped_done: bool


@dataclass(frozen=True)
class _Task:
    case: Case
    partial: Path
    config: PrepareConfig


def prepare(
    amos_root: Path, out: Path, config: PrepareConfig, progress: Callable[[int, int, int], None] | None = None
) -> PrepareReport:
    """Write the shard set of the AMOS folder at `amos_root` to `out`; the same call again goes on or does nothing.

    A volume that its voxels spoil costs only itself: the others make the set, index.json and the report name it, and
    the next call tries it again. progress(volumes done, volumes in all, failed) is called as they finish.

    Raises InputProblems before any work for whatever find_problems finds.
    """
    amos_root, out = Path(amos_root).absolute(), Path(out).absolute()
    refuse(find_problems(amos_root, out, config))
    cases = archive.read_archive(amos_root, config.modalities)
    plan = {"preprocessing": config.of_the_set(), "source": _source(amos_root, cases)}
    index = read_index(out) if (out / INDEX).exists() else None
    if index is not None and not index["failed"]:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        return PrepareReport(index["num_samples"], len(index["source"]), (), skipped_done=True)
    _start(out, plan)
    tasks = [_Task(case, out / PARTIAL / f"{case.case_id}.npz", config) for case in cases]
    failed = dict(_run(tasks, config, progress))
    missing = [
        {
            "case_id": case_id,
            "file": os.path.relpath(file, amos_root),
            "reason": reason.replace(f"{amos_root}{os.sep}", ""),
        }
        for case_id, (file, reason) in sorted(failed.items())
    ]
    report = tuple((entry["case_id"], entry["file"], entry["reason"]) for entry in missing)
    done = [task for task in tasks if task.case.case_id not in failed]
    if not done:
        return PrepareReport(0, 0, report, skipped_done=False)
    if index is None or index["failed"] != missing:
        index = _assemble(out, done, config, plan, missing)
    if not failed:
        shutil.rmtree(out / PARTIAL)
    return PrepareReport(index["num_samples"], len(done), report, skipped_done=False)


def find_problems(amos_root: Path, out: Path, config: PrepareConfig) -> list[Problem]:
    """All that can be seen before work starts: the config, the archive's files and headers, and what `out` holds."""
    found = config.problems()
    in_archive = archive.find_problems(amos_root, config.modalities)
    source = None if in_archive else _source(amos_root, archive.read_archive(amos_root, config.modalities))
    plan = {"preprocessing": config.of_the_set(), "source": source}
    return [*found, *in_archive, *_problems_with_out(out, plan)]


def _source(root: Path, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """What a set was made from: names and lengths, which are quick to compare; checksums travel with each slice."""

    def described(file: Path | None) -> list[Any] | None:
        return None if file is None else [os.path.relpath(file, root), file.stat().st_size]

    return {
        case.case_id: {"split": case.split, "image": described(case.image), "label": described(case.label)}
        for case in cases
    }


def _problems_with_out(out: Path, plan: dict[str, Any]) -> Iterator[Problem]:
    """Refuses what is not this command's: an archive, or a set of another config or source."""
    plan_file = out / PARTIAL / _PLAN
    if (out / INDEX).exists():
        try:
            made = ShardSet.open(out).index
        except InputProblems as error:
            yield from error.problems
            return
        yield from _differences(out / INDEX, made, plan)
    elif plan_file.is_file():
        # Every case of an unfinished set is compared again by its checksums, so only the config counts.
        yield from _differences(plan_file, json.loads(plan_file.read_text(encoding="utf-8")), {**plan, "source": None})
    elif out.exists() and not out.is_dir():
        yield Problem(str(out), "output folder", "is a file", "choose another folder")
    else:
        # Whatever else lies there, a tracker's files for one, is neither read nor touched.
        for name in (archive.DATASET_FILE, SHARDS, SAMPLES):
            if (out / name).exists():
                yield Problem(str(out), "output folder", f"holds {name} of something else", "choose a new folder")


def _differences(where: Path, made: dict[str, Any], plan: dict[str, Any]) -> Iterator[Problem]:
    """How a set differs from the one asked for. Cases that failed may have been mended or taken out since."""
    remedy = "choose another folder, or remove this one to make the set anew"
    for name, value in plan["preprocessing"].items():
        before = made["preprocessing"].get(name)
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
    partial = out / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.glob("*.unfinished"):
        leftover.unlink()
    _write_atomically(partial / _PLAN, json.dumps(plan, indent=1, sort_keys=True).encode())


def _run(
    tasks: list[_Task], config: PrepareConfig, progress: Callable[[int, int, int], None] | None
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Every volume to its partial file; yields case id, file and reason of those that failed."""
    from tqdm import tqdm

    done: Done[_Task, tuple[str, str] | None]
    num_workers = config.num_workers or os.cpu_count() or 1
    num_failed = 0
    results = fan_out(_make_worker, tasks, num_workers=num_workers, address=config.ray_address)
    with tqdm(total=len(tasks), desc="prepare", unit="volume") as bar:
        for number, done in enumerate(results, start=1):
            failure = done.result
            if isinstance(failure, TaskFailure):
                failure = (str(done.task.case.image), failure.error)
            if failure is not None:
                num_failed += 1
                yield done.task.case.case_id, failure
            bar.set_postfix(failed=num_failed)
            bar.update()
            if progress is not None:
                progress(number, len(tasks), num_failed)


def _make_worker() -> Callable[[_Task], tuple[str, str] | None]:
    return _prepare_case


def _prepare_case(task: _Task) -> tuple[str, str] | None:
    """Write the case's partial file, unless the one that is there came from the same bytes and config. Returns file and
    reason where the voxels forbid it."""
    from data_shards.volumes import UnreadableVolume

    files = [file for file in (task.case.image, task.case.label) if file is not None]
    digests = [file_sha256(file) for file in files]
    stamp = sha256(json.dumps([__version__, task.config.of_the_set(), task.case.split, digests]).encode()).hexdigest()
    if _stamp_of(task.partial) == stamp:
        return None
    try:
        slices = list(_slices_of(task))
    except UnreadableVolume as error:
        return error.file, error.reason
    payloads = [payload for _, *pair in slices for payload in pair]
    unfinished = task.partial.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        np.savez(
            stream,
            stamp=np.array(stamp),
            metas=np.array(json.dumps([meta.to_json() for meta, _, _ in slices])),
            lengths=np.array([len(payload) for payload in payloads], dtype=np.int64),
            payload=np.frombuffer(b"".join(payloads), dtype=np.uint8),
        )
    unfinished.rename(task.partial)
    return None


def _stamp_of(partial: Path) -> str | None:
    try:
        with np.load(partial) as content:
            return str(content["stamp"])
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        # None yet, or one that a lost machine left half on its disk.
        return None


def _slices_of(task: _Task) -> Iterator[tuple[SliceMeta, bytes, bytes]]:
    """Meta, encoded image and encoded mask of every slice of a case, by axis and slice index."""
    from data_shards.body import find_body
    from data_shards.intensity import ct_grey_map, mr_grey_map
    from data_shards.volumes import UnreadableVolume, read_labels, read_volume

    case, config = task.case, task.config
    table = LABEL_TABLES[config.label_set]
    assert table.body_id is not None
    image = read_volume(case.image)
    labels = None if case.label is None else read_labels(case.label, table.body_id)
    if image.voxels_IJK.min() == image.voxels_IJK.max():
        raise UnreadableVolume(str(case.image), f"every voxel is {image.voxels_IJK.flat[0]}: it shows nothing")
    try:
        grey = ct_grey_map(config.hu_window) if case.modality == "CT" else mr_grey_map(image, config.mr_percentiles)
    except ValueError as error:
        raise UnreadableVolume(str(case.image), str(error)) from error
    body = find_body(image, case.modality)
    for axis in config.of_the_set()["axes"]:
        geometry = {name: getattr(config, name) for name in ("size", "spacing_mm", "slice_stride", "fit")}
        for one in cut(image, labels, body, grey, axis=axis, body_id=table.body_id, **geometry):
            pixels = np.bincount(one.mask_HW.ravel(), minlength=table.num_classes)
            if labels is not None and pixels[list(table.organ_ids)].sum() < config.min_labelled_pixels:
                continue
            meta = SliceMeta(
                case_id=case.case_id,
                modality=case.modality,
                axis=axis,
                slice_index=one.slice_index,
                split=case.split,
                spacing_mm=one.spacing_mm,
                affine=one.affine,
                intensity_scale=grey.scale,
                intensity_offset=grey.offset,
                label_set=config.label_set,
                labels_present=tuple(int(i) for i in np.flatnonzero(pixels) if i != 0),
                labelled=labels is not None,
                source_sha256=image.sha256,
            )
            yield meta, encode(one.image_HW, config.codec), encode(one.mask_HW, config.codec)


def _assemble(
    out: Path, done: list[_Task], config: PrepareConfig, plan: dict[str, Any], failed: list[dict[str, str]]
) -> dict[str, Any]:
    """Shards, samples.parquet and index.json from the partial files, by split, case, axis and slice."""
    from tqdm import tqdm

    table = LABEL_TABLES[config.label_set]
    writer = ShardWriter(out, config.codec, config.samples_per_shard)
    in_order = sorted(done, key=lambda task: (SPLITS.index(task.case.split), task.case.case_id))
    for task in tqdm(in_order, desc="write shards", unit="volume"):
        with np.load(task.partial) as content:
            metas, lengths, payload = json.loads(str(content["metas"])), content["lengths"], content["payload"]
        ends = np.cumsum(lengths)
        pieces = [payload[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]
        for values, image, mask in zip(metas, pieces[0::2], pieces[1::2], strict=True):
            writer.write(SliceMeta.from_json(values), image, mask)
    return writer.finish({**plan, "label_table": {"name": table.name, "names": list(table.names)}, "failed": failed})


def _write_atomically(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.rename(path)
