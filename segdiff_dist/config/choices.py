"""Choices that settings of several layers share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

AttentionBackend = Literal["auto", "sdpa", "xformers"]
Device = Literal["auto", "cpu", "cuda"]


class _YamlSwitch:
    """YAML reads a bare on or off as true or false; here they are words."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(_word, handler(source))


def _word(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], _YamlSwitch()]
