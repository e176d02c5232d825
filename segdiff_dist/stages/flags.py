"""A stage's class as flags: parsed by tyro, with a short and a whole help text."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, TypeVar

import tyro

T = TypeVar("T")

HELP_ALL = "--help-all"


def parse_flags(
    cls: type[T],
    args: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    aliases: Mapping[str, str] | None = None,
    essential: Collection[str] = (),
) -> T:
    """An instance of `cls`, a dataclass, from flags. Raises SystemExit: 0 after --help, 2 where a flag is wrong.

    `essential`: the flags that --help shows; --help-all shows every flag.
    """
    aliases = aliases or {}
    args = [_full_name(arg, aliases) for arg in args]
    short = [f"{alias} X is short for {flag} X." for alias, flag in aliases.items()]
    description = "\n".join([(cls.__doc__ or "").strip(), *short])
    options: dict[str, Any] = {} if default is None else {"default": default}
    asks_all = HELP_ALL in args
    asks = asks_all or any(arg in ("-h", "--help") for arg in args)
    if not asks:
        return tyro.cli(cls, args=args, prog=prog, description=description, **options)
    with redirect_stdout(StringIO()) as printed:
        try:
            tyro.cli(cls, args=["--help"], prog=prog, description=description, **options)
        except SystemExit as end:
            code = end.code
    text = printed.getvalue()
    print(text if asks_all or not essential else only_essential(text, essential), end="")
    sys.stdout.flush()
    raise SystemExit(code)


def only_essential(text: str, essential: Collection[str]) -> str:
    """A help text of tyro's with only those flags in its boxes, and the positional arguments."""
    shown = {"-h", "--help", "--config", "--dry-run", *essential}
    kept: list[str] = []
    box: list[str] = []
    num_hidden = 0
    keeps = True
    for line in text.splitlines():
        if line.startswith("╭"):
            box, keeps, has_any = [line], True, "positional" in line
            continue
        if not box:
            kept.append(line)
        elif line.startswith("╰"):
            kept += [*box, line] if has_any else []
            box = []
        elif flags := re.match(r"│ (-\S.*)", line):
            names = set(re.findall(r"-[-\w.]+", re.split(r"  |│", flags[1])[0]))
            keeps = bool(names & shown)
            has_any, num_hidden = has_any or keeps, num_hidden + (not keeps)
            box += [line] if keeps else []
        else:
            box += [line] if keeps else []
    return "\n".join([*kept, f"{num_hidden} more flags: {HELP_ALL}", ""])


def _full_name(arg: str, aliases: Mapping[str, str]) -> str:
    flag, equals, value = arg.partition("=")
    return aliases.get(flag, flag) + equals + value
