"""A stage's class as flags: parsed by tyro, with a short and a whole help text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import is_dataclass, replace
from functools import partial
from io import StringIO
from operator import itemgetter
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from data_shards.problems import InputProblems, problem
from data_shards.ranges import metavar

T = TypeVar("T")

HELP_ALL = "--help-all"
_FLAGS_OF = {float: "FLOAT", str: "STR"}


def parse_flags(
    cls: type[T],
    args: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    aliases: Mapping[str, str] | None = None,
    essential: Collection[str] = (),
) -> T:
    """An instance of `cls`, a dataclass, from flags. Raises InputProblems if one is wrong, SystemExit(0) after --help.

    `essential`: the flags that --help shows; --help-all shows every flag.
    """
    aliases = aliases or {}
    given = [_full_name(arg, aliases) for arg in args]
    short = [f"{alias} X is short for {flag} X." for alias, flag in aliases.items()]
    description = "\n".join([" ".join((cls.__doc__ or "").split()), *short])
    options: dict[str, Any] = {"registry": _with_ranges()} | ({} if default is None else {"default": default})
    args = ["--help"] if HELP_ALL in given else given
    if not essential or HELP_ALL in given or not {"-h", "--help"} & set(args):
        with redirect_stderr(StringIO()) as said:
            try:
                return tyro.cli(cls, args=args, prog=prog, description=description, **options)
            except SystemExit as end:
                if not end.code:
                    raise
        raise wrong_flags(said.getvalue(), prog, _likely(cls, args, aliases))
    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        tyro.cli(cls, args=["--help"], prog=prog, description=description, **options)
    print(only_essential(printed.getvalue(), essential), end="", flush=True)
    raise SystemExit(0)


def wrong_flags(box: str, prog: str, likely: Sequence[str] = ()) -> InputProblems:
    """tyro's message about wrong flags, a box of many lines, as a problem of one. `likely`: the flags that a value
    without a flag may be meant for."""
    lines = [re.sub(r"^[│|╰+]|[│|╯+]$", "", line).strip() for line in box.splitlines()]
    lines = ["" if set(line) <= {"-", "─"} else line for line in lines]  # a ruler
    parts = [" ".join(part.split()) for part in "\n".join(lines[1:]).split("\n\n")]
    meant = re.findall(r"^(--?[\w.-]+)", "\n".join(lines).partition("Perhaps you meant:\n")[2], re.MULTILINE)
    remedy = f"did you mean {' or '.join(meant)}? " if meant else ""
    if likely and (stray := re.match(r"\w+ options: ([^-,\s][^,]*)", parts[0])):
        remedy += f"give {' or '.join(f'{flag} {stray[1]}' for flag in likely)}; "
    what = re.sub(r"^(Missing from [^:]+: )\{?([\w-]+)\}? .*\(required\).*", r"\1\2", parts[0])
    what = re.sub(r"no type matching (\S+) could be instantiated from \['?(.*?)'?\]", _of_no_type, what)
    return problem("command line", "flags", what.rstrip(".") or "wrong", f"{remedy}`{prog} {HELP_ALL}` lists them")


def _of_no_type(found: re.Match[str]) -> str:
    """`'high' is not FLOAT or None`, from tyro's words for a value of a type that allows several kinds."""
    kinds = sorted((kind.strip("{}") for kind in found[1].split("|")), key="None".__eq__)
    return f"{found[2]!r} is not {' or '.join(kinds)}"


def _likely(cls: type[Any], given: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """The flags for a file or folder that were not given, in their short form: of a mask and its image, or of a set and
    a run."""
    hints = get_type_hints(cls, include_extras=True)
    named = [name for name, hint in hints.items() if tyro.conf.Positional not in getattr(hint, "__metadata__", ())]
    known = [f"--{name}" for name in ("mask", "out", "data", "run") if name in named]
    short = {flag: alias for alias, flag in aliases.items()}
    missing = [flag for flag in known if not any(arg.partition("=")[0] == flag for arg in given)]
    return [short.get(flag, flag) for flag in (missing[:1] if "--mask" in known else missing)]


def only_essential(text: str, essential: Collection[str]) -> str:
    """A help text, as tyro writes it to a file, with only those flags, in their order, and the positional arguments."""
    place = {flag: index for index, flag in enumerate(("-h", "--config", *essential, "--dry-run"))}
    head, *sections = re.split(r"\n(?= \S.*\n -{10})", "\n".join(line.rstrip() for line in text.splitlines()))
    kept, num_hidden = [(-2, head)], 0
    for section in sections:
        if section.startswith(" positional"):
            kept.append((-1, f"{section.rstrip()}\n"))
            continue
        title, *entries = re.split(r"\n(?=  --?\w)", section)
        placed = ((at, entry.rstrip()) for entry in entries if (at := _first_place(entry, place)) is not None)
        chosen = sorted(placed, key=itemgetter(0))
        num_hidden += len(entries) - len(chosen)
        if chosen:  # without the description of the whole section
            text = "\n".join([*title.split("\n")[:2], *(entry for _, entry in chosen), ""])
            kept.append((chosen[0][0], text))
    more = f"{num_hidden} more flags: {HELP_ALL}\n" if num_hidden else ""
    return "\n".join([*(text for _, text in sorted(kept, key=itemgetter(0))), more])


def _first_place(entry: str, place: Mapping[str, int]) -> int | None:
    """The place of a help text's entry: that of the first of its flags which has one."""
    return min((place[flag] for flag in re.findall(r"-[-\w.]+", entry.split("\n")[0]) if flag in place), default=None)


def _with_ranges() -> ConstructorRegistry:
    """tyro's rules, with the range of a field beside its type: `INT (1 or more)`; texts without line breaks."""
    registry, is_asking_tyro = ConstructorRegistry(), False

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_asking_tyro
        if is_asking_tyro or not is_dataclass(info.type):
            return None
        is_asking_tyro = True  # tyro asks this rule too; it leaves such types to tyro's own rules
        try:
            spec = registry.get_struct_spec(info)
        finally:
            is_asking_tyro = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        as_shown = (replace(one, type=_named(one.type), helptext=partial(_on_one_line, one)) for one in spec.fields)
        return replace(spec, fields=tuple(as_shown))

    return registry


def _on_one_line(field: StructFieldSpec) -> str | None:
    """A field's text without the line breaks of its source; the help has its own. A flag takes None where YAML has
    null."""
    text = field.helptext() if callable(field.helptext) else field.helptext
    return None if text is None else re.sub(r"\bnull\b", "None", " ".join(text.split()))


def _named(hint: Any) -> Any:
    """A field's type with the name of its values for the help, unless it has one."""
    name = metavar(hint)
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    if tyro.conf.Positional in marks:  # its place has no default
        hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
    has_name = any(getattr(mark, "metavar", None) for mark in marks)
    hint = _as_pairs(hint)
    return hint if name is None or has_name else Annotated[hint, tyro.conf.arg(metavar=name)]


def _as_pairs(hint: Any) -> Any:
    """A mapping's type as one flag with pairs of a key and a value, which replace those of the configuration. By itself
    tyro makes a flag of each key that the configuration has, and takes no other."""
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(base) is not dict:
        return hint
    value_type = get_args(base)[1]

    def read(words: list[str]) -> dict[str, Any]:
        if len(words) % 2:
            raise ValueError(f"{words[-1]} has no value: give pairs")
        return {key: value_type(value) for key, value in zip(words[::2], words[1::2], strict=True)}

    return Annotated[
        hint,
        PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"[STR {_FLAGS_OF[value_type]} [STR {_FLAGS_OF[value_type]} ...]]",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda pairs: [str(word) for pair in pairs.items() for word in pair],
        ),
    ]


def _full_name(arg: str, aliases: Mapping[str, str]) -> str:
    flag, equals, value = arg.partition("=")
    return aliases.get(flag, flag) + equals + value
