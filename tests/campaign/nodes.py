"""Lost nodes: a stage runs on a Ray cluster of two nodes, one of which loses all its processes at a random moment."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from campaign import record
from campaign.kills import MOST_S, Kills, compared, drawn_share, outcome_of, restarted
from campaign.stage_runs import STAGES, StageRun

_STORE_BYTES = 100 * 2**20
# Ray by default takes 15 s to call a node dead.
_QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}


def lose_nodes(names: list[str], number: int, seed: int, end: float, out: Path) -> bool:
    """Up to `number` lost nodes, the stages on Ray in turn, until `end`. Whether one was a fault."""
    chosen = [stage for stage in STAGES if stage.is_on_ray and (not names or stage.title in names)]
    file, is_bad = out / "nodes.jsonl", False
    there = {line["number"] for line in record.lines(file) if line["seed"] == seed}
    kills = Kills(Path(out).resolve() / "kills")  # the same undisturbed runs; not at the same time
    cluster = None
    try:
        kills.undisturbed(max(chosen, key=STAGES.index))
        cluster = _cluster()
        for at in range(number):
            if at in there:
                continue
            if time.monotonic() > end:
                break
            stage = chosen[at % len(chosen)]
            found = lose_once(kills, stage, cluster, random.Random(f"{stage.title}/{seed}/{at}"))
            line = {"stage": stage.title, "seed": seed, "number": at} | found
            is_bad |= record.append_comparison(file, line)
    finally:
        kills.end()
        if cluster is not None:
            cluster.shutdown()
    return is_bad


def lose_once(kills: Kills, stage: StageRun, cluster: Any, rng: random.Random) -> dict[str, Any]:
    """One node lost while the command runs, the same command again where that ended it, and the comparison."""
    kills.refresh(stage)
    begun, node = time.monotonic(), cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, wait=True)
    command = kills.start(stage, cluster.address)
    moment = drawn_share(rng) * kills.seconds[stage.title]
    had_ended = command.wait(moment) is not None
    _lose(cluster, node)
    code, said = command.wait(MOST_S), command.said()
    found: dict[str, Any] = {}
    if code is None:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        found = {"outcome": "hung", "what": said[-800:]}
    elif "Traceback" in said:
        found = {"outcome": "unclean", "what": said[-1200:]}
    elif code not in (0, 1):
        found = outcome_of(code, said)
    elif code == 1:
        found = restarted(kills.start(stage, cluster.address))
    found = compared(kills, stage, found)
    seconds = round(time.monotonic() - begun, 1)
    return found | {"had_ended": had_ended, "exit_code": code, "seconds": seconds}


def _cluster() -> Any:
    """A head that runs no workers, and one node that stays."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "_system_config": _QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, wait=True)
    return cluster


def _lose(cluster: Any, node: Any) -> None:
    """Kill all processes of a node, its workers too, as when the power goes."""
    below: list[psutil.Process] = []
    with suppress(psutil.Error):
        below = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for one in below:
        with suppress(psutil.Error):
            one.kill()


def table(rows: list[dict[str, Any]]) -> str:
    """A row a stage."""
    found = [["stage", "nodes lost", "while it ran", "went on without it", *record.KILL_OUTCOMES]]
    for title in [*dict.fromkeys(row["stage"] for row in rows), "all"]:
        own = [row for row in rows if title in (row["stage"], "all")]
        running = [row for row in own if not row["had_ended"]]
        went_on = sum(row["exit_code"] == 0 for row in running)
        counts = [f"{sum(row['outcome'] == outcome for row in own)}" for outcome in record.KILL_OUTCOMES]
        found.append([title, f"{len(own)}", f"{len(running)}", f"{went_on}", *counts])
    return record.as_table(found)
