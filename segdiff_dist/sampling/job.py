"""Sampling on Ray: the list of items is written first, then workers make the missing items, region by region.

An item's noise depends on its id alone, and the job fixes the number of threads. So any number of workers, and on a CPU
any batch size, makes the same images. If a worker, machine or main process is killed, only its unfinished regions are
lost.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_shards.fan_out import TaskFailure, fan_out
from data_shards.labels import LabelTable
from data_shards.problems import InputProblems, Problem, WorkFailed, explain_full_disk, problem, refuse
from data_shards.records import AXES, SPLITS
from data_shards.workers import WorkerPool, WorkersConfig
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.denoising.schedule import as_trained
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.sampling.items import MASK_FILE, drawn_rows, list_items, list_items_of
from segdiff_dist.sampling.mask_source import MaskArray
from segdiff_dist.sampling.store import LABELS, MASKS, SampleStore, locked
from segdiff_dist.sampling.store_files import read_job
from segdiff_dist.sampling.weights import load_denoiser
from segdiff_dist.sampling.weights import weights_digest as weights_digest  # where others look for it
from segdiff_dist.sampling.worker import WorkerFactory
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    import pyarrow as pa

    from data_shards.store.shards import ShardSet
    from segdiff_dist.denoising.denoiser import Denoiser


class SamplingFailed(WorkFailed):
    """Some regions could not be made. The others are kept, and the same call tries these again."""


@dataclass(frozen=True)
class Job:
    """A checked job. `job_settings`: the contents of the store's job.json; `size`: of its images, in pixels."""

    path: Path
    job_settings: dict[str, Any]
    items: pa.Table
    size: int
    store: SampleStore | None
    """The store, if the job has begun."""
    masks_MHW: np.ndarray | None = None
    """The chosen masks of a folder, if the job has not begun."""
    classes: str | None = None
    """For a folder: a text about the classes in the chosen masks."""
    loaded: list[Denoiser] = field(default_factory=list)
    """The model, which the check has loaded: a plan tries it, and the work, whose workers load their own, frees it."""


def sample(
    run: Path,
    shards: ShardSet,
    rows: np.ndarray,
    diffusion: DiffusionConfig,
    config: SampleConfig,
    *,
    workers: WorkersConfig | None = None,
) -> SampleStore:
    """Make every missing image of the job into RUN/samples. Killed and started again, it makes only what is missing.

    `rows`: the labelled slices of `shards` from which masks are chosen, not used with config.masks. `workers`: in place
    of the config's, for another stage that also samples. Raises InputProblems before work starts, SamplingFailed if
    regions could not be made, OutOfSpace if the disk is full.
    """
    return make_job(prepare_job(run, shards, rows, diffusion, config), config, workers)


def make_job(job: Job, config: SampleConfig, workers: WorkersConfig | None = None) -> SampleStore:
    """Make the missing images of a job that was prepared with this config. Errors as of `sample`."""
    workers = workers or config.workers
    job.loaded.clear()
    with locked(job.path), explain_full_disk(job.path):
        # Read again, now that no other command can begin this job or replace it.
        store = SampleStore.reopen(job.path, job.job_settings)
        if store is None and job.store is not None:
            raise problem(job.path, "samples", "removed or damaged as this command began", "start it again")
        if store is not None:
            _verify_store(store, job)
            if not store.missing_regions():
                return store
        with workers.joined():
            pool = workers.pool()
            if store is None:
                job_settings = job.job_settings | {"device": pool.device}
                store = SampleStore.create(job.path, job_settings, job.items, job.size, job.masks_MHW)
                _verify_store(store, job)
            if store.job["device"] != pool.device:
                kept = store.job["device"]
                remedy = f"another rounds differently: give --{workers.section}.device {kept}, or remove {store.path}"
                raise problem(store.path, "device", f"begun on {kept!r}, not {pool.device!r}", remedy)
            _make_missing(store, pool, config, workers.ray_address)
    return store


def prepare_job(run: Path, shards: ShardSet, rows: np.ndarray, diffusion: DiffusionConfig, config: SampleConfig) -> Job:
    """Check everything and list the items; writes nothing. Parameters and errors as of `sample`."""
    from segdiff_dist.denoising.denoiser import known_modalities
    from segdiff_dist.denoising.sampler_config import guidance_digest

    path = (config.out or run / "samples").resolve()
    config = replace(config, precision=_settled_precision(config, path))
    weights = run / "weights" / config.weights
    model, digest = load_denoiser(weights)  # unusable input is refused before there is a store
    trained = json.loads((weights / DESCRIPTION).read_text())
    diffusion, contradicted = _as_trained(weights, trained, diffusion)
    problems = _unlike_training(weights, trained, shards, diffusion, config) + contradicted
    known = known_modalities(trained, weights / DESCRIPTION)
    problems += _unknown_modalities(known, shards, rows, config)
    config = _without_other_modalities(config, known)
    if config.masks is None and len(rows) == 0:
        problems.append(
            Problem(shards.root, f"split {config.split!r}", "no labelled slice", _where_masks_are(shards, config.split))
        )
    refuse(problems)
    job_settings: dict[str, Any] = {
        "weights": str(weights.resolve()),
        "weights_digest": digest,
        "guidance_segmenter_sha256": guidance_digest(config.sampler),
        "region_size": config.region_size,
        "diffusion": diffusion.process,
        "sample": config.result_settings(diffusion.objective),
    }
    if config.sampler.guidance_weights is not None:
        job_settings["guidance_weights_digest"] = _weaker_digest(weights, trained, config.sampler.guidance_weights)
    job_settings |= _source_of(shards, rows, config)
    job_settings = json.loads(json.dumps(job_settings))  # as it is read back: tuples are lists
    if (store := SampleStore.reopen(path, job_settings)) is not None:
        classes = None if config.masks is None else _classes_of(store, shards.label_table)
        return Job(path, job_settings, store.items, trained["size"], store, classes=classes, loaded=[model])
    if config.masks is not None:
        return replace(_job_of_folder(path, job_settings, shards, trained["size"], config, known), loaded=[model])
    if trained["denoiser"].get("soft_masks") and "edge" not in shards.parts:
        text = f"{shards.root} keeps no soft edges: the model, trained on soft masks, gets hard ones"
        warnings.warn(text, stacklevel=3)
    return Job(path, job_settings, list_items(shards, rows, config, known), trained["size"], None, loaded=[model])


def _where_masks_are(shards: ShardSet, split: str) -> str:
    """The remedy for a split without a mask."""
    if len(shards.select(split=split)):
        return "loader.modalities or loader.axes leaves out all of it: widen them"
    others = [f"--split {one}" for one in SPLITS if len(shards.select(split=one))]
    if others:
        return f"masks are in other splits: {', '.join(others)}; or give a folder: --masks FOLDER"
    return "no split has a mask: give a folder of masks (--masks FOLDER), or prepare a set with labels"


def _settled_precision(config: SampleConfig, path: Path) -> Literal["bf16", "fp32"]:
    """For `auto`: that of the job at `path`, else the fast one of the workers' device. CPUs of a cluster count as this
    machine's."""
    import torch

    from segdiff_dist.ranks.precision import fast_precision

    if config.precision != "auto":
        return config.precision
    with suppress(InputProblems, KeyError):
        begun: Literal["bf16", "fp32"] = read_job(path)["sample"]["precision"]
        return begun
    with config.workers.joined():
        device = config.workers.pool().device
    if device == "cuda" and not torch.cuda.is_available():
        return "bf16"  # a cluster's GPUs, which this machine lacks
    return fast_precision(torch.device(device))


def fewer_masks(items: pa.Table, config: SampleConfig) -> str | None:
    """A message if the job found fewer masks than asked for; None if there were enough."""
    num = len(set(items["row"].to_pylist()))
    return None if config.num is None or num >= config.num else f"all {num:,} masks there are, not {config.num:,}"


def _make_missing(store: SampleStore, pool: WorkerPool, config: SampleConfig, address: str | None) -> None:
    from data_shards.progress import progress_bar

    missing = store.missing_regions()
    failures = []
    desc = "sample" if (few := fewer_masks(store.items, config)) is None else f"sample ({few})"
    with progress_bar(total=len(store), initial=len(store) - len(store.missing()), desc=desc, unit="img") as bar:
        for done in fan_out(
            WorkerFactory(store.path, pool.device, config.batch_size, pool.num_beside, config.cuda_graph != "off"),
            missing,
            num_workers=pool.num_workers,
            threads_per_worker=config.threads_per_worker,
            gpus_per_worker=pool.gpus_per_worker,
            address=address,
        ):
            if isinstance(done.result, TaskFailure):
                failures.append(f"region {done.task}: {done.result.error}")
            else:
                bar.update(len(store.region(done.task)))
    if failures:
        text = f"{len(failures)} of {len(missing)} regions failed, the first: {failures[0]}"
        raise SamplingFailed(f"{text}; the others are kept, and the same command tries these again")


def _verify_store(store: SampleStore, job: Job) -> None:
    """Record where weights and masks are now, and have regions that cannot be read any more made again."""
    store.update_places(job.job_settings)
    for damage in store.damaged():
        warnings.warn(f"{damage}; region {damage.region} is made again", stacklevel=4)
        store.unmark(damage.region)


def _source_of(shards: ShardSet, rows: np.ndarray, config: SampleConfig) -> dict[str, Any]:
    """The source of the masks, for job.json. Masks of a folder are cut as the shard set was, and have its label
    table."""
    if config.masks is None:
        drawn_from = {
            "modalities": [shards.modalities[i] for i in np.unique(shards.modality_N[rows])],
            "axes": [AXES[i] for i in np.unique(shards.axis_N[rows])],
        }
        return {"shards": shards.resolved, "shards_digest": shards.digest} | drawn_from
    from segdiff_dist.sampling.mask_files import folder_digest

    digest = folder_digest(config.masks, config)
    # The set may be gone when the images are exported, and its writer may have used their own table.
    of_the_set = {"masks_cut_like": shards.index["preprocessing"], LABELS: shards.label_table.described}
    return {"masks": str(config.masks.resolve()), "masks_digest": digest} | of_the_set


def _job_of_folder(
    path: Path,
    job_settings: dict[str, Any],
    shards: ShardSet,
    size: int,
    config: SampleConfig,
    known: tuple[str, ...],
) -> Job:
    from segdiff_dist.sampling.mask_files import list_folder
    from segdiff_dist.sampling.mask_folder import ClassCounts, MaskFolder

    assert config.masks is not None
    folder, table = MaskFolder(config.masks, shards, size, config), shards.label_table
    if not len(folder):
        refuse(folder.problems)
    items = list_items_of(folder.rows, np.arange(len(folder)), config, known)
    masks_MHW = folder.read(drawn_rows(items))
    counts = ClassCounts.of(masks_MHW)
    if (passed_over := list_folder(config.masks).passed_over()) is not None:
        warnings.warn(f"{config.masks}: {passed_over}", stacklevel=4)
    if renamed := folder.renamed():
        file, case_id = next(iter(renamed.items()))
        text = f"{len(renamed)} masks in {config.masks} have names that no id can hold: {file!r} is {case_id}"
        warnings.warn(f"{text}; items.parquet lists them all ({MASK_FILE})", stacklevel=4)
    if counts.num_empty:
        text = f"{counts.num_empty} of the {counts.num_masks} masks in {config.masks} are empty: background alone"
        warnings.warn(text, stacklevel=4)
    if table.body_id is not None and not counts.num_masks_K[table.body_id]:
        text = f"no mask in {config.masks} shows the patient's outline (class `body`): the model invents it"
        warnings.warn(text, stacklevel=4)
    return Job(path, job_settings, items, size, None, masks_MHW, counts.words(table))


def _classes_of(store: SampleStore, table: LabelTable) -> str:
    """A text about the classes in the masks of a job of a folder that has begun."""
    from segdiff_dist.sampling.mask_folder import ClassCounts

    masks = MaskArray.open(store.path / MASKS, table, store.items)
    return ClassCounts.of(masks.read_mask(row) for row in drawn_rows(store.items).tolist()).words(table)


def _as_trained(
    weights: Path, description: dict[str, Any], diffusion: DiffusionConfig
) -> tuple[DiffusionConfig, list[Problem]]:
    """The process that the weights were trained on; conflicts with the config are problems."""
    trained, differ = as_trained(diffusion, description.get("diffusion", {}))
    problems = []
    for name, (before, now) in differ.items():
        remedy = f"{weights} was trained with {before!r}: give that"
        problems.append(Problem("config", f"diffusion.{name}", repr(now), remedy))
    return trained, problems


def _weaker_digest(weights: Path, description: dict[str, Any], name: str) -> str:
    """The digest of the weaker model's weights, which must be of the same net on the same process."""
    weaker = weights.parent / name
    _, digest = load_denoiser(weaker)
    other = json.loads((weaker / DESCRIPTION).read_text())
    alike = all(
        other.get(key) == description.get(key)
        for key in ("denoiser", "label_table", "size", "modalities", "latent", "cascade")
    )
    if (
        not alike
        or as_trained(DiffusionConfig(), other.get("diffusion", {}))[0]
        != as_trained(DiffusionConfig(), description.get("diffusion", {}))[0]
    ):
        remedy = f"give weights of the same run as {weights}"
        raise problem("config", "sample.sampler.guidance_weights", f"{weaker}, of another net", remedy)
    return digest


def _unlike_training(
    weights: Path, description: dict[str, Any], shards: ShardSet, diffusion: DiffusionConfig, config: SampleConfig
) -> list[Problem]:
    """Conditions that the weights, whose segdiff.json is `description`, were not trained for. Old ones do not have
    every field."""
    from segdiff_dist.denoising.cascade import stage_problems
    from segdiff_dist.denoising.latent_space import sampler_problems
    from segdiff_dist.denoising.sampler_config import guidance_problems

    sampler = config.sampler
    problems = sampler.problems(diffusion) + guidance_problems(sampler, shards.label_table)
    problems += [*sampler_problems(sampler, description), *stage_problems(sampler, weights, description)]
    table = LabelTable.of(description["label_table"])
    if table != shards.label_table or description["size"] > shards.size:
        trained = f"{table.name!r} at {description['size']} pixels"
        others = " with other classes" if table.name == shards.label_table.name and table != shards.label_table else ""
        value = f"{shards.label_table.name!r}{others} at {shards.size} pixels"
        remedy = f"the model was trained on {trained}: prepare the masks so"
        problems.append(Problem(str(shards.root), "label set, size", value, remedy))
    problems += _unknown_organs(config, shards.label_table)
    trained_with = description.get("diffusion", {})
    needed = sampler.needed_dropout
    if needed is not None and not trained_with.get(needed):
        remedy = f"{weights} was trained without diffusion.{needed}: give 1, or train with it"
        problems.append(Problem("config", "sample.sampler.guidance", str(sampler.guidance), remedy))
    return problems


def _unknown_modalities(
    known: tuple[str, ...], shards: ShardSet, rows: np.ndarray, config: SampleConfig
) -> list[Problem]:
    """Modalities that the model does not know, and another one where it knows a single one."""
    wanted = [config.target_modality] if config.target_modality not in ("same", "other") else []
    if config.masks is None and config.target_modality == "same":
        wanted += [shards.modalities[i] for i in np.unique(shards.modality_N[rows])]
    names = f"the model knows {', '.join(known)}"
    problems = [
        Problem("config", "sample.target_modality", one, f"{names}: choose from these")
        for one in wanted
        if one not in known
    ]
    if len(known) == 1 and config.target_modality == "other":
        problems.append(Problem("config", "sample.target_modality", "other", f"{names} alone: give `same`"))
    return problems


def _without_other_modalities(config: SampleConfig, known: tuple[str, ...]) -> SampleConfig:
    """Shipped configurations ask for images of the other modality, and a set may have a single one."""
    if len(known) > 1 or not config.cross_modality_masks:
        return config
    value, reason = config.cross_modality_masks, f"the model knows {known[0]} alone, so none is made"
    warnings.warn(f"sample.cross_modality_masks: {value}: {reason}; set it to 0", stacklevel=3)
    return replace(config, cross_modality_masks=0)


def _unknown_organs(config: SampleConfig, table: LabelTable) -> list[Problem]:
    organs = [table.names[i] for i in table.organ_ids]
    unknown = sorted(set(config.without_organs) - set(organs))
    if not unknown:
        return []
    return [Problem("config", "sample.without_organs", str(unknown), f"choose from {', '.join(organs)}")]
