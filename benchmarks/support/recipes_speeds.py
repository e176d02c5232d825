"""Training speed of the compared recipes, measured separately from the comparison's own runs.

OUT/DATA/speeds.json    images a second of both recipes, in turns
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from data_shards.files import write_atomic
from support.recipes_runs import NEVER, Recipe, Run, Scale, train

# How often, and for how many images, each recipe's speed is measured.
_TURNS, _TURN_IMAGES = 3, 320


def speeds(data: Path, recipes: Mapping[str, Recipe], scale: Scale, deadline: float = NEVER) -> dict[str, float] | None:
    """Images a second of the recipes' training steps, one run at a time and in turns, the median of three; None where
    time ran out. The comparison's own runs run at the same time, and share the machine with other work."""
    file = data / "speeds.json"
    if not file.is_file():
        rates: dict[str, list[float]] = {name: [] for name in recipes}
        for turn in range(_TURNS):
            for name, recipe in recipes.items():
                # Its schedule does not change the cost of a step.
                run = Run(data, replace(recipe, name=f"speed-{name}", share=_TURN_IMAGES / scale.num_images), turn)
                if not train(run, scale, deadline):
                    return None
                images, seconds = list(run.seconds().items())[-1]
                rates[name].append(images / seconds)
        write_atomic(file, json.dumps({name: statistics.median(r) for name, r in rates.items()}) + "\n")
    return json.loads(file.read_text())
