"""The images of a finished sample store with their metadata: the source of all export formats.

Dimensions: H rows, W columns.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.documents import read_json, reading
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.labels import LABEL_TABLES, LabelTable
from data_shards.modalities import grey_rule, in_hu, in_order, is_in_hu, window_of
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.records import SPLITS, SliceMeta, SliceRecord
from segdiff_dist.export.patients import Patients
from segdiff_dist.sampling.mask_patients import NAMED, MaskPatients, mask_patients
from segdiff_dist.sampling.store import JOB, LABELS, SampleStore
from segdiff_dist.sampling.weights import weights_digest
from segdiff_dist.weight_files import DESCRIPTION

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

# Samples are uint8; the set that the model was trained on may hold 16 bits.
GREY_16_OF_8 = 257
# A tar's header holds 100 bytes of a name; export and codec add at most 40 to that of a case.
_LONGEST_CASE = 60
# For volumes that were each stretched to their own percentiles (prepare.intensity paper).
HU_BY_MEDIAN = (
    "HU are those of a typical volume, by the median of the maps of the set's CT slices: each volume was stretched to "
    "its own percentiles (prepare.intensity paper), and an image that belongs to none of them has no HU of its own"
)


@dataclass(frozen=True)
class Sample:
    """A generated slice. `record.meta` is that of the mask's slice if it has one, with changes for the synthetic image:
    modality, intensities, an own case_id, and the digest of the model instead of the source file's. `name` holds
    neither dot nor slash and is unique in the store: it is the key of `record.meta`. `knows_place`: spacing and affine
    are those of the slice; for masks of a folder they are not kept."""

    name: str
    record: SliceRecord
    knows_place: bool


@dataclass(frozen=True)
class FinishedSamples:
    """A complete sample store: the images of one modality, or all; without those of the masks of some cases. `patient`:
    the pattern of export.patient."""

    store: SampleStore
    modality: str | None = None
    without: frozenset[str] = frozenset()
    patient: str | None = None

    @classmethod
    def of(cls, store: SampleStore, modality: str | None, patient: str | None = None) -> FinishedSamples:
        """The store's samples. Refused: missing or damaged images, no image of the modality, another shard set than the
        one sampled from, a pattern for patients that the masks do not need or fit."""
        problems = []
        if "images" in store.job:  # of segdiff evaluate --images
            value = f"another system's, read from {store.job['images']}"
            problems.append(Problem(str(store.path), "samples", value, "use the files there"))
        again = "start the same `segdiff sample` again"
        if missing := len(store.missing()):
            problems.append(Problem(str(store.path), "samples", f"{missing:,} of {len(store):,} missing", again))
        if damaged := list(store.damaged()):
            value = f"{len(damaged)} files are not as they were written, the first: {damaged[0].file}"
            problems.append(Problem(str(store.path), "samples", value, again))
        targets = sorted(set(store.items["target_modality"].to_pylist()))
        if not targets or modality not in (None, *targets):
            remedy = f"choose from {', '.join(targets)}"
            problems.append(Problem(str(store.path), "export.modality", f"no image of {modality}", remedy))
        if patient is not None and "shards" in store.job:
            remedy = "leave it out: the shard set names the patients of its masks (prepare --prepare.patient)"
            problems.append(Problem("config", "export.patient", patient, remedy))
        samples = cls(store, modality, patient=patient)
        try:
            shards = samples._shards
            _ = samples.mask_patients
            _ = samples.label_table  # refused before the first file is written
        except InputProblems as error:
            raise InputProblems([*problems, *error.problems]) from error
        if shards is not None and shards.digest != store.job["shards_digest"]:
            problems.append(
                Problem(shards.root, "digest", "not the shard set sampled from", "restore it, or sample again")
            )
        refuse(problems)
        return samples

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """The items chosen, ordered as shard sets are: by split, case, axis, slice. Their `name` is Sample.name, their
        `case` CASE_ct_0, CASE_ct_1, ...: one for each image of the same mask and modality."""
        made: Counter[tuple[str, str]] = Counter()
        patients, by_mask, items = Patients(self._shards), self.mask_patients.by_case, []
        for item in self.store.items.to_pylist():
            of = (item["key"], item["target_modality"])
            item["case"] = f"{plain_case(item['case_id'])}_{of[1].lower()}_{made[of]}"
            item["name"] = f"{item['case']}-{item['axis']}-{item['slice_index']:04d}"
            case = item["case_id"]
            item["patient"] = by_mask.get(case, case) if self._shards is None else patients.of(case)
            made[of] += 1
            if self.modality in (None, of[1]) and item["case_id"] not in self.without:
                items.append(item)
        return sorted(items, key=lambda i: (SPLITS.index(self._split(i)), i["case"], i["axis"], i["slice_index"]))

    @cached_property
    def mask_patients(self) -> MaskPatients:
        """Those of a folder's masks, as far as they are named."""
        if self._shards is not None:
            return MaskPatients()
        return mask_patients(self.store.items, self.store.job, self.patient, "export")

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sample]:
        """Samples in the order of `items`, read one at a time."""
        for item in self.items:
            yield self._sample(item)

    @property
    def size(self) -> int:
        """Rows and columns of an image."""
        return int(self.store.image.shape[-1])

    @cached_property
    def label_table(self) -> LabelTable:
        """The meaning of the masks' ids: for masks of a folder, from job.json. Raises InputProblems if it is not
        known."""
        if self._shards is not None:
            return self._shards.label_table
        where = self.store.path / JOB
        job = self.store.job
        if LABELS in job:
            return _label_table(where, job[LABELS])
        # A job of an earlier version: its model knows the table, and the sets of `segdiff prepare` name theirs.
        model = Path(job["weights"]) / DESCRIPTION
        if model.is_file() and weights_digest(model.parent) == job["weights_digest"]:
            with reading(model, "a model's description", "copy the weights again"):
                return _label_table(model, read_json(model, "copy the weights again")[LABELS])
        name = self._preprocessing.get("label_set")
        if name not in LABEL_TABLES:
            remedy = "start the same `segdiff sample` again: it writes the table down"
            raise problem(where, LABELS, "not there", remedy)
        return LABEL_TABLES[name]

    @property
    def modalities(self) -> list[str]:
        """Those of the samples."""
        return sorted({item["target_modality"] for item in self.items})

    @property
    def shards(self) -> ShardSet | None:
        """The set that the masks come from; None for masks of a folder."""
        return self._shards

    @property
    def knows_places(self) -> bool:
        """Whether spacing and position of the slices are known; for a folder of masks they are not kept."""
        return self._shards is not None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of the masks' slices, with size and depth of the samples."""
        return self._preprocessing | {"size": self.size, "bits": 8, "soft_edge": False}

    @property
    def origin(self) -> dict[str, Any]:
        """The job that made the images: the same for each of them."""
        job = self.store.job
        names = ("weights_digest", "shards_digest", "masks_digest", "diffusion", "sample")
        of_guides = ("guidance_segmenter_sha256", "guidance_weights_digest")
        of_job = {name: job[name] for name in names + of_guides if name in job}
        return {"synthetic": True, "made_by": "segdiff sample"} | of_job

    @property
    def provenance(self) -> dict[str, Any]:
        """The origin of the images, to be kept with them, and what was assumed of those that are exported."""
        named = self.mask_patients.line
        return self.origin | ({"hu": HU_BY_MEDIAN} if self.borrowing else {}) | ({NAMED: named} if named else {})

    @cached_property
    def borrowing(self) -> tuple[str, ...]:
        """Modalities in HU with images from masks that have no slice of it, where no common window gives them HU."""
        borrow = in_order(i["target_modality"] for i in self.items if i["target_modality"] != i["source_modality"])
        return in_hu(borrow, self._preprocessing) if is_stretched(self._preprocessing) else ()

    def in_hu(self, modality: str) -> bool:
        """Whether images of a modality are in HU."""
        return is_in_hu(modality, self._preprocessing)

    def borrowed_map(self, modality: str) -> GreyMap | None:
        """The grey map of images whose masks have no slice of their modality."""
        return grey_map_of(modality, self._preprocessing, self._shards)

    @cached_property
    def _shards(self) -> ShardSet | None:
        from data_shards.store.shards import ShardSet

        return ShardSet.open(self.store.job["shards"]) if "shards" in self.store.job else None

    @cached_property
    def _preprocessing(self) -> dict[str, Any]:
        index: dict[str, Any] = self.store.job.get("masks_cut_like", {})
        return dict(index if self._shards is None else self._shards.index["preprocessing"])

    def stated_split(self, item: dict[str, Any]) -> str:
        """The split of an item's mask, or of the export's setting; empty for masks of a folder."""
        return "" if self._shards is None else self._split(item)

    def facts(self, item: dict[str, Any]) -> dict[str, str]:
        """What a picture of an item does not state, for a table: the split of its mask, and what pixels mean. Empty
        where it is not known."""
        target = item["target_modality"]
        source = None if self._shards is None else self._shards.meta(item["row"])
        spacing = "" if source is None else " ".join(f"{one:.10g}" for one in source.spacing_mm)
        is_known = self.in_hu(target) and (target not in self.borrowing or self.borrowed_map(target) is not None)
        grey = self._grey_map(source, target) if is_known else None
        scale, offset = ("", "") if grey is None else (repr(grey.scale), repr(grey.offset))
        return {"split": self.stated_split(item), "spacing_mm": spacing, "scale": scale, "offset": offset}

    def _split(self, item: dict[str, Any]) -> str:
        return "train" if self._shards is None else SPLITS[self._shards.split_N[item["row"]]]

    def _sample(self, item: dict[str, Any]) -> Sample:
        at, target = item["item_id"], item["target_modality"]
        image_HW, mask_HW = np.asarray(self.store.image[at]), np.asarray(self.store.mask[at])
        source = None if self._shards is None else self._shards.meta(item["row"])
        grey = self._grey_map(source, target)
        made_from = f"{self.store.job['weights_digest']} {at}"
        changes: dict[str, Any] = {
            "case_id": item["case"],
            "modality": target,
            "intensity_scale": grey.scale,
            "intensity_offset": grey.offset,
            "labels_present": tuple(int(i) for i in np.unique(mask_HW) if i),
            "source_sha256": hashlib.sha256(made_from.encode()).hexdigest(),
            "bits": 8,
        }
        if source is None:
            place = (item["axis"], item["slice_index"], "train", (1.0, 1.0), tuple(np.eye(4).ravel().tolist()))
            meta = SliceMeta(
                item["case"], target, *place, grey.scale, grey.offset, self.label_table.name,
                changes["labels_present"], True, changes["source_sha256"],
            )  # fmt: skip
        else:
            meta = replace(source, affine=self._cropped(source.affine), **changes)
        return Sample(item["name"], SliceRecord(image_HW, mask_HW, meta), source is not None)

    def _cropped(self, affine: tuple[float, ...]) -> tuple[float, ...]:
        """The affine of the centre that the model generates, from that of the whole slice."""
        assert self._shards is not None
        return cropped_affine(affine, (self._shards.size - self.size) // 2)

    def _grey_map(self, source: SliceMeta | None, target: str) -> GreyMap:
        """value = grey * scale + offset: those of the mask's own slice if the modality is the same; else those of CT in
        the set; for MR, which has no unit, the grey value itself."""
        if source is not None and source.modality == target:
            step = GREY_16_OF_8 if source.bits == 16 else 1
            return GreyMap(source.intensity_scale * step, source.intensity_offset)
        # Formats with HU refuse unknown HU, so only formats of grey values get here.
        return self.borrowed_map(target) or GreyMap(1.0, 0.0)


def _label_table(where: Path, content: Any) -> LabelTable:
    try:
        return LabelTable.of(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise problem(where, LABELS, f"cannot be used ({error})", "restore the file, or sample again") from error


def cropped_affine(affine: tuple[float, ...], first: int) -> tuple[float, ...]:
    """The affine of a slice's pixels from `first` on, along rows and columns."""
    to_whole = np.eye(4)
    to_whole[:2, 3] = first
    return tuple((np.array(affine).reshape(4, 4) @ to_whole).ravel().tolist())


def is_stretched(preprocessing: dict[str, Any]) -> bool:
    """Whether a grey value means another HU in each CT volume of the set."""
    return bool(preprocessing.get("intensity", PrepareConfig.intensity) == "paper")


def grey_map_of(modality: str, preprocessing: dict[str, Any], shards: ShardSet | None) -> GreyMap | None:
    """The meaning of uint8 grey values of generated images without a real volume. A modality with percentiles: the grey
    value itself. With a window: its values. In HU, if each volume was stretched to its own percentiles: by the median
    scale and offset of the set's slices, or None if the set is not available or has none."""
    kind = grey_rule(modality, preprocessing.get("intensities") or {}).kind
    if kind == "percentiles":
        return GreyMap(1.0, 0.0)
    if kind == "values" or not is_stretched(preprocessing):
        return GreyMap.between(*window_of(modality, preprocessing, PrepareConfig.hu_window), 8)
    if shards is None or not len(rows := shards.select(modalities=[modality], labelled_only=False)):
        return None
    scale, offset = (
        float(np.median(shards.samples[name].to_numpy()[rows])) for name in ("intensity_scale", "intensity_offset")
    )
    return GreyMap(scale * (GREY_16_OF_8 if shards.bits == 16 else 1), offset)


def unknown_hu(where: object, remedy: str) -> Problem:
    """The problem if grey_map_of gives None."""
    value = "not known: each CT volume was stretched to its own percentiles (prepare.intensity paper)"
    return Problem(str(where), "HU", value, remedy)


def plain_case(case_id: str) -> str:
    """A case's name in a form that every format and a tar's header accept, without dots. A digest distinguishes names
    that would become equal."""
    plain = case_id.replace(".", "_")[:_LONGEST_CASE]
    if plain == case_id:
        return case_id
    return f"{plain[: _LONGEST_CASE - 9]}_{hashlib.sha256(case_id.encode()).hexdigest()[:8]}"
