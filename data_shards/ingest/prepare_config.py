"""How volumes become a shard set: the settings of `segdiff prepare`, and their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Interval

from data_shards.choices import Axis, Codec, Fit, Intensity, LabelSet, Layout, MaskResize, Modality, Store
from data_shards.field_source import FROM_A_PERSON
from data_shards.modalities import INTENSITY_RULE, MODALITIES, MODALITY_RULE, in_order, is_modality, parse_rule
from data_shards.problems import Problem
from data_shards.ranges import RISING, Count, Share, Some, WholeNumber, range_problems
from data_shards.records import AXES
from data_shards.settings import Execution, RecordedOtherwise, Result, ResultWhereSet, identity
from data_shards.store.codecs import CODECS
from data_shards.store.shard_writer import Format, set_format
from data_shards.workers import WorkersConfig

# Larger than any value that a header stores in 16 bits.
_Hu = Annotated[float, Interval(ge=-100_000, le=100_000)]
_Percentile = Annotated[float, Interval(ge=0, le=100)]


@dataclass(frozen=True)
class PrepareConfig:
    """How volumes become slices. The defaults are the paper's: 1 mm, 256 x 256, CT to [-256, 256] HU, MR to its 1st to
    99th percentile, three axes."""

    layout: RecordedOtherwise[Layout] = "auto"
    """The layout of the folder. auto: it is recognised and printed."""
    labels: RecordedOtherwise[str | None] = None
    """The classes of the ids in label files: your own table (TABLE.yaml), or `amos`: AMOS' organs, by their names.
    null: the data set's own classes."""
    label_set: Result[LabelSet] = "amos"
    """amos: the classes of the data set's own label files, in any layout. wholebody: those of --wholebody. merged:
    both; where both have one, the data set's own counts."""
    axes: Result[Some[Axis]] = AXES
    """Axes along which volumes are cut."""
    modalities: Result[Some[Modality] | None] = None
    """The modalities whose cases are used. null: all."""
    modality: ResultWhereSet[Modality | None] = None
    """The modality of every case, CT, MR or another name, if dataset.json does not state it, or states it wrongly."""
    intensities: ResultWhereSet[dict[str, str]] = field(default_factory=dict)
    """By modality, how its values become grey, as {CBCT: hu -500 1500, PET: values 0 10}. hu: a window in HU.
    percentiles: of the volume. values: a window in the image's unit. Two numbers are the ends; without them those of
    hu_window or mr_percentiles count. Default: CT is hu, all others are percentiles."""
    channel: ResultWhereSet[WholeNumber | None] = None
    """nnU-Net and MSD: the channel that is used as the image, if there are several."""
    channels: ResultWhereSet[Some[WholeNumber] | None] = None
    """nnU-Net and MSD: several channels, each of which becomes a case of its own modality, with the same label and
    patient."""
    split: ResultWhereSet[tuple[Share, Share, Share] | None] = None
    """Shares of patients for train, val and test. null: as the data state; cases without a stated split by 0.7, 0.1,
    0.2."""
    seed: ResultWhereSet[WholeNumber] = 0
    """Seed of the draw of patients for the splits."""
    fold: ResultWhereSet[WholeNumber] = 0
    """nnU-Net: the fold of splits_final.json that gives the splits."""
    patient: ResultWhereSet[str | None] = None
    """A pattern for case ids whose first group is the patient, as `(p[0-9]+)_`: cases of one patient share a split.
    null: each case is a patient, unless a manifest names the patient."""
    pixel_mm: ResultWhereSet[Annotated[float, Interval(ge=0.05, le=50)] | None] = None
    """Pictures (PNG, TIFF, JPEG): the side of a pixel in mm, where no table states it."""
    keep_dicom_ids: ResultWhereSet[bool] = False
    """DICOM: SeriesInstanceUID names the case, PatientID the patient, and messages name files. False: digests are the
    names."""
    on_bad_case: RecordedOtherwise[Literal["refuse", "skip"]] = "refuse"
    """The treatment of a case whose files are missing or cannot be used. refuse: nothing is done. skip: the set is made
    without the case and names it, and the exit code is 1."""
    unlabelled: ResultWhereSet[Literal["refuse", "train"]] = "refuse"
    """The treatment of a case without labels that is not in split test. refuse: it is a bad case. train: it stays where
    it is; only `denoiser.conditioning: none` trains on its slices."""
    size: Result[Annotated[int, Interval(ge=8, le=2048)]] = 256
    """Side of a slice, in pixels."""
    spacing_mm: Result[Annotated[float, Interval(ge=0.1, le=20)]] = 1.0
    """Side of a pixel, in mm."""
    slice_stride: Result[Count] = 1
    """Every how many slices one is taken. 1 takes all, 3 every third."""
    fit: Result[Fit] = "auto"
    """crop: the middle square of the short side. pad: the whole slice, in a square of the long side. auto: crop axial
    slices and pad the others, in which cropping would cut the body."""
    mask_resize: Result[MaskResize] = "nearest"
    """nearest: the nearest voxel's class. soft: the class with the largest share of a pixel. bilinear_ids: the paper's
    code, which creates false classes."""
    soft_edge: Result[bool] = False
    """With mask_resize soft: keep each pixel's second class and the first one's share."""
    min_labelled_pixels: Result[WholeNumber] = 0
    """Slices of labelled cases with fewer organ pixels are left out."""
    intensity: Result[Intensity] = "window"
    """window: CT by hu_window, MR by its percentiles. paper: CT by hu_window and then by its percentiles too."""
    hu_window: Result[Annotated[tuple[_Hu, _Hu], RISING]] = (-256.0, 256.0)
    """The HU that become the lowest and the highest grey value of CT. The default is for soft tissue: lungs and bones
    need a wider one, as -1000 1000."""
    mr_percentiles: Result[Annotated[tuple[_Percentile, _Percentile], RISING]] = (1.0, 99.0)
    """The percentiles that become the lowest and the highest grey value of MR."""
    bits: Result[Literal[8, 16]] = 8
    """Bits of a grey value."""
    store: Result[Store] = "webdataset"
    """webdataset: tars, to be streamed. zarr: sharded arrays, for random access by other tools. Training reads both."""
    codec: Result[Codec] = "raw"
    """How tars store images: raw is fastest, zstd is smaller, png and jpeg2000 are smallest. Zarr is always zstd."""
    samples_per_shard: Result[Count] = 1024
    """Slices of each shard."""
    num_workers: Execution[Count | None] = None
    """Worker processes. null: one for each core."""
    ray_address: Execution[str | None] = field(default=None, metadata=FROM_A_PERSON)
    """A Ray cluster to join. local: Ray on this machine. null: the same, but for small jobs plain processes."""

    @property
    def workers(self) -> WorkersConfig:
        """How many workers there are, and where they run."""
        return WorkersConfig("prepare", self.num_workers, ray_address=self.ray_address)

    def problems(self, where: str = "prepare") -> list[Problem]:
        """Everything out of range, each with a remedy; empty if the config can be used."""
        problems = range_problems(self, where)
        if any(one.field == "codec" for one in problems):
            lossless = "give a codec that keeps every label id: " + ", ".join(CODECS)
            problems = [replace(one, remedy=lossless) if one.field == "codec" else one for one in problems]
        if self.soft_edge and self.mask_resize != "soft":
            problems.append(Problem(where, "soft_edge", "True", "needs mask_resize soft"))
        for name, rule in self.intensities.items():
            if not is_modality(name):
                problems.append(Problem(where, "intensities", repr(name)[:60], f"a modality is {MODALITY_RULE}"))
            elif parse_rule(str(rule)) is None:
                problems.append(Problem(where, f"intensities.{name}", repr(rule)[:60], f"give {INTENSITY_RULE}"))
        if self.channel is not None and self.channels is not None:
            problems.append(
                Problem(where, "channels", str(list(self.channels)), "give `channel` or `channels`, not both")
            )
        if self.split is not None and abs(sum(self.split) - 1.0) > 1e-6:
            problems.append(Problem(where, "split", str(self.split), "give three shares that make 1, as 0.7 0.1 0.2"))
        if self.patient is not None and not has_a_group(self.patient):
            problems.append(Problem(where, "patient", self.patient, "give a regular expression with one group"))
        return problems

    def result_settings(self) -> dict[str, Any]:
        """The settings that the set's bytes depend on, as index.json holds them."""
        values = identity(self)
        values["axes"] = [axis for axis in AXES if axis in self.axes]
        values["modalities"] = list(MODALITIES if self.modalities is None else in_order(self.modalities))
        if self.store == "zarr":
            values["codec"] = "zstd"
        return values

    @property
    def format(self) -> Format:
        """How the set's samples are stored."""
        return set_format(
            self.store,
            self.codec,
            self.samples_per_shard,
            size=self.size,
            bits=self.bits,
            soft_edge=self.soft_edge,
        )


def has_a_group(pattern: str) -> bool:
    """Whether it is a regular expression with a group."""
    try:
        return re.compile(pattern).groups > 0
    except re.error:
        return False
