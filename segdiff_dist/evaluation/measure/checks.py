"""All problems of an evaluation, before Ray starts. Everything that it needs is opened here once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.files import first_line
from data_shards.problems import Attempts, InputProblems, Problem, problem, refuse
from data_shards.store.shards import ShardSet
from segdiff_dist.config import how_to_make
from segdiff_dist.evaluation.measure.subject import (
    NO_REAL_IMAGES,
    Subject,
    hu_window,
    is_paired,
    label_table_of,
    open_samples,
    real_rows,
)
from segdiff_dist.evaluation.measure.tool_labels import no_volumes
from segdiff_dist.evaluation.metrics import given_network, inception, perceptual
from segdiff_dist.sampling.mask_patients import MaskPatients, mask_patients
from segdiff_dist.segmentation.tools import ToolSegmenter

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.labels import LabelTable
    from segdiff_dist.evaluation.measure.config import EvaluateConfig
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.segmentation.any_segmenter import AnySegmenter, TorchScriptSegmenter
    from segdiff_dist.segmentation.segmenter import Segmenter


@dataclass(frozen=True)
class Checked:
    """The inputs of an evaluation: the images, and the segmenter's weights with their digest."""

    subject: Subject
    segmenter: Path
    segmenter_sha256: str

    @property
    def store(self) -> SampleStore:
        """The store of the samples that are measured."""
        return self.subject.store


def check(run: Path, config: EvaluateConfig) -> Checked:
    """Raises InputProblems: see measure in job.py."""
    attempts = Attempts([*config.problems(), *unreadable(config)])
    problems, opened = attempts.problems, attempts.results

    weights = config.segmenter or run / "segmenter" / "weights"
    attempts.make("segmenter", lambda: open_segmenter(weights))
    attempts.make("store", lambda: open_samples(run / "samples"))
    if "store" in opened:
        paired = is_paired(opened["store"])
        if (named := opened["store"].job["shards"] if paired else config.real) is not None:
            attempts.make("shards", lambda: ShardSet.open(named))
        attempts.make("table", lambda: label_table_of(opened["store"], opened.get("shards")))
        if not paired:
            if "shards" in opened and not opened["store"].missing():
                attempts.make("rows", lambda: rows_of(opened["store"].items, opened["shards"], config))
            problems += needs_real_images(config)
            named_by = (opened["store"].items, opened["store"].job, config.patient)
            attempts.make("patients", lambda: mask_patients(*named_by))
        elif config.patient is not None:
            remedy = "leave it out: the shard set names the patients of its masks (prepare --prepare.patient)"
            problems.append(Problem("config", "evaluate.patient", config.patient, remedy))
    patients = opened.pop("patients", MaskPatients())
    problems += _mismatches(run, config, **opened)
    refuse(problems)
    subject = Subject(opened["store"], opened.get("shards"), opened.get("rows", ()), patients)
    return Checked(subject, weights, opened["segmenter"].weights_sha256)


def rows_of(items: pa.Table, shards: ShardSet, config: EvaluateConfig) -> tuple[int, ...]:
    """The real slices that unpaired images are compared with."""
    return real_rows(items, shards, config.real_split, config.distribution_images, config.seed)


def needs_real_images(config: EvaluateConfig) -> Iterator[Problem]:
    """Problems of settings that unpaired images do not allow."""
    if config.memorisation and config.real is None:
        yield Problem("config", "evaluate.memorisation", NO_REAL_IMAGES, "its train split is searched")
    if config.frd_images and config.real is None:
        yield Problem("config", "evaluate.frd_images", NO_REAL_IMAGES, "its features are compared with real images'")


def open_segmenter(weights: Path) -> AnySegmenter:
    """The segmenter that labels the images; InputProblems if it cannot be read."""
    from segdiff_dist.segmentation.any_segmenter import open_any_segmenter

    try:
        return open_any_segmenter(weights)
    except InputProblems:
        raise
    except (KeyError, TypeError, ValueError) as error:  # of segdiff.json
        remedy = f"copy the folder again, or train again: {how_to_make('train-segmenter', weights)}"
        raise problem(weights, "segmenter", f"cannot be read: {first_line(error)}", remedy) from error


def unreadable(config: EvaluateConfig) -> Iterator[Problem]:
    """Files that are not the right weights. Each network is built once, as every worker will build it."""
    if config.feature_network is not None and config.feature_network.is_file():
        try:
            given_network.load_network(str(config.feature_network), "cpu")
        except InputProblems as error:
            yield from error.problems
    checks: tuple[tuple[str, Callable[[str], str | None], Callable[[str, str], Any], str], ...] = (
        ("fid_weights", inception.missing_for_fid, inception.load_inception, inception.WEIGHTS_FILE),
        ("lpips_weights", perceptual.missing_for_lpips, perceptual.load_lpips, perceptual.WEIGHTS_FILE),
    )
    for name, missing, load, file_name in checks:
        file = getattr(config, name)
        if not isinstance(file, Path) or not file.is_file() or missing(str(file)):
            continue  # config.problems says so
        try:
            load(str(file), "cpu")
        except Exception as error:  # of pickle, zip, torch, or of a network with other weights
            value = f"{file}: cannot be read: {first_line(error)}"
            yield Problem("config", f"evaluate.{name}", value, f"give the file {file_name}")


def _mismatches(
    run: Path,
    config: EvaluateConfig,
    segmenter: AnySegmenter | None = None,
    store: SampleStore | None = None,
    shards: ShardSet | None = None,
    table: LabelTable | None = None,
    rows: tuple[int, ...] = (),
) -> Iterator[Problem]:
    if store is not None and (missing := store.missing()):
        value = f"{len(missing)} of {store.items.num_rows} not made yet"
        yield Problem(str(run / "samples"), "samples", value, "run the same `segdiff sample` again; it continues")
    if store is not None:
        for damage in store.damaged():
            yield Problem(str(run / "samples"), "samples", str(damage), "run the same `segdiff sample` again")
    if store is not None and not store.items.num_rows:
        yield Problem(
            str(run / "samples"), "samples", "none", f"sample again: {how_to_make('sample', run / 'samples')}"
        )
    if store is not None and shards is not None and is_paired(store) and shards.digest != store.job["shards_digest"]:
        yield Problem(shards.root, "digest", "not the shard set of the samples", "restore it, or sample again")
    if store is not None and is_paired(store) and config.real is not None:
        remedy = "leave --real out: these samples are compared with the shard set that their masks are of"
        yield Problem("config", "evaluate.real", config.real, remedy)
    if store is not None and table is not None:
        if segmenter is not None:
            modalities = store.items["target_modality"].unique().to_pylist()
            yield from segmenter.problems(table, modalities, hu_window(store, shards))
            yield from cannot_segment(segmenter, store.image.shape[1], config)
            if isinstance(segmenter, ToolSegmenter) and not store.missing():
                yield from no_volumes(store, shards, is_paired(store))
        yield from cannot_extract(store.image.shape[1], config)
        yield from unlike(table, store.image.shape[1], shards)


def cannot_segment(segmenter: AnySegmenter, size: int, config: EvaluateConfig) -> Iterator[Problem]:
    """Conflicts of a segmenter with images of `size` pixels, and with the settings."""
    from segdiff_dist.segmentation.segmenter import Segmenter

    is_ours = isinstance(segmenter, Segmenter)
    reason = None if isinstance(segmenter, ToolSegmenter) else _why_not(segmenter, size)
    if reason and is_ours:
        value = f"its levels do not halve the images' {size} pixels evenly"
        remedy = "train one on slices of that size; `segdiff train-segmenter --help` says how"
        yield Problem("segmenter", "levels", value, remedy)
    elif reason:
        remedy = "correct its description: `size`, `channels`, `output` and `names`"
        yield Problem("segmenter", f"an image of {size} pixels", reason, remedy)
    if config.memorisation and not is_ours:
        remedy = "leave it out, or name a segmenter that segdiff trained"
        yield Problem("config", "evaluate.memorisation", f"{config.segmenter} gives no features to compare", remedy)


def cannot_extract(size: int, config: EvaluateConfig) -> Iterator[Problem]:
    """Why the given network of features cannot take images of `size` pixels; it is tried on two.

    Nothing for a file that cannot be read: `unreadable` names that.
    """
    import torch

    if config.feature_network is None or not config.feature_network.is_file():
        return
    try:
        extract = given_network.load_network(str(config.feature_network), "cpu")
        features = extract(torch.zeros(2, size, size, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
        reason = "" if len(features) == 2 and features.isfinite().all() else f"features {tuple(features.shape)}"
    except InputProblems:
        return
    except (RuntimeError, ValueError) as error:  # of the TorchScript
        reason = str(error).strip().splitlines()[-1][:200]
    if reason:
        value = f"{config.feature_network}: an image of {size} pixels gives {reason}"
        remedy = f"describe its input in {config.feature_network.with_suffix('.yaml')} (docs/metrics.md)"
        yield Problem("config", given_network.FIELD, value, remedy)


def unlike(table: LabelTable, size: int, shards: ShardSet | None) -> Iterator[Problem]:
    """Conflicts of a shard set with images of `size` pixels whose masks are of `table`."""
    if shards is not None and shards.label_table != table:
        value = f"set {shards.label_table.name!r}, masks {table.name!r}"
        yield Problem(shards.root, "label table", value, "give a set with the masks' labels")
    if shards is not None and shards.size < size:
        value = f"{shards.size} pixels a side, the images {size}"
        yield Problem(shards.root, "size", value, "give a set of slices that are at least as large")


def _why_not(segmenter: Segmenter | TorchScriptSegmenter, side: int) -> str | None:
    """Why the segmenter cannot label images of `side` x `side` pixels; it is tried on one."""
    import torch

    image_1HW, modality_1 = torch.zeros(1, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    try:
        labels_1HW, _ = segmenter.predict_and_features(image_1HW, modality_1)
    except (RuntimeError, ValueError) as error:  # levels that are joined differ in size; a TorchScript's own errors
        return str(error).strip().splitlines()[-1][:200]
    return None if labels_1HW.shape == image_1HW.shape else f"labels of {tuple(labels_1HW.shape[1:])}"
