"""The `segdiff` command: parse, check, start, and print the result. exit_status.py has the exit codes."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from difflib import get_close_matches
from io import TextIOWrapper

from data_shards import lean_imports, memory_guard, plain_warnings
from data_shards.end_signals import ended_by_signals
from data_shards.locks import begin_command
from data_shards.problems import refuse
from data_shards.progress import QUIET
from segdiff_dist import stages, surroundings
from segdiff_dist.exit_status import ExitStatus
from segdiff_dist.ranks.distributed import is_main, launcher_problems, leave_launcher
from segdiff_dist.stages.resources import FORCE, unless_forced

COMPLETION = "--tyro-print-completion"


def run(argv: list[str] | None = None) -> int:
    """main() for a process that does nothing else: `segdiff`, `python -m segdiff_dist`, launch/*.py."""
    surroundings.open_standard_streams()
    lean_imports.begin()
    plain_warnings.begin()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have bytes that are not UTF-8
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is said in words, not by C++ stack traces
    ended: list[int] = []
    atexit.register(_end_without_destructors, ended)  # the first one that is registered runs last
    ended.append(main(argv))
    return ended[0]


def _end_without_destructors(ended: list[int]) -> None:
    """End a process that has used Ray, with its exit code, after all of Python's exit functions. On a busy machine a
    thread of Ray's library still writes to its log while C++ destroys that, and the process died of SIGSEGV."""
    if ended and "ray" in sys.modules:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(ended[0])


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    begin_command()
    args, as_json = _without_common_flags(list(sys.argv[1:] if argv is None else argv))
    name = args[0] if args else "segdiff"
    with ended_by_signals(), ExitStatus(as_json) as status, memory_guard.guarded(name) as status.guard:
        plan = _checked(args, status)
        if plan is not None:
            # Then the JSON is all that the output stream gets.
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                result = plan.start()
            status.code = result.exit_code
            if is_main():
                print(result.as_json(), flush=True) if as_json else result.say()
    return status.code


def _without_common_flags(args: list[str]) -> tuple[list[str], bool]:
    """The arguments without the flags that every command has, or that DeepSpeed's launcher adds (--local_rank); and
    whether the result is to be JSON."""
    if "--quiet" in args:
        os.environ[QUIET] = "1"
    if "--force" in args:
        os.environ[FORCE] = "1"
    own = [arg for arg in args if arg not in ("--quiet", "--json", "--force") and not arg.startswith("--local_rank")]
    return own, "--json" in args


def _checked(args: list[str], status: ExitStatus) -> stages.Plan | None:
    """The plan of the command; None if it only prints something."""
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
    elif args[0] == "--version":
        from data_shards import __version__

        print(f"segdiff {__version__}")
    elif args[0] == COMPLETION:
        from segdiff_dist.stages.completion import print_completion

        print_completion(args[1:])
    elif args[0] not in stages.NAMES:
        likely = get_close_matches(args[0], stages.NAMES, n=1)
        meant = f"; did you mean {likely[0]!r}?" if likely else ""
        print(f"segdiff: {args[0]!r} is not a command{meant}\n\n{_overview()}", file=sys.stderr)
        status.code = 2
    else:
        stage = _parsed(args[0], args[1:], status)
        if not stage.dry_run:
            return stage.check()
        _print_dry_run(stage)
    return None


def _parsed(name: str, args: list[str], status: ExitStatus) -> stages.Stage:
    """The stage of a command, where its surroundings let it work. Raises InputProblems where they do not."""
    changed = surroundings.complete()
    stage_class = stages.load(name)
    status.only_reads, status.guard.lower = stage_class.only_reads, stage_class.less_memory
    note = None if stage_class.on_ranks else leave_launcher(name)
    for line in (note, changed if os.environ.get("RANK", "0") == "0" else None):
        if line is not None:
            print(line, file=sys.stderr)
    if stage_class.on_ranks:
        refuse(launcher_problems())
    if stage_class.needs_temporary_files:
        refuse(surroundings.temporary_folder_problems())
    return stage_class.parse(name, args)


def _print_dry_run(stage: stages.Stage) -> None:
    """Print the settings and the cost. The settings come first: a check that refuses them comes after."""
    settings = stage.settings()
    if is_main():
        print(settings, end="", flush=True)
    plan = stage.check()
    if is_main():
        # As comments below settings, so that the output stays YAML.
        print("\n".join(f"{'# ' if settings else ''}{line}".rstrip() for line in plan.cost().lines()))
        refuse(unless_forced(plan.workers_problems()))
        refuse(unless_forced(plan.disk_problems()))


def _overview() -> str:
    width = max(map(len, stages.NAMES))
    lines = []
    for title, names in stages.GROUPS.items():
        lines += [f"{title}:", *(f"    {name:<{width}}  {stages.summary(name)}" for name in names), ""]
    return "\n".join(
        [
            "usage: segdiff COMMAND [...]",
            "",
            "Train a diffusion model that makes CT and MR slices from organ masks, and measure its images.",
            "",
            *lines,
            "`segdiff COMMAND --help` lists a command's main flags, --help-all every flag. Each is also a key of the",
            "--config file, where null is written for None. Every command also takes",
            "    --dry-run  print the settings and the cost of the work, and stop",
            "    --quiet    show no progress",
            "    --json     print the result or the error as one line of JSON, and all else on the error stream",
            "    --force    start work that, by its estimated cost, does not fit into this machine",
            f"`segdiff {COMPLETION} bash` (or zsh, tcsh) prints a script that completes commands and flags.",
        ]
    )
