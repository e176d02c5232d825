"""The `segdiff` command: parse, call the stage, and turn what a person can put right into words and an exit code.

0 done, 1 some of the input failed, 2 input refused before work started, 3 training stopped itself, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from data_shards.locks import begin_command, work_has_begun
from data_shards.problems import InputProblems, OutOfSpace, ShardFailed, describe, refuse
from segdiff_dist import surroundings
from segdiff_dist.ranks.distributed import launcher_problems, leave_launcher

if TYPE_CHECKING:
    from segdiff_dist.experiment import Experiment


@dataclass(frozen=True)
class _Command:
    """A subcommand: what it does, its paths and configuration sections, and the function of segdiff_dist.commands."""

    summary: str
    positional: tuple[tuple[str, str], ...] = ()
    """(key of the experiment, what --help calls it)"""
    named: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    """(short flag, the flag that it stands for)"""
    plans: bool = False
    """Whether --dry-run also says what the work would cost (plan_NAME of segdiff_dist.commands)."""
    written: tuple[str, ...] = ()
    """Paths that it writes without having them on the command line."""


_COMMANDS = {
    "phantom": _Command(
        "write the embedded data: synthetic CT and MR with 15 organs, laid out as AMOS 2022",
        positional=(("amos_root", "OUT"),),
        sections=("phantom",),
    ),
    "annotate": _Command(
        "whole-body masks for an archive, by TotalSegmentator or any command, on Ray; resumes",
        positional=(("amos_root", "AMOS_ROOT"), ("wholebody", "WHOLEBODY")),
        named=("run",),
        sections=("annotate", "tracking"),
    ),
    "prepare": _Command(
        "volumes to shards, on Ray; resumes, and does nothing when all is done",
        positional=(("amos_root", "AMOS_ROOT"), ("data", "OUT")),
        named=("run", "wholebody"),
        sections=("prepare", "tracking"),
        aliases=(("--spacing", "--prepare.spacing-mm"),),
    ),
    "inspect": _Command(
        "count a shard set's slices and classes, verify its checksums, draw a contact sheet",
        positional=(("data", "SHARDS"),),
    ),
    "convert": _Command(
        "a shard set in another store or codec, on Ray; resumes",
        positional=(("data", "SHARDS"), ("converted", "OUT")),
        sections=("convert",),
    ),
    "train": _Command(
        "train the denoiser; `deepspeed launch/train.py` is the same on many GPUs",
        named=("data", "more_data", "run"),
        sections=("loader", "denoiser", "diffusion", "train", "validation", "tracking"),
    ),
    "average": _Command(
        "weights averaged over another length, from the snapshots that training kept",
        named=("run",),
        sections=("average",),
        aliases=(("--length", "--average.length"),),
    ),
    "train-segmenter": _Command(
        "train the auxiliary segmenter that judges the images",
        named=("data", "more_data", "run"),
        sections=("loader", "segmenter", "tracking"),
    ),
    "sample": _Command(
        "make images from masks, on Ray; makes only what is missing",
        named=("data", "run"),
        sections=("loader", "sample", "tracking"),
        plans=True,
    ),
    "evaluate": _Command(
        "measure a run's samples, on Ray: metrics, figures, report.html",
        named=("run", "amos_root"),
        sections=("evaluate", "downstream", "tracking"),
    ),
    "report": _Command(
        "of one evaluated run its figures and report.html anew; of several a page that sets them side by side",
        positional=(("runs", "RUN [RUN ...]"),),
        named=("compared",),
        aliases=(("--out", "--compared"),),
    ),
    "export": _Command(
        "a run's samples for nnU-Net, as NIfTI, PNG or shards; its model as a diffusers pipeline",
        positional=(("exported", "OUT"),),
        named=("run",),
        sections=("export",),
    ),
    "volume": _Command(
        "a whole CT or MR volume from a mask volume, with its affine and shape",
        positional=(("mask_volume", "MASK"), ("exported", "OUT")),
        named=("run", "data"),
        sections=("volume", "sample"),
    ),
    "track": _Command(
        "send MLflow what waits in a run folder since its server was away",
        positional=(("run", "RUN"),),
        sections=("tracking",),
    ),
    "demo": _Command(
        "all of it on the phantom, on two CPU cores, in ten minutes",
        named=("run",),
        written=("amos_root", "data"),
    ),
    "reproduce": _Command("table1: the paper's four models from an archive to the table, beside the published values"),
    "doctor": _Command("say what this machine can run, and how to get what is missing"),
}


_PATHS = {
    "amos_root": "the archive: dataset.json, imagesTr, labelsTr, ...",
    "wholebody": "folder of whole-body masks, <case id>.nii.gz",
    "data": "the shard set: a folder or, for reading, a URL that fsspec knows",
    "more_data": "further shard sets to train on, alike in labels, size and codec",
    "converted": "the new shard set",
    "exported": "what is written: a new folder or, by `volume`, a new NIfTI file",
    "mask_volume": "a NIfTI volume of label ids of the model's table",
    "run": "the run folder: checkpoints, weights, samples, evaluation, MLflow's database",
    "runs": "run folders that were evaluated",
    "compared": "the page of several runs: an HTML file, ./comparison.html by default",
}


# Commands that take no lock.
_ONLY_READ = ("inspect", "track", "doctor")
# Commands that need no temporary folder.
_WITHOUT_TEMPORARY_FILES = ("inspect", "phantom", "report", "track", "doctor")


# Commands that a launcher starts once for each GPU.
_ON_RANKS = ("train", "train-segmenter")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    begin_command()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except OSError as error:
        # What was printed found no reader or no room. The rest goes nowhere, or Python would try again as it ends.
        if _reader_is_gone():
            # It has seen enough (`segdiff --help | head`). SIGPIPE itself stays off: it would also kill a process
            # whose store or tracker closes a connection.
            code = 141  # what a shell shows for a command that SIGPIPE ended
        else:
            print(f"error: {describe(error)}", file=sys.stderr)
            code = 1
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return code


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        from data_shards import __version__

        print(f"segdiff {__version__}")
        return 0
    name, rest = args[0], [a for a in args[1:] if not a.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    if name not in _COMMANDS:
        print(f"segdiff: {name!r} is not a command\n\n{_help()}", file=sys.stderr)
        return 2
    note = None if name in _ON_RANKS else leave_launcher(name)
    if note is not None:
        print(note, file=sys.stderr)
    changed = surroundings.complete()
    if changed is not None and _is_main():
        print(changed, file=sys.stderr)
    try:
        if name in _ON_RANKS:
            refuse(launcher_problems())
        if name not in _WITHOUT_TEMPORARY_FILES:
            refuse(surroundings.temporary_folder_problems())
        if name == "doctor":
            from segdiff_dist import doctor

            return doctor.main(rest)
        if name == "reproduce":
            from segdiff_dist.reproduce import run

            return run.main(rest)
        return _run(name, _COMMANDS[name], rest)
    except InputProblems as error:
        # Once a machine: what is missing may be missing on one of them alone.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            where = "error" if _is_main() else f"error on {socket.gethostname()}"
            for found in error.problems:
                print(f"{where}: {found}", file=sys.stderr)
            plural = "s" if len(error.problems) > 1 else ""
            print(f"{len(error.problems)} problem{plural}; nothing was started", file=sys.stderr)
        return 2
    except (OutOfSpace, ShardFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if _reader_is_gone():
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        if name in _ONLY_READ or work_has_begun():  # a disk may fill, and a server go away
            return 1
        print("nothing was started", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(name: str, command: _Command, args: list[str]) -> int:
    """Resolve the configuration (defaults, run folder, file, flags) and call the stage."""
    import tyro

    from segdiff_dist.config import as_dict, to_yaml
    from segdiff_dist.experiment import Withheld, load_experiment, value_of

    args = _without_aliases(command, args)
    config_file, run = _peek(args, "--config"), _peek(args, "--run")
    if name == "demo" and config_file is None:
        config_file = str(demo_config())
    # What a command is pointed at by its position is named by a person.
    written = [key for key, _ in command.positional] + list(command.written)
    withheld: list[Withheld] = []
    base = load_experiment(Path(config_file) if config_file else None, Path(run) if run else None, written, withheld)

    types = get_type_hints(type(base))

    def path(key: str, *markers: Any, **options: Any) -> tuple[str, Any, Any]:
        described = tyro.conf.arg(help=_PATHS[key], **options)
        return key, Annotated[(types[key], *markers, described)], getattr(base, key)

    shape: list[tuple[str, Any, Any]] = [
        path(key, tyro.conf.Positional, metavar=metavar) for key, metavar in command.positional
    ]
    shape += [path(key) for key in command.named]
    shape += [
        ("config", Annotated[Path | None, tyro.conf.arg(help="YAML file; flags win over it")], None),
        ("dry_run", Annotated[bool, tyro.conf.arg(help="print the resolved configuration and stop")], False),
    ]
    shape += [(key, type(getattr(base, key)), getattr(base, key)) for key in command.sections]
    given: Any = tyro.cli(
        make_dataclass("Arguments", shape, frozen=True),
        args=args,
        prog=f"segdiff {name}",
        description=_description(command),
    )
    chosen = {f.name: getattr(given, f.name) for f in fields(given) if f.name not in ("config", "dry_run")}
    experiment: Experiment = replace(base, **chosen)
    for one in withheld:
        is_used = one.key.split(".")[0] in (*command.named, *command.sections, *written)
        if is_used and one.key != "run" and value_of(experiment, one.key) == one.default and _is_main():
            print(f"note: {one}", file=sys.stderr)
    if given.dry_run:
        if _is_main():
            print(to_yaml(as_dict(experiment)), end="")
            if command.plans:
                _function(f"plan_{name}")(experiment)
        return 0
    return _function(name.replace("-", "_"))(experiment)


def _function(name: str) -> Callable[[Experiment], int]:
    function: Callable[[Experiment], int] = getattr(importlib.import_module("segdiff_dist.commands"), name)
    return function


def _without_aliases(command: _Command, args: list[str]) -> list[str]:
    meanings = dict(command.aliases)
    pairs = [arg.partition("=") for arg in args]
    return [meanings.get(flag, flag) + equals + value for flag, equals, value in pairs]


def _description(command: _Command) -> str:
    short = [f"{alias} X is short for {flag} X." for alias, flag in command.aliases]
    return "\n".join([command.summary, *short])


def demo_config() -> Path:
    """launch/configs/demo.yaml, which is installed as package data."""
    from importlib.resources import files

    return Path(str(files("segdiff_dist.configs").joinpath("demo.yaml")))


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a notebook's or a test's stream is no file
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _peek(args: list[str], flag: str) -> str | None:
    """The value of a flag, of several the last, before the real parser runs, since its defaults depend on it."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"{flag}="):
            value = arg.split("=", 1)[1]
    return value


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"    {name:<{width}}  {command.summary}" for name, command in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: segdiff COMMAND [...]",
            "",
            "Anatomically faithful CT and MR images from organ masks, at scale.",
            "",
            *lines,
            "",
            "`segdiff COMMAND --help` lists a command's flags; each is also a key of the --config file.",
        ]
    )
