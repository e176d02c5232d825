"""Stages in a row: what `demo`, `run` and `reproduce` share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.documents import read_json
from data_shards.files import write_atomic
from data_shards.problems import InputProblems
from data_shards.settings import identity
from data_shards.store.set_index import file_sha256
from segdiff_dist.experiment import Experiment
from segdiff_dist.stages.base import Result
from segdiff_dist.stages.configured import ConfiguredStage
from segdiff_dist.stages.evaluate import Evaluate

_MEASURED = "measured.json"

Step = tuple[str, Callable[[], Any]]
"""A title and the work."""


def in_a_row(steps: Sequence[Step]) -> Iterator[tuple[str, Any, float]]:
    """Do each; a line before it. Yields title, result and seconds."""
    for number, (title, work) in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {title}", flush=True)
        start = time.perf_counter()
        result = work()
        yield title, result, time.perf_counter() - start


def times_line(times_s: dict[str, float]) -> str:
    """The seconds of each stage, and of all."""
    times = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in times_s.items())
    return f"{times}  in all {sum(times_s.values()) / 60:.1f} min"


def stage_of(stage: type[ConfiguredStage], experiment: Experiment, config: str | None = None) -> ConfiguredStage:
    """A stage with an experiment's settings. `config`: the file that they are of."""
    return replace(stage.of(experiment), config=config).over(experiment)


def run_stage(stage: type[ConfiguredStage], experiment: Experiment, config: str | None = None) -> Result:
    """Check it and start it; what was done already is printed."""
    return stage_of(stage, experiment, config).check().start_as_step()


def evaluate_once(experiment: Experiment) -> Result | None:
    """`segdiff evaluate`, unless the same samples were already measured with the same segmenter and settings and these
    results still exist: somebody may have run `segdiff evaluate --run` and replaced them by others."""
    from segdiff_dist.sampling.store import SampleStore
    from segdiff_dist.sampling.store import identity as identity_of_samples

    run = experiment.path("run")
    folder, segmenter = run / "evaluation", experiment.evaluate.segmenter or run / "segmenter" / "weights"
    of = {
        "evaluate": identity(experiment.evaluate),
        "samples": identity_of_samples(SampleStore.open(run / "samples").job),
        "segmenter": file_sha256(segmenter / "model.safetensors"),
    }
    mark, summary, report = folder / _MEASURED, folder / "summary.json", folder / "report.html"
    is_there = all(file.is_file() for file in (mark, summary, report))
    if is_there and _marked(mark) == of | {"summary": file_sha256(summary)}:
        print(f"evaluate: measured already in {folder}; nothing to do")
        return None
    mark.unlink(missing_ok=True)
    result = run_stage(Evaluate, experiment)
    write_atomic(mark, json.dumps(of | {"summary": file_sha256(summary)}, indent=2) + "\n")
    return result


def _marked(mark: Path) -> dict[str, Any]:
    """The contents of the mark; empty if it is damaged, and then the samples are measured again."""
    with suppress(InputProblems):
        return read_json(mark, "remove it")
    return {}
