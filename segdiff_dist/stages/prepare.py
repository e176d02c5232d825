"""Cut volumes and their labels into slices, packed into shards; resumes."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.locks import FOLDER_LOCK, locked
from data_shards.wording import in_words, rounded
from segdiff_dist.experiment import collect
from segdiff_dist.stages.base import Plan, Result, command
from segdiff_dist.stages.configured import ConfiguredStage, open_tracker
from segdiff_dist.stages.cost import Cost
from segdiff_dist.stages.resources import bytes_in, disk_problems
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.tracking.store import bytes_of_record

if TYPE_CHECKING:
    from data_shards.ingest.prepare import Preparation, PrepareReport
    from data_shards.problems import Problem
    from segdiff_dist.tracking.tracker import Tracker


# Of 256 pixels, from volumes of 512x512 at 3 mm (benchmarks/results/prepare-epyc-2-cores.json).
_SLICES_A_SECOND = 475

# Slices of CT as PNG or zstd take a third of their pixels, masks a tenth; slices without organs may be left out.
_LEAST_SHARE = 0.05
# Of raw pixels in tars, none of which are left out.
_RAW_SHARE = 0.9
# At most, for each slice: the headers and padding of its parts in a tar, its metadata, its row of the table.
_BESIDE_PIXELS_BYTES = 4096
_FEW_CASES = 16


@dataclass(frozen=True, kw_only=True)
class Prepare(ConfiguredStage):
    """Cut volumes into slices and write them as a shard set: files that training reads fast. The same command again
    goes on. Exit code 1 when some volumes could not be read."""

    aliases: ClassVar = {"--spacing": "--prepare.spacing-mm"}
    less_memory: ClassVar = "--prepare.num-workers"
    essential: ClassVar = (
        *("--prepare.size", "--prepare.spacing-mm", "--prepare.axes", "--prepare.slice-stride", "--prepare.hu-window"),
        *("--prepare.modality", "--prepare.modalities", "--prepare.labels", "--prepare.split", "--prepare.patient"),
        *(
            "--prepare.layout",
            "--prepare.label-set",
            "--wholebody",
            "--prepare.store",
            "--prepare.num-workers",
            "--run",
        ),
    )

    amos_root: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """Your data: a folder of volumes and their label files, as nnU-Net, AMOS, MSD or TotalSegmentator have them, as
    DICOM, or in images/ and labels/. --dry-run says what is recognised."""
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """The folder of the new shard set."""
    run: Path | None = None
    """A run folder in whose MLflow run the counts are recorded. null: they are recorded in OUT."""
    wholebody: Path | None = None
    """Folder of whole-body masks, <case id>.nii.gz, as `segdiff annotate` makes them. For --prepare.label-set."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> PreparePlan:
        """Reads the archive's headers and the contents of the output folder."""
        from data_shards.ingest.prepare import check

        root, out = collect(lambda: self.path("amos_root"), lambda: self.path("data"))
        preparation = check(root, out, self.prepare, self.wholebody)
        self._warn_of_size()
        return PreparePlan(self, out, preparation)

    def _warn_of_size(self) -> None:
        """Of slices that the networks of the same configuration refuse, after the set is made."""
        experiment, side = self.experiment, self.experiment.loader.crop_size or self.prepare.size
        multiple = max(
            experiment.segmenter.multiple, 1 if experiment.denoiser.space == "latent" else experiment.denoiser.multiple
        )
        if side % multiple == 0:
            return
        low = side // multiple * multiple
        near = f"{low} or {low + multiple}" if low else f"{multiple}"
        text = f"the networks of this configuration take multiples of {multiple} pixels: `train` will refuse the set"
        crop = f", crop in training (--loader.crop-size {low})" if low else ""
        remedy = f"give {near}{crop}, or train with fewer levels"
        warnings.warn(f"prepare.size: {side}: {text}; {remedy}", stacklevel=2)


@dataclass(frozen=True)
class PreparePlan(Plan):
    """Cases that can be cut."""

    stage: Prepare
    out: Path
    preparation: Preparation

    def cost(self) -> Cost:
        """From the headers."""
        from data_shards.ingest.counts import count_slices
        from data_shards.store.inspect import recognised_lines

        config = self.stage.prepare
        counted = count_slices(self.preparation.cases, config)
        num_bytes = counted.slices * ((1 + config.bits // 8) * config.size**2 + _BESIDE_PIXELS_BYTES)
        num_bytes += bytes_of_record(self.out, self.stage.tracking)
        is_raw = (config.store, config.codec, config.min_labelled_pixels) == ("webdataset", "raw", 0)
        workers = config.workers.num_on_cores
        notes = (
            self.preparation.survey.described,
            f"volumes: {counted.volumes:,}, {rounded(counted.voxels, 'voxel')}",
            "images: at most, since slices without organs may be left out",
            f"time: by {_SLICES_A_SECOND} slices a second for each of {workers} workers, as on an AMD EPYC",
            *self.preparation.survey.notes,
            *recognised_lines(counted.recognised, self.preparation.header["source"]),
            *(_left_out(one["case_id"], one["file"], one["reason"]) for one in self.preparation.left_out),
        )
        seconds = counted.slices / (_SLICES_A_SECOND * workers)
        shorter = f"more workers: --prepare.num-workers N (now {workers}), fewer slices: --prepare.slice-stride N"
        return Cost(
            images=counted.slices, seconds=seconds, num_bytes=num_bytes, notes=notes,
            sure_share=_RAW_SHARE if is_raw else _LEAST_SHARE,
            what=in_words(counted.volumes, "volume"), smaller="--prepare.codec zstd", shorter=shorter,
        )  # fmt: skip

    def workers_problems(self) -> list[Problem]:
        """Problems of prepare.num_workers."""
        return self.stage.prepare.workers.memory_problems()

    def announced(self) -> tuple[str, Cost, Path] | None:
        """The cost; that of a few volumes is small."""
        return ("prepare", self._missing(), self.out) if len(self.preparation.cases) > _FEW_CASES else None

    def disk_problems(self) -> list[Problem]:
        """Problems of the disk, also for a few volumes."""
        return disk_problems(self._missing(), self.out)

    def _missing(self) -> Cost:
        """The cost, with the bytes that are not there yet; none of a set that is complete."""
        from data_shards.store.set_index import INDEX

        cost, is_made = self.cost(), (self.out / INDEX).is_file()
        return replace(cost, num_bytes=0 if is_made else max(0, (cost.num_bytes or 0) - bytes_in(self.out)))

    def lock(self) -> AbstractContextManager[None]:
        """The lock of the shard set."""
        return locked(self.out / FOLDER_LOCK, self.out, "is preparing it", lends=True)

    def tracker(self) -> Tracker:
        """The tracker of the run folder, or of the shard set's folder."""
        return open_tracker(self.stage.experiment, "prepare", self.stage.run or self.out)

    def run(self, tracker: Tracker) -> Result:
        """Cut the volumes and write the shards."""
        from data_shards.store.shards import ShardSet

        report = self.preparation.run()
        if report.num_samples:
            shards = ShardSet.open(self.out)
            tracker.log_params({"prepare": shards.index["preprocessing"], "shards_digest": shards.digest})
            tracker.log_metrics(
                {
                    "prepare/num_samples": len(shards),
                    "prepare/num_cases": report.num_cases,
                    "prepare/num_failed": len(report.failed),
                }
            )
            tracker.log_artifact(self.out / "index.json", "prepare")
        return Result(
            tuple(self._lines(report)),
            exit_code=1 if report.failed else 0,
            next_command=None if report.failed else self._next(),
            value=report,
        )

    def _lines(self, report: PrepareReport) -> list[str]:
        from data_shards.store.inspect import recognised_lines

        done_before = "; it was finished already, nothing to do" if report.skipped_done else ""
        volumes = in_words(report.num_cases, "volume")
        found = [f"{in_words(report.num_samples, 'slice')} of {volumes} in {self.stage.data}{done_before}"]
        if self.preparation.survey.layout != "amos":
            found.append(self.preparation.survey.described)
        if self.stage.wholebody is not None:
            sources = (f"{source} of {in_words(count, 'volume')}" for source, count in report.masks.items())
            found.append("masks: " + ", ".join(sources))
        source = self.preparation.header["source"]
        found += [*(report.notes or self.preparation.survey.notes), *recognised_lines(report.recognised, source)]
        found += [_left_out(*one) for one in report.failed]
        if report.failed:
            found.append("put these right and start the same command again; it tries only them")
        return found

    def _next(self) -> str:
        stage = self.stage
        run = stage.run or Path("runs") / self.out.name
        return command("train-segmenter", "--data", stage.data, "--run", run, *stage.config_flag)


def _left_out(case_id: str, file: str, reason: str) -> str:
    return f"failed: {case_id}: {file}: {reason}"
