"""Volumes of several masks as one raw data set of nnU-Net v2, alone or beside real cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.files import new_folder
from data_shards.ingest.itk_files import is_itk, simpleitk
from data_shards.ingest.layouts.base import one_file, volumes_in
from data_shards.ingest.volume_files import ENDINGS, stem
from data_shards.problems import Attempts, Problem, explain_full_disk, problem, refuse
from segdiff_dist.export.config import VolumeConfig
from segdiff_dist.export.files import (
    fold_lines,
    name_problems,
    nnunet_description,
    nnunet_folds,
    nnunet_labels,
    write_description,
)
from segdiff_dist.export.job import out_problems
from segdiff_dist.export.merge import Merge
from segdiff_dist.export.patients import Patients
from segdiff_dist.export.real_set import PROVENANCE
from segdiff_dist.export.samples import plain_case
from segdiff_dist.export.slicewise import Generate
from segdiff_dist.export.volume import VolumeJob, VolumeReport, check_volume, check_voxels, generate_volume
from segdiff_dist.export.volume_out import save_file
from segdiff_dist.sampling.mask_patients import likely_patients

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

# Image and label; before compression.
_BYTES_A_VOXEL = 3


@dataclass(frozen=True)
class VolumeSetJob:
    """A checked job, made by `check_volume_set`. jobs: by the names of the cases. merge: the real cases, if any."""

    out: Path
    jobs: dict[str, VolumeJob]
    ids: np.ndarray
    names: list[str]
    merge: Merge | None

    @property
    def num_bytes(self) -> int:
        """What is written, before compression."""
        own = _BYTES_A_VOXEL * sum(job.num_voxels for job in self.jobs.values())
        return own + (0 if self.merge is None else self.merge.num_bytes(self.out))

    @property
    def num_slices(self) -> int:
        """Of all masks."""
        return sum(job.num_slices for job in self.jobs.values())

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """What a person has to know of the result."""
        patients = Patients(next(iter(self.jobs.values())).shards)
        cases = _cases(self.jobs).values()
        folds = fold_lines(self.out, {*map(patients.of, cases)}) if self.merge is None else self.merge.lines(self.out)
        likely = likely_patients(unnamed := sorted(filter(patients.is_unnamed, cases)))
        if likely is None:
            return folds
        count = f"{len(unnamed)} masks count as {len(unnamed)} patients, since the set does not name theirs"
        wrong = f"a fold may have a patient in both parts if several are of one, as by '{likely[0]}' (here {likely[1]})"
        remedy = "give --data a set that was prepared with --prepare.patient: its pattern is used"
        return (f"{count}: {wrong}; {remedy}", *folds)

    def make(
        self, generate_of: Callable[[int], Generate], size: int, provenance: dict[str, Any]
    ) -> dict[str, VolumeReport]:
        """Write the data set; `generate_of`: the generator of the n-th volume, each with its own noise."""
        refuse(out_problems(self.out))
        # Of all masks before the first image: the folder appears when the last one is made.
        attempts = Attempts()
        for name, job in self.jobs.items():
            attempts.make(name, partial(check_voxels, job))
        refuse(attempts.problems)
        reports = {}
        with explain_full_disk(self.out), new_folder(self.out) as folder:
            for name in ("imagesTr", "labelsTr"):
                (folder / name).mkdir()
            if self.merge is not None:
                self.merge.link(folder)
            for number, (name, job) in enumerate(self.jobs.items()):
                reports[name] = self._make_case(folder, name, job, generate_of(number), size)
            self._describe(folder, provenance)
        return reports

    def _make_case(self, folder: Path, name: str, job: VolumeJob, generate: Generate, size: int) -> VolumeReport:
        """Image and label. Where slices do not reach, there is neither an organ nor a label."""
        made = generate_volume(job, generate, size)
        label_IJK = np.where(made.shown_IJK, self.ids[made.labels.voxels_IJK], 0).astype(np.uint8)
        ending = job.config.file_ending
        save_file(folder / "imagesTr" / f"{name}_0000{ending}", made.values_IJK, job.mask_file)
        save_file(folder / "labelsTr" / f"{name}{ending}", label_IJK, job.mask_file)
        return made.report

    def _describe(self, folder: Path, provenance: dict[str, Any]) -> None:
        first = next(iter(self.jobs.values()))
        config, patients = first.config, Patients(first.shards)
        if self.merge is not None:
            write_description(folder, self.merge.description(self.out.name, None), self.merge.folds())
            provenance = provenance | self.merge.record()
        else:
            settings = (self.out.name, config.modality, self.names, len(self.jobs), config.file_ending)
            patient_of = {name: patients.of(case) for name, case in _cases(self.jobs).items()}
            write_description(folder, nnunet_description(*settings), nnunet_folds(patient_of))
        (folder / PROVENANCE).write_text(json.dumps({"synthetic": True} | provenance, indent=2) + "\n")


def check_volume_set(masks: Path, out: Path, shards: ShardSet, config: VolumeConfig) -> VolumeSetJob:
    """Find the problems that show before a voxel is read; raises InputProblems."""
    files = _masks_in(masks)
    if is_itk(Path(f"x{config.file_ending}")):
        simpleitk(f"--volume.file-ending {config.file_ending}")
    refuse([*config.problems(), *out_problems(out), *name_problems(out), *_body_problems(files, config)])
    jobs, hidden = {}, out.absolute().parent  # a name that is free: the folder appears when all is there
    for name, file in files.items():
        own = replace(config, body_image=_body_of(name, config.body_image))
        target = hidden / f".{out.name}.{name}{config.file_ending}"
        jobs[f"{plain_case(name)}_{config.modality.lower()}_0-volume"] = check_volume(file, target, shards, own)
    table = shards.label_table
    ids, names = nnunet_labels(table, keep_body=config.body_label)
    if config.merge_with is None:
        return VolumeSetJob(out, jobs, ids, names, None)
    merge = Merge.of(
        config.merge_with,
        (config.modality, config.file_ending, 3),
        table,
        _cases(jobs),
        keep_body=config.body_label,
        patients=Patients(shards),
    )
    jobs = {name: job for name, job in jobs.items() if name in merge.entries}
    return VolumeSetJob(out, jobs, merge.ids, names, merge)


def _cases(jobs: dict[str, VolumeJob]) -> dict[str, str]:
    """The case of each mask: its file's name."""
    return {name: str(stem(job.mask_file.name)) for name, job in jobs.items()}


def _masks_in(masks: Path) -> dict[str, Path]:
    if masks.is_file() and (name := stem(masks.name)):
        return {name: masks}
    found, problems = {}, list[Problem]()
    for name, files in volumes_in(masks).items():
        found[name], twice = one_file(files)
        problems += twice
    refuse(problems)
    if not found:
        remedy = f"give a volume of label ids, or a folder of them: {', '.join(ENDINGS)}"
        raise problem(masks, "masks", "no volume", remedy)
    return found


def _body_of(name: str, images: Path | None) -> Path | None:
    """The image of a mask, in a folder: nnU-Net's name of its first channel, or the mask's own name."""
    if images is None or not images.is_dir():
        return images
    files = (images / f"{name}{channel}{ending}" for channel in ("_0000", "") for ending in ENDINGS)
    return next((file for file in files if file.is_file()), None)


def _body_problems(files: dict[str, Path], config: VolumeConfig) -> list[Problem]:
    images = config.body_image
    if images is None or not images.is_dir():
        return []
    missing = [name for name in files if _body_of(name, images) is None]
    remedy = "give a folder with NAME_0000.nii.gz or NAME.nii.gz for each mask NAME"
    return [Problem(str(images), "volume.body_image", f"none for {missing[0]}", remedy)] if missing else []
