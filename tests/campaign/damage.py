"""Seeded damage to a file. The same kind, seed and number give the same bytes, so that one attempt can be repeated."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import yaml
from mutations_support import changed_bytes, changed_json

# What a length or a count may say in place of the truth.
_HUGE = (2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def damaged(name: str, content: bytes, rng: random.Random) -> bytes:
    """The content of a file, changed in one of many ways. `name` ends in .json or .yaml where its values can change."""
    values = _values(name, content)
    if values is not None and rng.random() < 0.6:
        changed = swapped_fields(values, rng) if rng.random() < 0.2 else json.loads(changed_json(values, rng))
        text = json.dumps(changed) if name.endswith(".json") else _as_yaml(changed)
        return text.encode("utf-8", "surrogatepass")
    kinds = (flipped, truncated, zeroed, swapped, huge, changed_bytes)
    return rng.choice(kinds)(content, rng) if content else b"\0"


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One to eight bits are others."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(content: bytes, rng: random.Random) -> bytes:
    """The end is missing, as after a copy that broke off."""
    return content[: rng.randrange(len(content))]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros, as after a power cut."""
    at, length = rng.randrange(len(content)), rng.choice((4, 64, 512, 4096))
    middle = bytes(len(content[at : at + length]))
    return content[:at] + middle + content[at + length :]


def swapped(content: bytes, rng: random.Random) -> bytes:
    """Two stretches of the same length have changed places."""
    length = rng.choice((1, 2, 4, 8, 64, 512))
    if len(content) < 2 * length:
        return flipped(content, rng)
    first = rng.randrange(len(content) - 2 * length + 1)
    second = rng.randrange(first + length, len(content) - length + 1)
    one, other = content[first : first + length], content[second : second + length]
    return content[:first] + other + content[first + length : second] + one + content[second + length :]


def huge(content: bytes, rng: random.Random) -> bytes:
    """A number of two to eight bytes is very large; mostly near the start, where headers are."""
    width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    number = (rng.choice(_HUGE) % 2 ** (8 * width)).to_bytes(width, order)
    at = rng.randrange(min(len(content), rng.choice((64, 512, 2**20))))
    return content[:at] + number + content[at + width :]


def swapped_fields(values: Any, rng: random.Random) -> Any:
    """Two values of the same object have changed places."""
    changed = copy.deepcopy(values)
    objects = [one for one in _objects(changed) if len(one) > 1]
    if objects:
        chosen = rng.choice(objects)
        first, second = rng.sample(sorted(chosen, key=str), 2)
        chosen[first], chosen[second] = chosen[second], chosen[first]
    return changed


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    if isinstance(values, dict):
        yield values
    for one in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _objects(one)


def _values(name: str, content: bytes) -> Any:
    if name.endswith(".json"):
        return json.loads(content)
    return yaml.safe_load(content) if name.endswith(".yaml") else None


def _as_yaml(values: Any) -> str:
    # JSON is YAML, but for its words for numbers that are not finite.
    return json.dumps(values).replace("NaN", ".nan").replace("Infinity", ".inf")
