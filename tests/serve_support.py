"""A small service for tests: an untrained model of 32 pixels behind Ray Serve on loopback."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image
from sampling_support import QUICK, write_weights

from data_shards.labels import AMOS
from data_shards.ray_session import ray_session
from segdiff_dist.denoising.config import DiffusionConfig
from segdiff_dist.export.job import check_model
from segdiff_dist.pipeline import Extras
from segdiff_dist.serving.config import ServeConfig

TOKEN = "of-a-test-0123456789"
LIVER, SPLEEN, BODY = (AMOS.names.index(name) for name in ("liver", "spleen", "body"))


def small_pipeline(folder: Path) -> Path:
    """A pipeline of 32 pixels, untrained."""
    run = write_weights(folder, mask_dropout=0.1)
    extras = Extras(preprocessing={"size": 32, "spacing_mm": 2.0}, field_mm=64.0)
    check_model(run / "weights" / "ema", run / "pipeline", DiffusionConfig(), QUICK["sampler"], extras).write()
    return run / "pipeline"


def organs() -> np.ndarray:
    """uint8 [32, 32]."""
    mask_HW = np.zeros((32, 32), np.uint8)
    mask_HW[4:28, 3:29], mask_HW[10:20, 6:14], mask_HW[12:17, 20:26] = BODY, LIVER, SPLEEN
    return mask_HW


def png(mask_HW: np.ndarray) -> bytes:
    """A file of label ids."""
    stream = io.BytesIO()
    Image.fromarray(mask_HW).save(stream, format="PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class Client:
    """Requests to a service, with its token."""

    url: str

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=60, headers=self.headers, **options)

    def paint(
        self, mask: bytes, accept: str = "application/x-nifti", path: str = "/paint", **fields: Any
    ) -> requests.Response:
        """POST /paint, or another path."""
        headers = self.headers | {"Accept": accept}
        sent = {"files": {"mask": ("m", mask)}, "data": fields, "headers": headers, "timeout": 120}
        return requests.post(self.url + path, stream=accept == "text/event-stream", **sent)

    def paint_many(self, mask: bytes, fields: list[dict[str, Any]]) -> list[requests.Response]:
        """All at the same time."""
        with ThreadPoolExecutor(len(fields)) as pool:
            return list(pool.map(lambda own: self.paint(mask, **own), fields))

    def metric(self, name: str, words: str = "") -> float:
        """The sum of a metric's values on lines that contain `words`."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{") and words in line)

    def wait_for(self, name: str, value: float, seconds: float = 30.0) -> None:
        """Until a metric has a value."""
        until = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} is {self.metric(name)}"
            time.sleep(0.1)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {TOKEN}"}


def model_process() -> psutil.Process:
    """The process of the model of a service that this process started."""
    below = psutil.Process().children(recursive=True)
    [found] = [one for one in below if one.name().startswith("ray::ServeRepl") and "model-" in " ".join(one.cmdline())]
    return found


@contextmanager
def service(config: ServeConfig) -> Iterator[Client]:
    """A service at a free port, ready."""
    from segdiff_dist.serving.engine import running

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    with ray_session(), running(config, "127.0.0.1", port, TOKEN):
        until = time.monotonic() + 120
        while client.get("/healthz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.2)
        yield client
