"""The effect of a setting, marked on the field of its section: `num_workers: Execution[int]`.

A section is a frozen dataclass. Each of its fields is another section or is marked with one of the five words below.
`identity` reads the marks: it gives the settings that fix a result, as a stage records them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Effect(Enum):
    """The effect of another value of a setting. The values are the texts of the reference page."""

    RESULT = "result"
    RESULT_WHERE_SET = "result, recorded if it is not the default"
    RECORDED_OTHERWISE = "result, recorded in another form"
    RESUMABLE = "may change when a training is resumed"
    EXECUTION = "execution"


# Another value gives another result.
Result = Annotated[T, Effect.RESULT]
# Likewise. The setting is newer than the first records: it is left out of a record while it has its default, so that
# results from before it existed stay the same.
ResultWhereSet = Annotated[T, Effect.RESULT_WHERE_SET]
# Likewise. The record holds another value instead: the digest of a file, or the settings of a preset.
RecordedOtherwise = Annotated[T, Effect.RECORDED_OTHERWISE]
# Recorded with the result. A training may be resumed with another value: its result stays the same, up to rounding.
Resumable = Annotated[T, Effect.RESUMABLE]
# Settings of place, speed and storage time. The result is the same, so they are not recorded.
Execution = Annotated[T, Effect.EXECUTION]


@dataclass(frozen=True)
class Setting:
    """A field of a section: its type without marks, and its mark."""

    name: str
    type: Any
    effect: Effect | None
    """None for a section within the section."""
    field: Field[Any]

    @property
    def default(self) -> Any:
        """The value if none is given."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return self.field.default


def settings_of(section: type[Any]) -> tuple[Setting, ...]:
    """The settings of a section, in the order of its fields. TypeError for a field that is not marked."""
    hints = get_type_hints(section, include_extras=True)
    return tuple(_setting(section, one, hints[one.name]) for one in fields(section))


def _setting(section: type, one: Field[Any], hint: Any) -> Setting:
    if is_dataclass(hint):
        return Setting(one.name, hint, None, one)
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    effects = [mark for mark in marks if isinstance(mark, Effect)]
    if len(effects) != 1:
        remedy = "mark it with one of Result, ResultWhereSet, RecordedOtherwise, Resumable and Execution"
        raise TypeError(f"{section.__name__}.{one.name}: its effect is not marked; {remedy} (data_shards/settings.py)")
    return Setting(one.name, hint, effects[0], one)


def identity(config: Any) -> dict[str, Any]:
    """The settings of a section that fix a result, as they are recorded: plain values for YAML and JSON."""
    recorded = {}
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        if setting.effect is None:
            recorded[setting.name] = identity(value)
        elif _is_recorded(setting, value):
            recorded[setting.name] = _plain(value)
    return recorded


def execution_settings(section: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that may change when a training is resumed: its result is the same."""
    for setting in settings_of(section):
        if setting.effect is None:
            yield from execution_settings(setting.type, f"{prefix}{setting.name}.")
        elif setting.effect in (Effect.EXECUTION, Effect.RESUMABLE):
            yield f"{prefix}{setting.name}"


def _is_recorded(setting: Setting, value: Any) -> bool:
    if setting.effect is Effect.RESULT_WHERE_SET:
        return bool(value != setting.default)
    return setting.effect in (Effect.RESULT, Effect.RESUMABLE)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
