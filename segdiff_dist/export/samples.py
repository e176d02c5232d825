"""The images of a finished sample store, each with everything known of it: what all formats are written from.

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
from data_shards.problems import InputProblems, Problem, problem, refuse
from data_shards.records import SPLITS, SliceMeta, SliceRecord
from segdiff_dist.sampling.store import JOB, LABELS, SampleStore
from segdiff_dist.sampling.weights import weights_digest

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

# Of stored grey values: samples are uint8, a set they were learned from may hold 16 bits.
GREY_16_OF_8 = 257
# A tar's header takes 100 bytes of a name: what an export and a codec add to a case's are 40 at most.
_LONGEST_CASE = 60
# Of volumes that were each stretched to their own percentiles (prepare.intensity paper).
HU_BY_MEDIAN = (
    "HU are those of a typical volume, by the median of the maps of the set's CT slices: each volume was stretched to "
    "its own percentiles (prepare.intensity paper), and an image that belongs to none of them has no HU of its own"
)


@dataclass(frozen=True)
class Sample:
    """A generated slice. `record.meta` is that of the mask's slice where it has one, with what is synthetic put right:
    modality, intensities, an own case_id, the digest of the model in place of the source file's. `name` holds neither
    dot nor slash and is unique in the store: it is the key of `record.meta`. `knows_place`: spacing and affine are the
    slice's; of masks of a folder they are not kept."""

    name: str
    record: SliceRecord
    knows_place: bool


@dataclass(frozen=True)
class FinishedSamples:
    """A sample store of which every image is there, as one modality's or as all."""

    store: SampleStore
    modality: str | None = None

    @classmethod
    def of(cls, store: SampleStore, modality: str | None) -> FinishedSamples:
        """The store's samples; refused: images missing or damaged, no image of the modality, another shard set in place
        of the one sampled from."""
        problems = []
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
        samples = cls(store, modality)
        try:
            shards = samples._shards
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
        items = []
        for item in self.store.items.to_pylist():
            of = (item["key"], item["target_modality"])
            item["case"] = f"{_plain(item['case_id'])}_{of[1].lower()}_{made[of]}"
            item["name"] = f"{item['case']}-{item['axis']}-{item['slice_index']:04d}"
            made[of] += 1
            if self.modality in (None, of[1]):
                items.append(item)
        return sorted(items, key=lambda i: (SPLITS.index(self._split(i)), i["case"], i["axis"], i["slice_index"]))

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
        """What the masks' ids mean: of masks of a folder, by job.json. Raises InputProblems where nothing says it."""
        if self._shards is not None:
            return self._shards.label_table
        where = self.store.path / JOB
        job = self.store.job
        if LABELS in job:
            return _label_table(where, job[LABELS])
        # A job of an earlier version: its model knows the table, and the sets of `segdiff prepare` name theirs.
        model = Path(job["weights"]) / "segdiff.json"
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
    def knows_places(self) -> bool:
        """Whether spacing and place of the slices are known; of a folder of masks they are not kept."""
        return self._shards is not None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the masks' slices were made, with size and depth of the samples."""
        return self._preprocessing | {"size": self.size, "bits": 8, "soft_edge": False}

    @property
    def provenance(self) -> dict[str, Any]:
        """What made the images, to be kept beside them."""
        job = self.store.job
        names = ("weights_digest", "shards_digest", "masks_digest", "diffusion", "sample")
        of_guides = ("guidance_segmenter_sha256", "guidance_weights_digest")
        provenance = {"synthetic": True, "made_by": "segdiff sample"} | {
            name: job[name] for name in names + of_guides if name in job
        }
        return provenance | ({"hu": HU_BY_MEDIAN} if self.has_borrowed_hu else {})

    @cached_property
    def has_borrowed_hu(self) -> bool:
        """Whether there is CT of masks that are of no CT slice, and no window for all that gives it HU."""
        borrows = any(i["target_modality"] == "CT" != i["source_modality"] for i in self.items)
        return borrows and is_stretched(self._preprocessing)

    @cached_property
    def borrowed_map(self) -> GreyMap | None:
        """That of CT images whose masks are of no CT slice."""
        return grey_map_of("CT", self._preprocessing, self._shards)

    @cached_property
    def _shards(self) -> ShardSet | None:
        from data_shards.store.shards import ShardSet

        return ShardSet.open(self.store.job["shards"]) if "shards" in self.store.job else None

    @cached_property
    def _preprocessing(self) -> dict[str, Any]:
        index: dict[str, Any] = self.store.job.get("masks_cut_like", {})
        return dict(index if self._shards is None else self._shards.index["preprocessing"])

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
        """Of the centre that the model makes, from that of the whole slice."""
        assert self._shards is not None
        first = (self._shards.size - self.size) // 2
        to_whole = np.eye(4)
        to_whole[:2, 3] = first
        return tuple((np.array(affine).reshape(4, 4) @ to_whole).ravel().tolist())

    def _grey_map(self, source: SliceMeta | None, target: str) -> GreyMap:
        """value = grey * scale + offset: the mask's own slice's where the modality is the same; else that of CT in the
        set, and for MR, which has no unit, the grey value itself."""
        if source is not None and source.modality == target:
            step = GREY_16_OF_8 if source.bits == 16 else 1
            return GreyMap(source.intensity_scale * step, source.intensity_offset)
        # Unknown HU are refused where they would be written: what is left are formats of grey values alone.
        return (self.borrowed_map if target == "CT" else None) or GreyMap(1.0, 0.0)


def _label_table(where: Path, content: Any) -> LabelTable:
    try:
        return LabelTable(str(content["name"]), tuple(map(str, content["names"])))
    except (KeyError, TypeError, ValueError) as error:
        raise problem(where, LABELS, f"cannot be used ({error})", "restore the file, or sample again") from error


def is_stretched(preprocessing: dict[str, Any]) -> bool:
    """Whether a grey value means another HU in each CT volume of the set."""
    return bool(preprocessing.get("intensity", PrepareConfig.intensity) == "paper")


def grey_map_of(modality: str, preprocessing: dict[str, Any], shards: ShardSet | None) -> GreyMap | None:
    """What uint8 grey values of generated images mean where no real volume says it: of MR the grey value itself, of CT
    HU by the window that the set was made with; where each volume was stretched to its own percentiles, by the median
    scale and offset of the set's CT slices, and None where it is not at hand or has none."""
    if modality != "CT":
        return GreyMap(1.0, 0.0)
    if not is_stretched(preprocessing):
        low, high = preprocessing.get("hu_window", PrepareConfig.hu_window)
        return GreyMap.between(low, high, 8)
    if shards is None or not len(rows := shards.select(modalities=["CT"], labelled_only=False)):
        return None
    scale, offset = (
        float(np.median(shards.samples[name].to_numpy()[rows])) for name in ("intensity_scale", "intensity_offset")
    )
    return GreyMap(scale * (GREY_16_OF_8 if shards.bits == 16 else 1), offset)


def unknown_hu(where: object, remedy: str) -> Problem:
    """Where grey_map_of gives none."""
    value = "not known: each CT volume was stretched to its own percentiles (prepare.intensity paper)"
    return Problem(str(where), "HU", value, remedy)


def _plain(case_id: str) -> str:
    """A case's name as every format and a tar's header take it, without dots. A digest keeps names apart that are equal
    once they are cut and changed."""
    plain = case_id.replace(".", "_")[:_LONGEST_CASE]
    if plain == case_id:
        return case_id
    return f"{plain[: _LONGEST_CASE - 9]}_{hashlib.sha256(case_id.encode()).hexdigest()[:8]}"
