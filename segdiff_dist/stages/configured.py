"""Stages that take their settings from the experiment, and functions that several of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_type_hints

import tyro

from data_shards.field_source import is_address, url_of
from data_shards.problems import OutOfSpace, out_of_space, problem, refuse
from segdiff_dist.config import as_dict, to_yaml, validate
from segdiff_dist.experiment import CONFIG_FILE, Experiment, Withheld, collect, load_experiment, value_of
from segdiff_dist.ranks.distributed import is_main
from segdiff_dist.shipped import find_config
from segdiff_dist.stages.base import Stage
from segdiff_dist.stages.flags import parse_flags
from segdiff_dist.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from data_shards.store.shards import ShardSet
    from segdiff_dist.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class ConfiguredStage(Stage):
    """A stage whose flags are keys of the experiment: a path, or a section."""

    writes: ClassVar[tuple[str, ...]] = ()
    """Keys of output paths for which it has no flag: they are not taken from a run folder."""
    default_config: ClassVar[str | None] = None
    """The shipped configuration that is used without --config."""

    config: str | None = None
    """A YAML file, or the name of a shipped configuration (smoke, demo, best_ct_mr, ...). Flags override it."""
    experiment: Annotated[Experiment, tyro.conf.Fixed, tyro.conf.Suppress] = field(default_factory=Experiment)
    """The whole configuration, with this stage's flags in it."""

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys of the experiment that are flags of this stage."""
        return [one.name for one in fields(cls) if one.name not in ("dry_run", "config", "experiment")]

    @classmethod
    def of(cls, experiment: Experiment, arguments: Mapping[str, Any] | None = None) -> Self:
        """The stage with the experiment's values, and `arguments`, its own plain values from a file."""
        shared = vars(experiment)
        values = {name: shared[name] for name in cls.own_keys() if name in shared}
        own = {name: value for name, value in (arguments or {}).items() if name in cls.own_keys()}
        return cls(**values, **validate(_adapted(cls, own), own, "config").__dict__, experiment=experiment)

    @classmethod
    def parse(cls, name: str, args: Sequence[str]) -> Self:
        """The stage from defaults, RUN/config.yaml, --config FILE and flags; later ones override earlier ones."""
        config, run = _config_and_run(args)
        config = config or cls.default_config
        # A user gives positional arguments, so they are never taken from a run folder.
        written, withheld, arguments = [*cls.positional(), *cls.writes], list[Withheld](), dict[str, Any]()
        file = None if config is None else find_config(config)
        experiment = load_experiment(
            file, None if run is None else Path(run), written, withheld=withheld, arguments=arguments
        )
        base = replace(cls.of(experiment, arguments), config=config)
        prog = f"segdiff {name}"
        given = parse_flags(cls, args, prog=prog, default=base, aliases=cls.aliases, essential=cls.essential)
        stage = given.over(experiment)
        for one in withheld:
            is_used = one.key.split(".")[0] in (*cls.own_keys(), *cls.writes)
            if is_used and one.key != "run" and value_of(stage.experiment, one.key) == one.default and is_main():
                print(f"note: {one}", file=sys.stderr)
        return stage

    @classmethod
    def positional(cls) -> list[str]:
        """The keys that are given by their position."""
        hints = get_type_hints(cls, include_extras=True)
        return [name for name in cls.own_keys() if tyro.conf.Positional in getattr(hints[name], "__metadata__", ())]

    def over(self, experiment: Experiment) -> Self:
        """The stage with its own flags laid over the experiment."""
        values = {name: getattr(self, name) for name in self.own_keys() if hasattr(experiment, name)}
        return replace(self, experiment=replace(experiment, **values))

    def settings(self) -> str:
        """The stage's own arguments and the whole experiment as YAML."""
        own = [name for name in self.own_keys() if not hasattr(self.experiment, name) and getattr(self, name)]
        arguments = _adapted(type(self), own)(*(getattr(self, name) for name in own))
        return to_yaml(as_dict(arguments) | as_dict(self.experiment))

    def given(self, key: str) -> str:
        """A folder or URL that the stage cannot do without."""
        value: Path | str | None = getattr(self, key)
        if value is None:
            remedy = f"give it, or `{key}:` in the --config file"
            raise problem("command line", self.label(key), "not given", remedy)
        return str(value)

    def path(self, key: str) -> Path:
        """The same, which must be on this machine."""
        value = self.given(key)
        if (url := url_of(value)) is not None:
            raise problem("command line", self.label(key), url, "give a folder on this machine")
        return Path(value)

    @classmethod
    def label(cls, key: str) -> str:
        """What --help calls a key: OUT, or --run."""
        if key not in cls.positional():
            return f"--{key.replace('_', '-')}"
        hint = get_type_hints(cls, include_extras=True)[key]
        return next(one.metavar for one in hint.__metadata__ if getattr(one, "metavar", None))

    def open_data(self, more: tuple[str, ...] = ()) -> ShardSet:
        """The shard set, or several as one. Warns of patients that one of them trains on and another one holds out."""
        from data_shards.store.patient_overlap import overlap_notes
        from data_shards.store.shards import ShardSet

        data = self.given("data")
        self._refuse_moved(data)
        shards = ShardSet.open([data, *more], cache=self.experiment.loader.cache)
        if is_main():
            sys.stderr.writelines(f"warning: {note}\n" for note in overlap_notes(shards))
        return shards

    def _refuse_moved(self, data: str) -> None:
        """Refuse a set that only the run folder names, by a path that leads nowhere from here."""
        run = self.experiment.run
        if is_address(data) or Path(data).exists() or run is None or not (run / CONFIG_FILE).is_file():
            return
        if load_experiment(None, run).data == data:
            value = f"not there, looked for from {Path.cwd()}"
            raise problem(data, "shard set", value, f"{run / CONFIG_FILE} names it: give --data SHARDS")

    def open_run_and_data(self, more: tuple[str, ...] = ()) -> tuple[Path, ShardSet]:
        """The run folder, which may not exist yet, and the shard set."""
        run, shards = collect(lambda: self.path("run"), lambda: self.open_data(more))
        if run.exists() and not run.is_dir():
            raise problem(run, self.label("run"), "not a folder", "give another path")
        return run, shards

    def existing_run(self) -> Path:
        """The run folder, which must exist."""
        run = self.path("run")
        if not run.is_dir():
            raise problem(run, self.label("run"), "no such folder", "give the folder that training and sampling wrote")
        return run

    @property
    def config_flag(self) -> tuple[object, ...]:
        """--config as it was given, for the next command."""
        return () if self.config is None else ("--config", self.config)


def _adapted(cls: type[Any], names: Iterable[str]) -> type[Any]:
    """A class with only those fields of `cls`, for checking the values of a file."""
    hints = get_type_hints(cls)
    return make_dataclass("Arguments", [(name, hints[name]) for name in names])


def _config_and_run(args: Sequence[str]) -> tuple[str | None, str | None]:
    """The values of --config and --run, which decide the defaults of all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--run"):
        parser.add_argument(name, nargs="?")  # a flag without a value is refused when all flags are parsed
    known, _ = parser.parse_known_args(list(args))
    return known.config, known.run


def address_flag(experiment: Experiment) -> tuple[object, ...]:
    """--data for the next command if it is an address, which is not taken from a run folder."""
    return ("--data", experiment.data) if is_address(experiment.data) else ()


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values."""
    return as_dict(experiment)


def refuse_addresses(experiment: Experiment, runs: tuple[Path, ...]) -> None:
    """Refuse samples whose shard set is behind an address that only a run folder names."""
    from segdiff_dist.sampling.store_files import foreign_addresses

    refuse([found for run in runs for found in foreign_addresses(run / "samples", experiment.data)])


def weights_name(experiment: Experiment, name: str) -> str:
    """The folder under RUN/weights; `ema` is the first average."""
    return experiment.train.averages[0] if name == "ema" else name


def open_tracker(experiment: Experiment, stage: str, folder: Path) -> Tracker:
    """Rank 0 records, and says where; the others record nothing. A run folder shares its database with those
    beside it; another folder, a shard set's, has its own."""
    from segdiff_dist.tracking.tracker import Tracker

    config = experiment.tracking if is_main() else TrackingConfig(enabled=False)
    is_run = experiment.run is not None and folder.resolve() == experiment.run.resolve()
    try:
        tracker = Tracker(folder, config if is_run else replace(config, shared_store=False), stage)
    except OSError as error:
        if out_of_space(error):
            raise OutOfSpace(folder, str(error)) from error
        remedy = "make it writable, or choose another; without a record: --tracking.no-enabled"
        raise problem(folder, "run folder", f"cannot be written ({error})", remedy) from error
    if tracker.records:
        _say_where(folder)
    return tracker


def _say_where(folder: Path) -> None:
    """How to look at what is recorded, once for each store."""
    from segdiff_dist.evaluation.report.tracked import tracked_run

    found = tracked_run(folder)
    line = None if found is None else found.url or found.command
    if line is not None and line not in _said:
        _said.add(line)
        print(f"MLflow: {line}", flush=True)


_said: set[str] = set()


def recipe_of(config: str | None) -> str | None:
    """The name of a configuration: that of its file."""
    return None if config is None else Path(config).stem
