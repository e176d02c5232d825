"""Programs as independent segmenters: an installed TotalSegmentator, or any command. They label volumes, not slices.

A command runs with your rights. So it is used only if the user names it.

totalsegmentator    the installed program
TOOL.yaml           a command: ToolConfig

Dimensions: I, J, K voxels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.choices import Modality
from data_shards.ingest.annotate_config import AnnotateConfig
from data_shards.labels import BACKGROUND, BODY, UNUSED, WHOLEBODY, LabelTable
from data_shards.modalities import MODALITIES, OF_MR
from data_shards.problems import Problem, problem, refuse
from data_shards.ranges import Positive
from data_shards.settings import Execution, Result
from segdiff_dist.config import read_yaml, validate

if TYPE_CHECKING:
    from data_shards.ingest.volumes import Volume

TOTALSEGMENTATOR = "totalsegmentator"
_MOST_IDS = 256
_NECK_VESSELS = ("subclavian_artery", "brachiocephalic_vein", "common_carotid_artery")
# The classes of the whole-body table that TotalSegmentator's tasks `total` and `total_mr` do not label.
_NOT_LABELLED = {BODY, UNUSED, "subcutaneous_fat", "muscle", "inner_fat", "vertebra_posterior_elements"}
_NOT_LABELLED |= {"spinal_channel", "bone_other", "IVD"}
# Further ones that `total_mr` does not label (its classes of version 2.18).
_NOT_LABELLED_ON_MR = {"lung_upper_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right", "pulmonary_vein"}
_NOT_LABELLED_ON_MR |= {"atrial_appendage_left", "superior_vena_cava", "brachiocephalic_trunk"}
_NOT_LABELLED_ON_MR |= {f"{name}_{side}" for name in _NECK_VESSELS for side in ("left", "right")}
_NOT_LABELLED_ON_MR |= {"trachea", "thyroid_gland", "sternum", "costal_cartilages"}
# AMOS' experts drew the uterus with the prostate.
_ALSO_CALLED = {"prostate_uterus": "prostate"}


@dataclass(frozen=True)
class ToolConfig:
    """A command that labels a volume."""

    command: Result[str]
    """{image}, {mask}, {modality} and {case_id} are filled in word by word, without a shell. {image} is a
    NIfTI file, CT in HU; the command writes {mask}, a NIfTI file of label ids."""
    version_command: Result[str | None] = None
    """A command that prints the version of the tool. The first line is recorded."""
    names: Result[dict[int, str] | None] = None
    """The class of each id, organs named as in the masks' label table. null: the whole-body table's ids."""
    modalities: Result[tuple[Modality, ...]] = MODALITIES
    """The modalities that it labels."""
    timeout_s: Execution[Positive | None] = None
    """Longest time for one volume. null: no limit."""


@dataclass(frozen=True)
class ToolSegmenter:
    """A program that labels volumes. `names`: by its id; `own_of`: uint8 [256], the masks' table's id by its own."""

    where: str
    config: AnnotateConfig
    names: dict[int, str]
    version: str | None
    own_of: np.ndarray = field(default_factory=lambda: np.arange(_MOST_IDS, dtype=np.uint8))

    @property
    def label_table(self) -> LabelTable:
        """Its classes; their ids here are not its own."""
        others = [name for id_, name in sorted(self.names.items()) if id_]
        return LabelTable(self.config.tool, (BACKGROUND, *dict.fromkeys(others)))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it labels."""
        return self.config.modalities or (*MODALITIES, *OF_MR)

    @property
    def weights_sha256(self) -> str:
        """The digest of command, version and classes."""
        known = json.dumps([self.config.template, self.version, self.names], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()

    def suited(self, table: LabelTable, hu: tuple[float, float] | None) -> ToolSegmenter:
        """The same, for masks of a table; classes that the table does not have become background."""
        own_of = np.zeros(_MOST_IDS, np.uint8)
        ids = {_ALSO_CALLED.get(name, name): i for i, name in enumerate(table.names)}
        ids |= {name: i for i, name in enumerate(table.names)}
        for theirs, name in self.names.items():
            own_of[theirs] = ids.get(name, 0)
        return replace(self, own_of=own_of)

    def problems(
        self, table: LabelTable, modalities: Sequence[str], hu: tuple[float, float] | None
    ) -> Iterator[Problem]:
        """Conflicts with images of these modalities whose masks are of `table`."""
        known, organs = set(self.names.values()), [table.names[i] for i in table.organ_ids]
        if self.config.tool == TOTALSEGMENTATOR and any(modality != "CT" for modality in modalities):
            known -= _NOT_LABELLED_ON_MR
        if unknown := [name for name in organs if not {name, _ALSO_CALLED.get(name, name)} & known]:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            value = f"it does not label {len(unknown)} of the masks' {len(organs)} organs: {shown}"
            yield Problem(
                self.where, "names", value, "name its classes as the masks' table does, or give another segmenter"
            )
        if others := [m for m in modalities if m not in self.modalities]:
            value = f"for {', '.join(self.modalities)}, the images are {', '.join(others)}"
            yield Problem(self.where, "modalities", value, "give one that labels these images")

    def label(self, volume: Volume, modality: str, case_id: str, work: Path) -> np.ndarray:
        """uint8 [I, J, K] ids of the masks' table; files are in the folder `work`. RuntimeError if it fails."""
        import nibabel as nib

        from data_shards.ingest.cases import Case
        from data_shards.ingest.masks import resampled_to_grid
        from data_shards.ingest.tool import run_tool
        from data_shards.ingest.totalsegmentator import to_wholebody_ids
        from data_shards.ingest.volumes import UnreadableVolume, read_labels

        image, mask, own = (work / name for name in ("image.nii.gz", "mask.nii.gz", "own.nii.gz"))
        nib.save(nib.Nifti1Image(volume.voxels_IJK, volume.affine), image)
        words = self.config.words(Case(case_id, modality, "", image, None), mask)
        if reason := run_tool(words, work / "tool.log", self.config.timeout_s):
            raise RuntimeError(reason)
        try:
            if self.config.tool == TOTALSEGMENTATOR:
                to_wholebody_ids(mask, own)
                mask = own
            labels = resampled_to_grid(read_labels(mask, _MOST_IDS), volume.voxels_IJK.shape, volume.affine, mask)
        except (UnreadableVolume, FileNotFoundError) as error:
            raise RuntimeError(f"the label map of {case_id} cannot be used: {error}") from error
        return self.own_of[labels.voxels_IJK]


def is_tool(path: Path) -> bool:
    """Whether a segmenter is a program rather than a network."""
    return (path.name.lower() == TOTALSEGMENTATOR and not path.exists()) or path.suffix in (".yaml", ".yml")


def open_tool(path: Path) -> ToolSegmenter:
    """The program. Raises InputProblems: not installed, a command that cannot be used."""
    from data_shards.ingest.annotate import tool_version

    if path.name.lower() == TOTALSEGMENTATOR and not path.exists():
        config = AnnotateConfig()
        names = {i: name for i, name in enumerate(WHOLEBODY.names) if name not in _NOT_LABELLED}
    else:
        if not path.is_file():
            raise problem(path, "segmenter", "no such file", "give a file that describes a command (docs/metrics.md)")
        described = validate(ToolConfig, read_yaml(path), path)
        config = AnnotateConfig(
            tool="command",
            command=described.command,
            version_command=described.version_command,
            modalities=described.modalities,
            timeout_s=described.timeout_s,
        )
        names = _names(path, described)
    refuse(config.problems(str(path)))
    version, wrong = tool_version(config)
    refuse(wrong)
    return ToolSegmenter(str(path), config, names, version)


def _names(path: Path, described: ToolConfig) -> dict[int, str]:
    if described.names is None:
        return dict(enumerate(WHOLEBODY.names))
    wrong = [i for i in described.names if not 0 <= i < _MOST_IDS]
    if wrong or described.names.get(0, BACKGROUND) != BACKGROUND:
        value: Any = f"ids {wrong}" if wrong else f"0 is {described.names[0]!r}"
        raise problem(path, "names", value, f"use ids up to {_MOST_IDS - 1}; 0 is {BACKGROUND}")
    return {0: BACKGROUND} | described.names
