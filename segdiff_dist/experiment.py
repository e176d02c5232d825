"""The whole configuration of an experiment, one section a stage, and where it comes from.

Each of these overrides those before it: the sections' defaults, the run folder's config.yaml, --config FILE, flags. The
run folder's file may have been written by somebody else. So commands, addresses and output paths are not taken from it:
only a user may give them, and their fields are marked (data_shards.field_source).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from data_shards.feed.config import LoaderConfig
from data_shards.field_source import ADDRESS_FROM_A_PERSON, CODE_FROM_A_PERSON, FROM_A_PERSON, is_address, url_of
from data_shards.files import write_atomic
from data_shards.ingest.annotate_config import AnnotateConfig
from data_shards.ingest.prepare_config import PrepareConfig
from data_shards.locks import is_held, short_turn
from data_shards.phantom.config import PhantomConfig
from data_shards.problems import InputProblems, Problem, problem
from data_shards.settings import execution_settings
from data_shards.store.config import ConvertConfig
from segdiff_dist.autoencoding.config import AutoencoderConfig
from segdiff_dist.config import as_dict, differences, merge, read_yaml, to_yaml, validate
from segdiff_dist.denoising.config import DenoiserConfig, DiffusionConfig, ValidationConfig
from segdiff_dist.denoising.distil_config import DistilConfig
from segdiff_dist.downstream.config import DownstreamConfig
from segdiff_dist.evaluation.measure.config import EvaluateConfig
from segdiff_dist.export.config import ExportConfig, VolumeConfig
from segdiff_dist.sampling.config import SampleConfig
from segdiff_dist.segmentation.config import SegmenterConfig
from segdiff_dist.tracking.config import TrackingConfig
from segdiff_dist.training.config import AverageConfig, TrainConfig
from segdiff_dist.weight_files import DESCRIPTION

CONFIG_FILE = "config.yaml"
# Keys of a file that are arguments of one command; they are fields of its stage. An old run folder's file may name
# them; they are not taken from it.
ARGUMENTS = ("converted", "exported", "mask_volume", "runs", "compared", "images", "hours", "recipe")

# The sections that are fixed while a stage holds its lock, and once it has left a file or folder in the run folder:
# (lock, file or folder, sections). Other stages do not change them in RUN/config.yaml.
_FIXED_BY = (
    (
        ".train.lock",
        "checkpoints",
        ("data", "more_data", "loader", "denoiser", "diffusion", "train", "validation", "distil"),
    ),
    ("segmenter/.train.lock", "segmenter/checkpoints", ("data", "more_data", "loader", "segmenter")),
    ("autoencoder/.train.lock", "autoencoder/checkpoints", ("data", "more_data", "loader", "autoencoder")),
    (".samples.lock", "samples/job.json", ("sample",)),
    (".evaluation.lock", "evaluation/summary.json", ("evaluate", "downstream")),
)


@dataclass(frozen=True)
class Experiment:
    """From volumes to report. Every key is also a flag: `train: {zero_stage: 1}` is --train.zero-stage 1."""

    amos_root: Path | None = None
    """The archive: dataset.json, imagesTr, labelsTr, ..."""
    wholebody: Path | None = field(default=None, metadata=FROM_A_PERSON)
    """Whole-body masks, <case id>.nii.gz. `annotate` writes them and `prepare` reads them."""
    data: str | None = field(default=None, metadata=ADDRESS_FROM_A_PERSON)
    """The shard set that `prepare` writes and the later stages read: a folder or, for reading, a URL of fsspec's."""
    more_data: tuple[str, ...] = field(default=(), metadata=ADDRESS_FROM_A_PERSON)
    """Further shard sets to train on, alike in labels, size and codec."""
    run: Path | None = field(default=None, metadata=FROM_A_PERSON)
    """The run folder: checkpoints, weights, samples, evaluation, and MLflow's database."""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def given(self, name: str) -> str:
        """A folder or URL that the stage cannot do without."""
        value: Path | str | None = getattr(self, name)
        if value is None:
            raise problem("command line", name, "not given", f"give it, or `{name}:` in the --config file")
        return str(value)

    def path(self, name: str) -> Path:
        """The same, which must be on this machine."""
        value = self.given(name)
        if (url := url_of(value)) is not None:
            raise problem("command line", name, url, "give a folder on this machine")
        return Path(value)


@dataclass(frozen=True)
class Withheld:
    """A value of RUN/config.yaml that is not used, since only a user may give it."""

    file: Path
    key: str
    value: Any
    default: Any

    def __str__(self) -> str:
        given = f"--{self.key.replace('_', '-')} or --config"
        return f"{self.file}: {self.key}: {self.value!r:.200} is not taken from a run folder; give it by {given}"


def load_experiment(
    config_file: Path | None,
    run: Path | None,
    written: Sequence[str] = (),
    *,
    withheld: list[Withheld] | None = None,
    arguments: dict[str, Any] | None = None,
) -> Experiment:
    """The experiment before flags. `run` is the run folder, if it is already known; `written`: further keys that are
    not taken from its config.yaml. Values that are not taken are appended to `withheld`. Values of ARGUMENTS in the
    file are put into `arguments`."""
    values = as_dict(Experiment())
    from_file = read_yaml(config_file) if config_file is not None else {}
    said = {name: from_file.pop(name) for name in ARGUMENTS if name in from_file}
    if arguments is not None:
        arguments |= said
    if run is None and isinstance(from_file.get("run"), str):
        run = Path(from_file["run"])
    if run is not None and (run / CONFIG_FILE).is_file():
        recorded = {k: v for k, v in read_yaml(run / CONFIG_FILE).items() if k not in ARGUMENTS}
        left_out = _withhold(Experiment, recorded, values, run / CONFIG_FILE, written)
        if withheld is not None:
            withheld += left_out
        values = merge(values, recorded) | {"run": str(run)}
    experiment = validate(Experiment, merge(values, from_file), config_file or "config")
    return experiment


def value_of(experiment: Experiment, key: str) -> Any:
    """The plain value of a dotted key."""
    value: Any = as_dict(experiment)
    for name in key.split("."):
        value = value[name]
    return value


def _withhold(
    section: Any,
    recorded: dict[str, Any],
    defaults: Mapping[str, Any],
    file: Path,
    written: Sequence[str],
    prefix: str = "",
) -> list[Withheld]:
    """Take out of `recorded` the values that only a user may give; returns those that differ from the default."""
    found = []
    for one in fields(section):
        if one.name not in recorded:
            continue
        value, default = recorded[one.name], defaults[one.name]
        made_by: Any = one.default_factory
        if is_dataclass(made_by):
            if isinstance(value, dict):
                found += _withhold(made_by, value, default, file, (), f"{prefix}{one.name}.")
        elif one.name in written or one.metadata == FROM_A_PERSON or _is_address(one, value) or _runs_code(one, value):
            del recorded[one.name]
            if value != default:
                found.append(Withheld(file, f"{prefix}{one.name}", value, default))
    return found


def _is_address(one: Field[Any], value: Any) -> bool:
    """Whether the value of a field leads to another machine."""
    texts = value if isinstance(value, list) else [value]
    is_one = any(is_address(text) or text == "download" for text in texts)
    return one.metadata == ADDRESS_FROM_A_PERSON and is_one


def _runs_code(one: Field[Any], value: Any) -> bool:
    """Whether the value of a field names a file or folder that brings code along: a network of somebody else's."""
    if one.metadata != CODE_FROM_A_PERSON or not isinstance(value, str):
        return False
    return Path(value).exists() and not (Path(value) / DESCRIPTION).is_file()


def save_experiment(experiment: Experiment, sections: tuple[str, ...]) -> None:
    """Write RUN/config.yaml: the sections that this stage fixes, and those that no stage has fixed yet."""
    run, values = experiment.path("run"), as_dict(experiment)
    with short_turn(run):
        if (run / CONFIG_FILE).is_file():
            recorded = read_yaml(run / CONFIG_FILE)
            fixed = (names for lock, left, names in _FIXED_BY if (run / left).exists() or is_held(run / lock))
            others = {name for names in fixed for name in names}
            values |= {name: recorded[name] for name in others - set(sections) if name in recorded}
        write_atomic(run / CONFIG_FILE, to_yaml(values))


def recorded_config(experiment: Experiment, started: Path) -> Path | None:
    """The settings that a training was started with; None if it has not begun. `started`: its folder of checkpoints,
    each of which holds them."""
    from segdiff_dist.training.checkpoint import is_checkpoint_folder  # here, since it imports torch

    of_checkpoints = (file for file in started.glob(f"*/{CONFIG_FILE}") if is_checkpoint_folder(file.parent))
    recorded = max(of_checkpoints, default=experiment.path("run") / CONFIG_FILE)
    return recorded if started.exists() and recorded.is_file() else None


def refuse_another_config(experiment: Experiment, started: Path, sections: tuple[str, ...]) -> None:
    """Refuse to continue a training that was started with other settings. `started`: its folder of checkpoints."""
    recorded = recorded_config(experiment, started)
    if recorded is None:
        return
    may_change = {
        key for section in sections for key in execution_settings(type(getattr(experiment, section)), f"{section}.")
    }
    # A key of a later version has the value that training used before the key existed.
    old, new = merge(as_dict(Experiment()), read_yaml(recorded)), as_dict(experiment)
    found = [
        Problem(str(recorded), key, f"{before!r} there, {after!r} now", "use another run folder, or that value")
        for section in sections
        for key, before, after in differences(old[section], new[section], f"{section}.")
        if key not in may_change
    ]
    if found:
        raise InputProblems(found)


def collect(*checks: Callable[[], Any]) -> list[Any]:
    """Run every check and return their results; all problems that they raise are raised together."""
    problems: list[Problem] = []
    results = []
    for check in checks:
        try:
            results.append(check())
        except InputProblems as error:
            problems += error.problems
    if problems:
        raise InputProblems(dict.fromkeys(problems))  # two checks may find the same
    return results
