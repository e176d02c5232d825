"""A sampling job on a Ray cluster of several nodes, whose parts are killed at no particular moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sampling_support import make_here, pixels_of, write_weights
from tests_support import actors_of

from data_shards.fan_out import ray_session
from data_shards.problems import InputProblems
from segdiff_dist.denoising.sampler_config import SamplerConfig
from segdiff_dist.sampling.store import SampleStore

# Long enough that kills fall between, into and across regions.
JOB: dict[str, Any] = {
    "num": 16,
    "region_size": 2,
    "samples_per_mask": 1,
    "cross_modality_masks": 0,
    "sampler": SamplerConfig(num_steps=20, timestep_spacing="trailing"),
}
DRIVER = """
import sys
from pathlib import Path
from data_shards import lean_imports
lean_imports.begin()  # as a command's process does
from sampling_support import arguments
from segdiff_dist.sampling.job import sample
from test_ray_cluster import JOB

run, shapes, address = sys.argv[1:]
sample(*arguments(Path(run), Path(shapes), **JOB, num_workers=2, ray_address=address))
"""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs no workers, and two nodes with a core each."""
    # Ray by default takes 15 s to call a node dead.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "_system_config": quick}
    made = start_head(head)
    try:
        for _ in range(2):
            add_node(made)
        yield made
    finally:
        made.shutdown()


def start_head(arguments: dict[str, Any]) -> Any:
    """A cluster of one node. Ray gives it 30 s, which may not be enough on a busy machine: then a second time."""
    from ray.cluster_utils import Cluster

    try:
        return Cluster(initialize_head=True, head_node_args=arguments)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        return Cluster(initialize_head=True, head_node_args=arguments)


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, wait=False)


def workers(cluster: Any) -> list[psutil.Process]:
    """The processes of the cluster's actors."""
    return actors_of([psutil.Process(node.all_processes["raylet"][0].process.pid) for node in cluster.worker_nodes])


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
    time.sleep(random.uniform(0.0, 0.3))


def start(run: Path, shapes: Path, cluster: Any, log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", DRIVER, str(run), str(shapes), cluster.address]
    with log.open("wb") as stream:
        return subprocess.Popen(command, stderr=stream, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def test_worker_node_and_driver_killed_and_no_image_is_lost(shapes: Path, tmp_path: Path, cluster: Any) -> None:
    undisturbed = make_here(write_weights(tmp_path / "undisturbed"), shapes, **JOB)
    run, done = write_weights(tmp_path / "run"), tmp_path / "run" / "samples" / "done"

    def num_done() -> int:
        return len(list(done.iterdir())) if done.is_dir() else 0

    first = start(run, shapes, cluster, tmp_path / "first.log")
    try:
        wait_until(lambda: num_done() >= 1)
        random.choice(workers(cluster)).kill()
        wait_until(lambda: num_done() >= 3)
        lost = next(iter(cluster.worker_nodes))
        cluster.remove_node(lost, allow_graceful=False)
        wait_until(lambda: num_done() >= 4)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert num_done() < 8, "it was done before it could be killed"
    assert "a worker was lost" in (tmp_path / "first.log").read_text()
    before = {file.name: file.stat().st_mtime_ns for file in done.iterdir() if file.name.isdigit()}

    add_node(cluster)
    second = start(run, shapes, cluster, tmp_path / "second.log")
    assert second.wait(timeout=240) == 0, (tmp_path / "second.log").read_text()
    store = SampleStore.open(run / "samples")
    assert store.missing() == []
    assert list(store.damaged()) == []
    assert all(np.array_equal(a, b) for a, b in zip(pixels_of(store), pixels_of(undisturbed), strict=True))
    # None was made twice: what was done then has not been touched since.
    assert before == {name: (done / name).stat().st_mtime_ns for name in before}


def test_a_cluster_that_does_not_answer_is_refused() -> None:
    message = "Ray at 127.0.0.1:9: address: nothing answers"
    with pytest.raises(InputProblems, match=message), ray_session("127.0.0.1:9"):
        pass


def test_a_ray_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: here an AttributeError, and a plain Exception where its raylet does not come up in 30 s."""
    monkeypatch.setenv("RAY_object_spilling_config", "[]")
    with pytest.raises(InputProblems, match="Ray on this machine: start: AttributeError"), ray_session(num_cpus=1):
        pass


def test_a_ray_that_is_slow_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with forty busy processes. The third start works."""
    import ray

    begun = []

    def init(*_: object, **__: object) -> None:
        begun.append(1)
        if len(begun) < 3:
            raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with ray_session(num_cpus=1):
        pass
    assert len(begun) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_container_without_shared_memory() -> None:
    """Results of megabytes, which go through Ray's object store, are kept in its private folder."""
    code = (
        "import numpy as np; from data_shards.fan_out import fan_out, ray_session\n"
        "with ray_session(num_cpus=1):\n"
        "    for done in fan_out(lambda: lambda task: np.full(10**6, task), [7], num_workers=1):\n"
        "        print(done.result.sum())"
    )
    script = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, code]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "7000000\n"
