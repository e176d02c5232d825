"""The work of a model's process: read a mask, make its slices in batches with those of others, encode the image.

The event loop only passes events. Reading and encoding are done in threads, one request at a time, so that their memory
is bounded; the network has a thread of its own (batching.py).
"""

from __future__ import annotations

import asyncio
import re
import time
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_shards.labels import LABEL_TABLES, UNUSED
from data_shards.problems import InputProblems, problem
from data_shards.store.contact_sheet import class_colours
from segdiff_dist.denoising.samplers import num_evaluations
from segdiff_dist.painting.job import PaintJob, PaintSettings, PaintSlices, check_paint
from segdiff_dist.painting.masks import MaskFile, open_mask
from segdiff_dist.painting.model import Model, open_model
from segdiff_dist.painting.model_source import model_folder
from segdiff_dist.pipeline import SEGMENTER, SliceKey
from segdiff_dist.segmentation.segmenter import Segmenter
from segdiff_dist.serving.batching import Batcher, SliceJob
from segdiff_dist.serving.config import ServeConfig
from segdiff_dist.serving.examples import example_masks
from segdiff_dist.serving.messages import Event, MaskUpload, PaintRequest, ServiceError, as_service_error
from segdiff_dist.serving.responses import (
    Segmented,
    file_of,
    is_one_plane,
    json_of,
    mask_file,
    segment_and_score,
    text_of,
)
from segdiff_dist.serving.uploads import check_size, stored
from segdiff_dist.weight_files import DESCRIPTION

T = TypeVar("T")

SYNTHETIC = "These images are synthetic. They show no patient, and are not for diagnosis."
_LICENCE = re.compile(r"^Licence: (.*)$", re.M)


@dataclass(frozen=True)
class _Checked:
    """A request whose mask was read."""

    job: PaintJob
    slices: PaintSlices


class ServedModel:
    """One model, loaded. Everything that a client can do with it."""

    def __init__(self, name: str, where: str | None, config: ServeConfig, threads: int | None = None) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._config = config
        model = open_model(where, device=config.device, precision=config.precision)
        self.model = replace(model, name=name)
        self._segmenter = _segmenter_of(model_folder(where), self.model)
        self._licence = _licence_of(model_folder(where))
        most = config.batch or self.model.pipeline.num_at_once
        self._batcher = Batcher(most, config.batch_wait_ms / 1000)
        self._reading, self._encoding = asyncio.Semaphore(2), asyncio.Semaphore(1)

    def close(self) -> None:
        """Cancel all work."""
        self._batcher.close()

    def describe(self) -> dict[str, Any]:
        """An entry of GET /models."""
        model, pipeline = self.model, self.model.pipeline
        colours, table = class_colours(model.table), model.table
        named = [(i, name) for i, name in enumerate(table.names) if name != UNUSED]
        return {
            "name": model.name,
            "size": pipeline.size,
            "pixel_mm": model.grid_mm,
            "modalities": list(model.modalities),
            "labels": [{"id": i, "name": name, "color": f"#{bytes(colours[i]).hex()}"} for i, name in named],
            "steps": pipeline.sampler.num_steps,
            "guidance": pipeline.sampler.guidance,
            "synthetic": SYNTHETIC,
            "licence": self._licence,
            "hu_range": self._hu_range(),
            "has_segmenter": self._segmenter is not None,
            "digest": model.digest,
        }

    async def read_mask(self, mask: MaskUpload) -> dict[str, Any]:
        """The answer of POST /masks. Raises ServiceError."""
        async with self._reading:
            return await _in_thread(lambda: self._read_mask(mask))

    def examples(self) -> dict[str, bytes]:
        """Masks to begin with: NIfTI in the model's ids."""
        return example_masks(self.model.table)

    async def paint(self, request: PaintRequest) -> AsyncIterator[Event]:
        """The events of a request; the last one is an image or an error. Closing it cancels the work."""
        try:
            began = time.monotonic()
            loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

            def on_progress(step: int, steps: int) -> None:
                if request.shows_progress:
                    event = Event("progress", {"step": step, "steps": steps})
                    loop.call_soon_threadsafe(events.put_nowait, event)

            with self._batcher.coming():
                async with self._reading:
                    checked = await _in_thread(lambda: self._checked(request))
                job = self._slice_job(checked, on_progress)
                position = self._batcher.submit(job)
            made = asyncio.wrap_future(job.future)
            try:
                yield Event("queued", {"position": position})
                async for event in _until_done(made, events):
                    yield event
                image_SHW = made.result()
            finally:
                job.future.cancel()
            async with self._encoding:
                answer = await _in_thread(lambda: self._encoded(checked, image_SHW, request))
            if isinstance(answer, dict):
                answer |= {
                    "seconds": round(time.monotonic() - began, 3),
                    "seed": request.seed,
                    "model": self.model.name,
                }
            yield Event("image", {"answer": answer, "slices": len(job.keys), "batch": job.largest_batch})
        except ServiceError as error:
            yield Event("error", {"status": error.status, "detail": error.detail})

    def _checked(self, request: PaintRequest) -> _Checked:
        """Settings checked, mask read. Raises InputProblems, ServiceError."""
        upload = request.mask
        if request.steps is not None and request.steps > self._config.steps:
            raise problem("mask", "steps", request.steps, f"at most {self._config.steps} are taken here")
        settings = PaintSettings(
            modality=request.modality,
            axis=request.axis,
            seed=request.seed,
            labels=_table(upload),
            other_labels=upload.other_labels,
            outline=upload.outline,
        )
        model = self.model.with_sampler(request.steps, request.guidance)
        with warnings.catch_warnings(), stored(upload.content) as file:
            warnings.simplefilter("ignore")
            mask = self._opened(file, upload)
            if request.form == "png" and not is_one_plane(mask.shape):
                raise ServiceError(406, "Accept: image/png for a volume: ask for application/x-nifti")
            job = check_paint(mask, model, settings, file.with_name("dicom") if request.form == "dicom" else None)
            return _Checked(job, job.cut())

    def _opened(self, file: Path, upload: MaskUpload) -> MaskFile:
        try:
            mask = open_mask(file, grid_mm=self.model.grid_mm, spacing_mm=upload.spacing)
        except InputProblems as error:
            is_spacing = any(one.field == "--spacing" for one in error.problems)
            raise as_service_error(error, is_opening=not is_spacing) from error
        check_size(mask, self._config.voxels)
        return mask

    def _read_mask(self, upload: MaskUpload) -> dict[str, Any]:
        settings = PaintSettings(labels=_table(upload), other_labels=upload.other_labels, outline=upload.outline)
        with stored(upload.content) as file:
            slices = check_paint(self._opened(file, upload), self.model, settings).cut()
        labels = slices.labels
        return {
            "mask": text_of(mask_file(labels)),
            "notes": [_without_place(note) for note in slices.notes],
            "shape": list(labels.voxels_IJK.shape),
        }

    def _slice_job(self, checked: _Checked, on_progress: Callable[[int, int], None]) -> SliceJob:
        slices, job, pipeline = checked.slices, checked.job, checked.job.model.pipeline
        keys = [SliceKey(number, job.modality, slices.axis, job.settings.seed) for number in slices.item_ids]
        passes = num_evaluations(replace(pipeline.sampler, guidance=1.0), pipeline.diffusion)
        return SliceJob(pipeline, slices.mask_SHW, keys, passes, on_progress)

    def _encoded(self, checked: _Checked, image_SHW: np.ndarray, request: PaintRequest) -> bytes | dict[str, Any]:
        slices, job = checked.slices, checked.job
        made = job.finished(replace(slices, notes=tuple(map(_without_place, slices.notes))), image_SHW)
        if request.form != "json":
            return file_of(made, request.form)
        segmented: Segmented | None = None
        if self._segmenter is not None and made.modality in self._segmenter.modalities:
            segmented = segment_and_score(self._segmenter, made, slices.cut_mask, image_SHW)
        return json_of(made, segmented)

    def _hu_range(self) -> list[float] | None:
        in_hu = [one for one in self.model.modalities if self.model.is_in_hu(one)]
        if not in_hu:
            return None
        try:
            grey = self.model.grey(in_hu[0])
        except InputProblems:
            return None
        return [float(grey.offset), float(grey.offset + 255 * grey.scale)]


async def _until_done(made: asyncio.Future[np.ndarray], events: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    """The events that come before the images are made."""
    while not made.done():
        waiting = asyncio.ensure_future(events.get())
        try:
            await asyncio.wait((made, waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            has_event = waiting.done()
            waiting.cancel()  # also if the client has left
        if has_event:
            yield waiting.result()


async def _in_thread(work: Callable[[], T]) -> T:
    """Its result. Raises ServiceError for what a client can correct, and for what it cannot."""
    try:
        return await asyncio.to_thread(work)
    except InputProblems as error:
        raise as_service_error(error) from error
    except MemoryError as error:
        raise ServiceError(422, "mask: needs more memory than there is: send a smaller one") from error


def _table(upload: MaskUpload) -> Any:
    """Labels for `given_names`, which would take other texts for paths."""
    if isinstance(upload.labels, str) and upload.labels not in LABEL_TABLES:
        known = ", ".join(LABEL_TABLES)
        raise problem("mask", "labels", upload.labels[:60], f"give JSON with id: name, or one of {known}")
    if isinstance(upload.labels, str):
        return dict(enumerate(LABEL_TABLES[upload.labels].names))
    return upload.labels


def _without_place(note: str) -> str:
    """A note without the path of the upload on this machine."""
    return re.sub(r"/\S*/mask(\.[a-z.]+)", r"the file", note)


def _segmenter_of(folder: Path, model: Model) -> Segmenter | None:
    """The segmenter of a pipeline or a run folder, if it has one that knows the model's labels."""
    for weights in (folder / SEGMENTER, folder / SEGMENTER / "weights"):
        if (weights / DESCRIPTION).is_file():
            segmenter = Segmenter.load(weights, model.pipeline.device)
            return segmenter if segmenter.label_table == model.table else None
    return None


def _licence_of(folder: Path) -> str:
    card = folder / "README.md"
    found = _LICENCE.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return found[1][:300] if found else "not stated: ask whoever trained the model"
