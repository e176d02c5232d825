"""A trained model, ready to make images: the pipeline, how its slices were cut, and what its grey values mean."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_shards.documents import read_json
from data_shards.ingest.intensity import GreyMap
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.labels import LabelTable
from data_shards.modalities import is_in_hu
from data_shards.problems import InputProblems, Problem, problem, refuse
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.experiment import CONFIG_FILE, load_experiment
from segdiff_dist.export.model_set import ModelSet, refuse_other_set
from segdiff_dist.export.samples import HU_BY_MEDIAN, grey_map_of, is_stretched, unknown_hu
from segdiff_dist.painting.model_source import STARTER, kind_of_folder, model_folder
from segdiff_dist.pipeline import SegGuidedPipeline, description_of, net_of
from segdiff_dist.ranks.distributed import pick_device
from segdiff_dist.ranks.precision import Precision, settled
from segdiff_dist.sampling.weights import weights_digest

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet

Device = Literal["auto", "cpu", "cuda"]
_FLAGS = {"sample.sampler.num_steps": "--steps", "sample.sampler.guidance": "--guidance"}
_NOT_KNOWN = (
    "{}: how its slices were cut is not known: the defaults of `segdiff prepare` are taken (CT from -256 to 256 HU). "
    "Export the run again with --data SHARDS to keep it"
)


@dataclass(frozen=True)
class Model:
    """`name`: for messages. `digest`: sha256 of the weights. `preprocessing`: of the set that it was trained on.
    `field_mm`: the side of the square that its images usually show, 0 if it is not known."""

    name: str
    digest: str
    pipeline: SegGuidedPipeline
    preprocessing: Mapping[str, Any]
    field_mm: float = 0.0
    shards: ShardSet | None = None

    @property
    def table(self) -> LabelTable:
        """The meaning of the ids in a mask."""
        return self.pipeline.model.label_table

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it was trained on."""
        return self.pipeline.model.trained_on

    @property
    def grid_mm(self) -> float:
        """The side of the grid's pixels on which its slices were cut."""
        return float(self.preprocessing.get("spacing_mm", PrepareConfig.spacing_mm))

    def is_in_hu(self, modality: str) -> bool:
        """Whether its images of a modality have HU."""
        return is_in_hu(modality, self.preprocessing)

    def grey(self, modality: str) -> GreyMap:
        """The meaning of grey values. Raises InputProblems where HU are not known."""
        if self.is_in_hu(modality) and is_stretched(dict(self.preprocessing)):
            warnings.warn(HU_BY_MEDIAN, stacklevel=2)
        grey = grey_map_of(modality, dict(self.preprocessing), self.shards)
        if grey is None:
            raise InputProblems([unknown_hu(self.name, "choose another modality")])
        return grey

    def with_sampler(self, steps: int | None, guidance: float | None) -> Model:
        """The same with another number of steps, or another guidance."""
        if steps is None and guidance is None:
            return self
        sampler = self.pipeline.sampler
        sampler = sampler if steps is None else replace(sampler, num_steps=steps)
        sampler = sampler if guidance is None else replace(sampler, guidance=guidance)
        refuse(map(_of_flag, sampler.problems(self.pipeline.diffusion)))
        return replace(self, pipeline=replace(self.pipeline, sampler=sampler))


def _of_flag(found: Problem) -> Problem:
    """A problem of a sampler's setting, as one of the flag that sets it here."""
    flag = _FLAGS.get(found.field)
    if flag is None:
        return found
    return replace(found, where="command line", field=flag, remedy=found.remedy.removesuffix(", or null"))


def open_model(
    given: str | Path | None = None,
    *,
    digest: str | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> Model:
    """The model that `given` names: a run folder, an exported pipeline or MONAI bundle, a folder under RUN/weights, a
    URL, a Hugging Face name; None: the model of the package.

    `digest`: what the sha256 of its weights must be. Raises InputProblems.
    """
    folder = model_folder(given)
    name = "starter" if folder == STARTER else str(given)
    options = {"device": device, "precision": settled(precision, pick_device(device))}
    kind = kind_of_folder(folder)
    if kind == "pipeline":
        weights, model = net_of(folder), _of_pipeline(folder, name, options)
    elif kind == "run":
        weights, model = _of_run(folder, name, options)
    else:
        weights, model = folder, _of_weights(folder.absolute().parents[1], folder, name, options)
    model = replace(model, digest=weights_digest(weights))
    if digest is not None and digest.removeprefix("sha256:") != model.digest:
        raise problem(name, "--model-digest", f"its weights are {model.digest}", "give the model that is meant")
    return model


def _of_pipeline(folder: Path, name: str, options: dict[str, Any]) -> Model:
    pipeline = SegGuidedPipeline.from_pretrained(folder, **options)
    said = read_json(description_of(folder), "copy the folder again")
    preprocessing = said.get("preprocessing")
    if not isinstance(preprocessing, dict):
        preprocessing = _usual(pipeline, name)
    return Model(name, "", pipeline, preprocessing, _number(said.get("field_mm")))


def _of_run(run: Path, name: str, options: dict[str, Any]) -> tuple[Path, Model]:
    experiment = load_experiment(None, run)
    weights = run / "weights" / experiment.train.averages[0]
    return weights, _of_weights(run, weights, name, options)


def _of_weights(run: Path, weights: Path, name: str, options: dict[str, Any]) -> Model:
    experiment = load_experiment(None, run)
    # Copied without its run, a net is sampled by the preset that suits any training.
    sampler = experiment.sample.sampler if (run / CONFIG_FILE).is_file() else SamplerConfig(preset="fast")
    pipeline = SegGuidedPipeline.from_weights(weights, experiment.diffusion, sampler, **options)
    known = ModelSet.of(experiment.data)
    if known is None:
        return Model(name, "", pipeline, _usual(pipeline, name))
    refuse_other_set(run, known.shards, f"export it: segdiff export OUT --run {run} --format pipeline --data SHARDS")
    return Model(name, "", pipeline, known.preprocessing, known.field_mm, known.shards)


def _usual(pipeline: SegGuidedPipeline, name: str) -> dict[str, Any]:
    warnings.warn(_NOT_KNOWN.format(name), stacklevel=4)
    return {"size": pipeline.size}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 < value < 5000 else 0.0
