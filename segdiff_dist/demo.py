"""`segdiff demo`: the whole line on the phantom, on two CPU cores. Stages that are done already are passed over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from data_shards.fan_out import ray_session
from data_shards.locks import locked
from segdiff_dist import stages

if TYPE_CHECKING:
    from segdiff_dist.experiment import Experiment


def run_demo(experiment: Experiment) -> int:
    """Run every stage, print the headline table, the time each stage took, and where the report is."""
    from segdiff_dist.evaluation.measure.summary import format_table
    from segdiff_dist.evaluation.metrics.sharpness import sharpness_messages

    evaluated: dict[str, Any] = {}
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("phantom", lambda: stages.make_phantom(experiment)),
        ("prepare", lambda: stages.prepare(experiment)),
        ("train-segmenter", lambda: stages.train_segmenter(experiment)),
        ("train", lambda: stages.train_denoiser(experiment)),
        ("sample", lambda: stages.sample(experiment)),
        ("evaluate", lambda: evaluated.update(stages.evaluate(experiment))),
    ]
    times_s = {}
    run = experiment.path("run")
    with locked(run / ".demo.lock", run, "is running the demo"), ray_session(experiment.prepare.ray_address):
        for number, (name, step) in enumerate(steps, 1):
            print(f"\n[{number}/{len(steps)}] {name}", flush=True)
            start = time.perf_counter()
            step()
            times_s[name] = time.perf_counter() - start
    print(f"\n{format_table(evaluated)}")
    print("\n".join((*sharpness_messages(evaluated["metrics"]), "")))
    print("  ".join(f"{name} {seconds:.0f} s" for name, seconds in times_s.items()), end="")
    print(f"  in all {sum(times_s.values()) / 60:.1f} min")
    print(f"report: {(experiment.path('run') / 'evaluation' / 'report.html').resolve()}")
    return 0
