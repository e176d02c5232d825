"""YAML as plain as JSON: no aliases, no tags of other kinds, keys that are text or whole numbers, bounded nesting.

PyYAML parses; its safe_load alone would expand aliases without bound and take any depth.
"""

from __future__ import annotations

import math
from typing import Any

import yaml
from yaml.constructor import ConstructorError


def load_yaml(text: str, most_depth: int) -> Any:
    """The value of the only document in `text`. Raises ValueError with line and column, or what PyYAML raises of odd
    scalars: LookupError, TypeError, ArithmeticError."""
    try:
        loader = _Loader(text)
        loader.most_depth = most_depth
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
        raise ValueError((", ".join(said) or " ".join(str(error).split())) + place) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases and surprising conversions."""

    most_depth = 0
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the document; aliases and nesting beyond `most_depth` are refused."""
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            # Aliases of aliases make a value of any size from some bytes.
            said = f"*{event.anchor[:40]} is an alias; write out its value"
            raise ConstructorError(None, None, said, event.start_mark)
        self._depth += 1
        if self._depth > self.most_depth:
            raise ConstructorError(None, None, f"nested more than {self.most_depth} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A dictionary with keys of text or whole numbers, each once."""
        keys: set[Any] = set()
        for key_node, _ in getattr(node, "value", None) or ():
            key = self.construct_object(key_node, deep=True)
            if type(key) not in (str, int):
                said = f"the key {str(key)[:40]!r} is read as {type(key).__name__}: write it in quotes"
                raise ConstructorError(None, None, said, key_node.start_mark)
            if key in keys:
                raise ConstructorError(None, None, f"the key {str(key)[:40]!r} comes twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> Any:
        """Whole and other numbers within bounds."""
        if len(node.value) > 40:
            raise ConstructorError(None, None, f"a number of {len(node.value)} characters", node.start_mark)
        whole = node.tag == _TAG + "int"
        number = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if not math.isfinite(number):
            raise ConstructorError(None, None, f"{node.value} is not finite", node.start_mark)
        return number

    def construct_text(self, node: Any) -> str:
        """A date stays text: no setting is a date, and JSON has none."""
        return str(self.construct_yaml_str(node))

    def construct_other(self, node: Any) -> None:
        """Kinds of values that JSON does not have."""
        raise ConstructorError(None, None, f"{node.tag} is not read", node.start_mark)


_TAG = "tag:yaml.org,2002:"
_Loader.add_constructor(_TAG + "int", _Loader.construct_number)
_Loader.add_constructor(_TAG + "float", _Loader.construct_number)
_Loader.add_constructor(_TAG + "timestamp", _Loader.construct_text)
for _kind in ("binary", "omap", "pairs", "set"):
    _Loader.add_constructor(_TAG + _kind, _Loader.construct_other)
