"""`segdiff export`: first all problems are reported, then everything is written beside the output folder, which gets
its name last."""

from __future__ import annotations

import csv
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data_shards.files import new_folder
from data_shards.ingest.itk_files import simpleitk
from data_shards.locks import lock_beside, locked
from data_shards.problems import Problem, explain_full_disk, problem, refuse
from segdiff_dist.config import how_to_make
from segdiff_dist.export.config import ExportConfig
from segdiff_dist.export.dicom import dicom_kind, problems_without_kind, require_dicom
from segdiff_dist.export.dicom_pairs import write_dicom_pairs
from segdiff_dist.export.files import fold_lines, nnunet_problems, write_manifest, write_nnunet, write_pairs
from segdiff_dist.export.samples import HU_BY_MEDIAN, FinishedSamples, Sample, unknown_hu
from segdiff_dist.export.shards import write_shard_set
from segdiff_dist.sampling.store import SampleStore
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from segdiff_dist.denoising.config import DiffusionConfig
    from segdiff_dist.denoising.sampler_config import SamplerConfig
    from segdiff_dist.export.merge import Merge
    from segdiff_dist.pipeline import Extras

# Besides its pixels a file takes whole blocks, a directory entry and a header.
_BYTES_PER_FILE = 8192
# Images that are written to measure the time.
_MOST_TIMED = 64


def export_samples(run: Path, out: Path, config: ExportConfig) -> int:
    """Write the finished samples of `run` to the new folder `out`; returns how many.

    The folder gets its name when it is complete: a killed export leaves `.OUT.unfinished`, which the next one replaces.
    Raises InputProblems: store missing, unfinished or damaged, another shard set than the one sampled from, unknown HU,
    `out` not empty, too little room, another process at work on it, no right to write; OutOfSpace.
    """
    job = check_samples(run, out, config)
    with export_lock(out):
        return job.write()


@dataclass(frozen=True)
class SamplesExport:
    """A checked export, made by `check_samples`."""

    samples: FinishedSamples
    out: Path
    config: ExportConfig
    borrows: bool
    num_bytes: int
    """Upper bound, without compression."""
    merge: Merge | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """What a person has to know of the result."""
        known = self.samples.mask_patients
        found = (known.line, known.guess if self.config.format in ("nnunet", "dicom") else None)
        folds: tuple[str, ...] = ()
        if self.merge is not None:
            folds = self.merge.lines(self.out)
        elif self.config.format == "nnunet":
            folds = fold_lines(self.out, {item["patient"] for item in self.samples.items})
        return (*(text for text in found if text is not None), *folds)

    @cached_property
    def seconds(self) -> float | None:
        """Approximate time, from the images of one case, which are written to a temporary folder and removed. None if
        there are too many of them, or no room."""
        num_of = Counter(item["case_id"] for item in self.samples.items)
        fewest = min(num_of, key=lambda case: num_of[case])
        if num_of[fewest] > _MOST_TIMED:
            return None
        some = replace(self.samples, without=self.samples.without | (set(num_of) - {fewest}))
        try:
            for _ in ("with imports", "timed"):
                with TemporaryDirectory(prefix="segdiff-") as folder:
                    begun = time.perf_counter()
                    _write(Path(folder), self.out.name, some, some, self.config, None)
                    each = (time.perf_counter() - begun) / num_of[fewest]
        except OSError:
            return None
        return each * len(self.samples)

    def write(self) -> int:
        """Write the folder, under the lock of `export_lock`; returns the number of images."""
        from data_shards.progress import progress_bar

        out = self.out
        refuse(out_problems(out))  # another command may have written there since the check
        if self.borrows:
            warnings.warn(f"of CT whose masks are of no CT slice, {HU_BY_MEDIAN}", stacklevel=2)
        iterated: Iterable[Sample] = progress_bar(self.samples, total=len(self.samples), desc="export", unit="img")
        with explain_full_disk(out), new_folder(out) as unfinished:
            _write(unfinished, out.name, self.samples, iterated, self.config, self.merge)
        return len(self.samples)


def check_samples(run: Path, out: Path, config: ExportConfig) -> SamplesExport:
    """Open the samples; errors as of export_samples."""
    store = SampleStore.open(config.samples or run / "samples")
    refuse([*config.problems(), *out_problems(out)])
    samples = FinishedSamples.of(store, config.modality, config.patient)
    problems = nnunet_problems(out, samples) if config.format == "nnunet" else []
    if config.needs_simpleitk:
        simpleitk(f"--export.file-ending {config.file_ending}")  # refused if it is not installed
    if config.format == "dicom":
        require_dicom("--export.format dicom")
        problems += problems_without_kind(out, [m for m in samples.modalities if not dicom_kind(m, samples.in_hu(m))])
    borrows = config.writes_values and bool(samples.borrowing)
    if borrows and any(samples.borrowed_map(modality) is None for modality in samples.borrowing):
        problems.append(
            unknown_hu(store.path, "give --format png (nnunet: --export.file-ending .png), which has no HU")
        )
    needed = len(samples) * 2 * (samples.size**2 + _BYTES_PER_FILE)
    if config.format == "dicom":  # 16 bits a pixel, and a bit for each segment of the mask
        needed *= 3
    merge = None
    if config.merge_with is not None and not problems:
        merge = _merge(samples, config)
        samples = replace(samples, without=merge.left_out)
        needed += merge.num_bytes(out)
    refuse([*problems, *room_problems(out, needed)])
    return SamplesExport(samples, out, config, borrows, needed, merge)


def _merge(samples: FinishedSamples, config: ExportConfig) -> Merge:
    from segdiff_dist.export.merge import Merge
    from segdiff_dist.export.patients import Patients
    from segdiff_dist.export.real_slices import Slicing

    assert config.merge_with is not None
    return Merge.of(
        config.merge_with,
        (samples.modalities[0], config.file_ending, 2),
        samples.label_table,
        {item["name"]: item["case_id"] for item in samples.items},
        keep_body=config.body_label,
        patients=Patients(samples.shards, config.patient, samples.mask_patients.by_case),
        slicing=Slicing.of(samples, config.file_ending),
        knows_spacing=samples.knows_places,
    )


def export_model(weights: Path, out: Path, diffusion: DiffusionConfig, sampler: SamplerConfig) -> None:
    """Write the model in `weights` as a pipeline folder: see segdiff_dist.pipeline. Errors as of export_samples."""
    job = check_model(weights, out, diffusion, sampler)
    with export_lock(out):
        job.write()


@dataclass(frozen=True)
class ModelExport:
    """A checked export of a model, made by `check_model`."""

    weights: Path
    out: Path
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    num_bytes: int
    extras: Extras
    is_bundle: bool = False
    lines: tuple[str, ...] = ()

    def write(self) -> None:
        """Write the folder, under the lock of `export_lock`."""
        from segdiff_dist.pipeline import write_bundle, write_pipeline

        out, write = self.out, write_bundle if self.is_bundle else write_pipeline
        with explain_full_disk(out):
            refuse(out_problems(out))  # another command may have written there since the check
            with new_folder(out) as unfinished:
                write(self.weights, unfinished, self.diffusion, self.sampler, self.extras)


def check_model(
    weights: Path, out: Path, diffusion: DiffusionConfig, sampler: SamplerConfig, extras: Extras | None = None
) -> ModelExport:
    """Check the weights; errors as of export_samples."""
    from segdiff_dist.pipeline import Extras, pipeline_problems

    if not (weights / DESCRIPTION).is_file():
        raise problem(weights, "weights", "not found", f"train first: {how_to_make('train', weights)}")
    needed = sum(file.stat().st_size for file in weights.rglob("*"))
    refuse([*out_problems(out), *pipeline_problems(weights, diffusion, sampler), *room_problems(out, needed)])
    return ModelExport(weights, out, diffusion, sampler, needed, extras or Extras())


def export_lock(out: Path) -> AbstractContextManager[None]:
    """While this process makes `out`, others are refused: data_shards.locks."""
    return locked(lock_beside(out), out, "is exporting to it")


def out_problems(out: Path) -> list[Problem]:
    """Whether `out` can become the folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "not empty" if out.is_dir() else "is a file"
        remedy = "give a new or an empty one; an export gets its name when it is complete, so one of this name is whole"
        return [Problem(str(out), "output folder", what, remedy)]
    return []


def room_problems(out: Path, needed_bytes: int) -> list[Problem]:
    """Whether `needed_bytes`, counted without compression, fit beside `out`."""
    existing = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed_bytes <= free:
        return []
    value = f"{free / 2**30:.1f} GiB free, up to {needed_bytes / 2**30:.1f} GiB needed"
    return [Problem(str(out), "disk space", value, "make room, or choose another disk")]


def _write(
    folder: Path,
    name: str,
    samples: FinishedSamples,
    iterated: Iterable[Sample],
    config: ExportConfig,
    merge: Merge | None,
) -> None:
    if config.format == "nnunet":
        write_nnunet(folder, name, samples, iterated, config, merge)
    elif config.format == "dicom":
        write_dicom_pairs(folder, samples, iterated)
    elif config.format == "shards":
        write_shard_set(folder, samples, iterated, config)
        return  # its index and table say the rest
    else:
        write_pairs(folder, iterated, config.pair_ending)
        if config.pair_ending != ".png":
            write_manifest(folder, samples, config.pair_ending)
    _write_provenance(folder, samples, merge)


def _write_provenance(folder: Path, samples: FinishedSamples, merge: Merge | None) -> None:
    """provenance.json, and items.csv: which mask each image belongs to."""
    table = samples.label_table
    description: dict[str, Any] = samples.provenance | {"label_table": list(table.names)}
    if table.colours is not None:
        description["label_colours"] = list(table.colours)
    if not samples.knows_places:
        description["geometry"] = "not kept of masks from a folder: spacing is written as 1 mm"
    if merge is not None:
        description |= merge.record()
    (folder / "provenance.json").write_text(json.dumps(description, indent=2) + "\n")
    with (folder / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        columns = ["name", *(name for name in samples.items[0] if name not in ("name", "row"))]
        rows.writerow([*columns, *samples.facts(samples.items[0])])
        for item in samples.items:
            rows.writerow([*(item[column] for column in columns), *samples.facts(item).values()])
