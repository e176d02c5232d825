"""Synthetic cases beside the real ones of an nnU-Net data set (`--merge-with`), without leakage.

A synthetic case of a mask of patient P does not train a fold that validates P, nor is it in the data set at all if P is
one of the test cases. No synthetic case is ever validated on.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.labels import LabelTable
from data_shards.problems import Problem, refuse
from segdiff_dist.export.files import copy_folds, nnunet_folds
from segdiff_dist.export.patients import Patients
from segdiff_dist.export.real_set import FOLDERS, RealSet
from segdiff_dist.export.real_slices import RealSlices, Slicing


@dataclass(frozen=True)
class Merge:
    """Real and synthetic cases of one data set. ids: uint8 [256] from the model's label ids to the data set's. entries:
    the case of its mask for each synthetic case. left_out: cases of masks whose patients are test cases. of_real: the
    patient of each real case. slices: of real volumes beside synthetic slices; None if cases go in as they are."""

    real: RealSet
    ids: np.ndarray
    entries: Mapping[str, str]
    left_out: frozenset[str]
    of_real: Mapping[str, str]
    patients: Patients
    slices: RealSlices | None = None

    @classmethod
    def of(
        cls, root: Path, kind: tuple[str, str, int], table: LabelTable, entries: Mapping[str, str], **how: Any
    ) -> Merge:
        """Checked; raises InputProblems. `kind`: modality, ending and dimensions of the synthetic images. `how`:
        keep_body, the `patients` of the masks, `slicing`, by which real volumes are cut, and `knows_spacing`: whether
        the synthetic images have that of their masks."""
        real, patients = RealSet.read(root), how["patients"]
        ids, problems = real.ids_of(table, keep_body=how["keep_body"])
        slices = _slices_of(real, how.get("slicing"))
        problems += real.unlike(*kind, is_cut=slices is not None)
        problems += () if how.get("knows_spacing", True) else real.unlike_spacing()
        same_files = patients.same_files(real)
        of_real = patients.of_real(same_files)
        tested = {of_real[case] for case in real.tests}
        left_out = frozenset(case for case in entries.values() if patients.of(case) in tested)
        kept = {name: case for name, case in entries.items() if case not in left_out}
        merge = cls(real, ids, kept, left_out, of_real, patients, slices)
        refuse([*problems, *merge._problems()])
        merge._warn(len(entries))
        if real.num_dimensions() == 3:  # slices of the set's volumes have these volumes' names
            merge._warn_of(patients.namesakes(same_files))
        return merge

    def folds(self) -> list[dict[str, list[str]]]:
        """Those of the real cases; a synthetic case trains where its mask's patient is not validated."""
        of_real = self.of_real
        folds = self.real.folds or nnunet_folds({case: of_real[case] for case in self.real.cases})
        made = []
        for fold in folds:
            validated = {of_real[case] for case in fold["val"]}
            added = [name for name, case in self.entries.items() if self.patients.of(case) not in validated]
            train, val = (self._files_of(fold[split]) for split in ("train", "val"))
            made.append({"train": sorted([*train, *added]), "val": sorted(val)})
        return made

    def _files_of(self, cases: Iterable[str]) -> list[str]:
        """The names of real cases in the new data set."""
        return list(cases) if self.slices is None else [name for case in cases for name in self.slices.names[case]]

    @cached_property
    def _patient_of_file(self) -> dict[str, str]:
        return {name: self.of_real[case] for case in self.real.cases for name in self._files_of([case])}

    def link(self, folder: Path) -> None:
        """Every real file under its own name: hard links, or copies where the disk is another one. Or slices."""
        if self.slices is not None:
            self.slices.write(folder)
            return
        for name in FOLDERS:
            files = sorted((self.real.root / name).iterdir()) if (self.real.root / name).is_dir() else []
            if files:
                (folder / name).mkdir(exist_ok=True)
            for file in files:
                if file.is_file() and not file.name.startswith("."):
                    _link(file, folder / name / file.name)

    def description(self, name: str, reader: str | None) -> dict[str, Any]:
        """dataset.json: the real one's channels and labels; `reader` as theirs if it is None."""
        description = "real cases, and synthetic images by segmentation-guided diffusion; not for diagnosis"
        num = len(self._files_of(self.real.cases)) + len(self.entries)
        content = self.real.content | {"numTraining": num}
        if self.slices is not None:
            content["file_ending"] = self.slices.how.ending
        content |= {"name": name, "description": description}
        return content | ({} if reader is None else {"overwrite_image_reader_writer": reader})

    def record(self) -> dict[str, Any]:
        """For provenance.json: which cases are synthetic, and what each fold's numbers rest on."""
        seen, patient_of = self.patients.trained_on, self._patient_of_file
        folds = [
            {
                "real": len(set(fold["train"]) - self.entries.keys()),
                "synthetic": len(set(fold["train"]) & self.entries.keys()),
                "synthetic_left_out": len(self.entries) - len(set(fold["train"]) & self.entries.keys()),
                "val": len(fold["val"]),
                "val_seen_by_model": None if seen is None else sum(patient_of[name] in seen for name in fold["val"]),
            }
            for fold in self.folds()
        ]
        return {
            "merged_with": self.real.root.name,
            "real_cases": len(self.real.cases),
            "synthetic_cases": sorted(self.entries),
            "left_out_as_of_test_patients": sorted(self.left_out),
            "folds": folds,
        }

    def lines(self, out: Path) -> tuple[str, ...]:
        """What a person has to know."""
        record = self.record()
        found = [f"with {len(self.real.cases):,} real cases of {self.real.root}; labels are its own"]
        if self.slices is not None:
            how, num = self.slices.how, len(self._files_of(self.real.cases))
            found.append(f"its volumes are cut into {num:,} slices ({', '.join(how.axes)}; {how.spacing_mm:g} mm)")
        for number, fold in enumerate(record["folds"]):
            text = f"fold {number}: {fold['real']} real and {fold['synthetic']} synthetic cases for training"
            text += f" ({fold['synthetic_left_out']} synthetic left out), {fold['val']} real for validation"
            if fold["val_seen_by_model"]:
                text += f"; the diffusion model was trained on the patients of {fold['val_seen_by_model']} of these"
            found.append(text)
        return (*found, copy_folds(out, "nnU-Net validates synthetic cases"))

    def num_bytes(self, out: Path) -> int:
        """What the real files take, where they have to be copied or cut."""
        if self.slices is not None:
            return self.slices.num_bytes
        there = next(folder for folder in out.absolute().parents if folder.is_dir())
        if there.stat().st_dev == self.real.root.stat().st_dev:
            return 0
        files = (file for name in FOLDERS for file in (self.real.root / name).glob("*"))
        return sum(file.stat().st_size for file in files)

    def _problems(self) -> list[Problem]:
        where = str(self.real.root)
        problems: list[Problem] = []
        if not self.entries:
            remedy = "make images of the masks of training patients: segdiff sample --split train"
            problems.append(Problem(where, "imagesTs", "has the patients of all masks", remedy))
        if same := sorted(self.entries.keys() & self._names_taken()):
            problems.append(Problem(where, f"case {same[0]}", "is the name of a synthetic case too", "rename it"))
        if len({self.of_real[case] for case in self.real.cases}) < 2 and not self.real.folds:
            remedy = "without folds nnU-Net would validate synthetic cases: give cases of two patients or more"
            problems.append(Problem(where, "patients", "one alone", remedy))
        return problems

    def _names_taken(self) -> set[str]:
        """Those of real cases, and of files that are linked though they are no whole case: a synthetic case of this
        name would be written into the data set's own file."""
        names = {*self._files_of(self.real.cases), *self._files_of(self.real.tests)}
        return (
            names
            if self.slices is not None
            else names | self.real.names_in("imagesTr") | self.real.names_in("labelsTr")
        )

    def _warn(self, num_entries: int) -> None:
        of_real = self.of_real
        known = set(of_real.values())
        strangers = [name for name, case in self.entries.items() if self.patients.of(case) not in known]
        if strangers:
            text = (
                f"{len(strangers)} of {num_entries} synthetic cases ({strangers[0]}) are of masks of patients that are "
                f"not in {self.real.root} by case id or image file: they train every fold. If these patients are there "
                "under other names, a fold validates what it was trained on"
            )
            warnings.warn(text, stacklevel=3)
        if self.left_out:
            text = (
                f"images of {len(self.left_out)} masks are left out: {self.real.root} has their patients as test cases"
            )
            warnings.warn(text, stacklevel=3)
        for number, fold in enumerate(self.real.folds):
            if both := {of_real[c] for c in fold["train"]} & {of_real[c] for c in fold["val"]}:
                text = f"{self.real.root}: fold {number} of splits_final.json trains and validates {sorted(both)[0]}"
                warnings.warn(text, stacklevel=3)

    def _warn_of(self, namesakes: list[str]) -> None:
        if namesakes:
            have = "case of {} ({}) has" if len(namesakes) == 1 else "cases of {} ({}) have"
            text = (
                f"{len(namesakes)} {have.format(self.real.root, namesakes[0])} the name of a case of the shard set, "
                "but another image file: the patient counts as the same. If it is another one, rename the case"
            )
            warnings.warn(text, stacklevel=3)


def _slices_of(real: RealSet, slicing: Slicing | None) -> RealSlices | None:
    """The slices of a data set of volumes, for pixels that have stored values."""
    is_cut = slicing is not None and slicing.ending != ".png" and real.num_dimensions() == 3
    return RealSlices(real, slicing) if slicing is not None and is_cut else None


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)
