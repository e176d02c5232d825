"""Seeded damage for readers' tests: bytes that flipped, went or came; JSON with keys gone and values of other kinds."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# What a stranger's file may say in place of any value.
ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 300_000, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "../../x", "/abs", "a\0b", "\ud800", "\x1b[31m", "x" * 100_000, [], [[]], [None], [1, "x"],
    {}, {"x": 1}, {"": None}, [0] * 1_000,
)  # fmt: skip


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: a bit flipped, a stretch cut out, doubled or overwritten, the end lost."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed)) if changed else 0
        length = rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind <= 1 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + length] = bytes(rng.choice((0, 0xFF, rng.randrange(256))) for _ in range(length))
        else:
            del changed[at:]
    return bytes(changed)


def changed_json(value: Any, rng: random.Random) -> bytes:
    """One to two changes at any depth: a key or an element gone, come twice, or of another value; or deep nesting."""
    changed = {"": copy.deepcopy(value)}
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(list(_places(changed)))
        kind = rng.randrange(6)
        if kind == 0 and container is not changed:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 2:
            nested: Any = container[key]
            for _ in range(rng.choice((5, 100))):
                nested = [nested]
            container[key] = nested
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return json.dumps(changed.get("")).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, one in items:
        yield value, key
        if isinstance(one, dict | list):
            yield from _places(one)
