"""The values that a setting can have, given by its type: `num: Annotated[int, Ge(1)]`, `axis: Literal["axial", ...]`.

pydantic reads the same types for YAML. `range_problems` checks a section that was made in Python or from flags.
`requirement` gives a text for a type, for remedies and the reference page; `metavar` is the form for --help.
"""

from __future__ import annotations

import numbers
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen, Predicate

from data_shards.problems import Problem
from data_shards.settings import settings_of

T = TypeVar("T")


@dataclass(frozen=True)
class Rule(Predicate):
    """A condition on a value, with its text."""

    func: Callable[[Any], bool]
    words: str


def _is_distinct(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)


def _is_rising(pair: tuple[float, float]) -> bool:
    return pair[0] < pair[1]


def _does_not_fall(pair: tuple[float, float]) -> bool:
    return pair[0] <= pair[1]


Count = Annotated[int, Ge(1)]
# Channels of a net. One with more is not built in any time or memory; published ones have a tenth.
Channels = Annotated[int, Interval(ge=1, le=65_536)]
Layers = Annotated[int, Interval(ge=1, le=64)]
# Of 64 bits, as torch's generators take them.
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
WholeNumber = Annotated[int, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
EACH_ONCE = Rule(_is_distinct, "each once")
Some = Annotated[tuple[T, ...], MinLen(1), EACH_ONCE]
RISING = Rule(_is_rising, "the lower one first")
NOT_FALLING = Rule(_does_not_fall, "the lower one first")

_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}
_FLAGS = {int: "INT", float: "FLOAT", bool: "{True,False}", str: "STR", Path: "PATH", types.NoneType: "None"}
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def range_problems(section: Any, where: str, prefix: str = "") -> list[Problem]:
    """The settings of a section whose values their types do not allow. Sections inside it are not checked."""
    return [
        Problem(where, f"{prefix}{setting.name}", _shown(value), f"give {requirement(setting.type)}")
        for setting in settings_of(type(section))
        if setting.effect is not None and not is_allowed(value := getattr(section, setting.name), setting.type)
    ]


@dataclass
class SettingChecks:
    """Collects the problems of a section's settings, for rules across settings. `where`, `prefix`: as in
    range_problems."""

    section: Any
    where: str
    prefix: str = ""
    problems: list[Problem] = field(default_factory=list)

    def require(self, name: str, good: bool, remedy: str) -> None:
        """Add a problem of the setting `name`, with its value, unless it is `good`."""
        if not good:
            value = str(getattr(self.section, name))
            self.problems.append(Problem(self.where, f"{self.prefix}{name}", value, remedy))


def names_of(problems: list[Problem]) -> set[str]:
    """The settings that the problems are about, without the names of their sections. A rule across settings is not
    checked if one of its settings is out of range."""
    return {one.field.rpartition(".")[2] for one in problems}


def is_allowed(value: Any, hint: Any) -> bool:
    """Whether a type allows a value, as pydantic decides it for values that need no conversion."""
    base, marks = _split(hint)
    if is_union(base):
        allowed = any(is_allowed(value, arm) for arm in get_args(base))
    elif get_origin(base) is Literal:
        allowed = value in get_args(base)
    elif get_origin(base) is tuple:
        allowed = isinstance(value, tuple | list) and _are_allowed(value, get_args(base))
    else:
        allowed = _is_of(value, base)
    return allowed and all(_holds(mark, value) for mark in marks)


def requirement(hint: Any) -> str:
    """The requirement of a type, as a text that follows `give`."""
    base, marks = _split(hint)
    rules = "".join(f", {mark.words}" for mark in marks if isinstance(mark, Rule))
    if is_union(base):
        arms = get_args(base)
        text = " or ".join(requirement(arm) for arm in arms if arm is not types.NoneType)
        return f"{text}, or null" if types.NoneType in arms else text
    if get_origin(base) is Literal:
        choices = list(map(str, get_args(base)))
        return (choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}") + rules
    if get_origin(base) is tuple:
        return _tuple_words(get_args(base), any(isinstance(mark, MinLen) for mark in marks)) + rules
    if get_origin(base) is dict:
        return "a mapping" + rules
    return f"{_PLAIN.get(base, 'a value')}{_bounds(marks)}{rules}"


def metavar(hint: Any) -> str | None:
    """The same in the short form of a flag's help: `INT (1 or more)`, `PATH|None`. None if the type has no limits and
    does not allow None, since then its name is enough."""
    limits, base = _limits(hint), _split(hint)[0]
    if limits:
        return f"{_flag_name(hint)} ({', '.join(limits)})"
    return _flag_name(hint) if is_union(base) and types.NoneType in get_args(base) else None


def is_union(hint: Any) -> bool:
    """Whether a type is a union of others."""
    return get_origin(hint) in (Union, types.UnionType)


def _split(hint: Any) -> tuple[Any, list[Any]]:
    """A type without its marks, and the marks that limit its values."""
    if get_origin(hint) is not Annotated:
        return hint, []
    base, *marks = get_args(hint)
    return base, list(_single(marks))


def _single(marks: list[Any]) -> Iterator[Any]:
    for mark in marks:
        if isinstance(mark, GroupedMetadata):
            yield from _single(list(mark))
        elif isinstance(mark, Ge | Gt | Le | Lt | MinLen | Predicate):
            yield mark


def _are_allowed(values: tuple[Any, ...] | list[Any], items: tuple[Any, ...]) -> bool:
    if len(items) == 2 and items[1] is Ellipsis:
        return all(is_allowed(value, items[0]) for value in values)
    return len(values) == len(items) and all(map(is_allowed, values, items))


def _is_of(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        # NumPy's numbers too; a bool is no number here.
        return not isinstance(value, bool) and isinstance(value, _NUMBERS[kind])
    if kind is types.NoneType:
        return value is None
    if get_origin(kind) is dict:
        return isinstance(value, Mapping)
    if kind is Path:
        return isinstance(value, Path | str)
    return isinstance(value, kind)


def _holds(mark: Any, value: Any) -> bool:
    # Written so that NaN, for which every comparison is false, is refused.
    if isinstance(mark, Ge):
        return bool(value >= mark.ge)
    if isinstance(mark, Gt):
        return bool(value > mark.gt)
    if isinstance(mark, Le):
        return bool(value <= mark.le)
    if isinstance(mark, Lt):
        return bool(value < mark.lt)
    return len(value) >= mark.min_length if isinstance(mark, MinLen) else mark.func(value)


def _bounds(marks: list[Any]) -> str:
    low, above, high, below = (_bound(marks, name) for name in ("ge", "gt", "le", "lt"))
    if low and high:
        return f" from {low} to {high}"
    least = f" of at least {low}" if low else f" above {above}" if above else ""
    most = f" of at most {high}" if high else f" below {below}" if below else ""
    return f"{least} and{most}" if least and most else least + most


def _bound(marks: list[Any], name: str) -> str | None:
    value = next((getattr(mark, name) for mark in marks if hasattr(mark, name)), None)
    return f"{value:.7g}" if isinstance(value, float) else None if value is None else str(value)


def _tuple_words(items: tuple[Any, ...], is_not_empty: bool) -> str:
    if items[-1] is not Ellipsis:
        return f"{len(items)} values, each {requirement(items[0])}"
    if get_origin(items[0]) is Literal:
        return f"{'one or more' if is_not_empty else 'any'} of {', '.join(get_args(items[0]))}"
    return f"{'one or more values' if is_not_empty else 'values'}, each {requirement(items[0])}"


def _limits(hint: Any) -> list[str]:
    base, marks = _split(hint)
    if is_union(base):
        own = [limit for arm in get_args(base) for limit in _limits(arm)]
    elif get_origin(base) is tuple:
        each = " and ".join(_limits(get_args(base)[0]))
        own = [f"each {each}"] if each else []
    else:
        own = _short_bounds(marks)
    return [*own, *(mark.words for mark in marks if isinstance(mark, Rule))]


def _short_bounds(marks: list[Any]) -> list[str]:
    low, above, high, below = (_bound(marks, name) for name in ("ge", "gt", "le", "lt"))
    if low and high:
        return [f"{low} to {high}"]
    words = ((low, "{} or more"), (above, "above {}"), (high, "at most {}"), (below, "below {}"))
    return [text.format(limit) for limit, text in words if limit]


def _flag_name(hint: Any) -> str:
    """A flag's value, as tyro names it; None comes last if there are several."""
    base, marks = _split(hint)
    if is_union(base):
        arms = sorted(get_args(base), key=lambda arm: arm is types.NoneType)
        return "|".join(map(_flag_name, arms))
    if get_origin(base) is Literal:
        choices = list(map(str, get_args(base)))
        return choices[0] if len(choices) == 1 else f"{{{','.join(choices)}}}"
    if get_origin(base) is tuple:
        items = get_args(base)
        if items[-1] is not Ellipsis:
            return " ".join(map(_flag_name, items))
        several = f"{(name := _flag_name(items[0]))} [{name} ...]"
        return several if any(isinstance(mark, MinLen) for mark in marks) else f"[{several}]"
    return _FLAGS.get(base, "VALUE")


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
