"""A page in the browser to draw masks and make CT and MR images of them; works without a network."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from data_shards.problems import problem
from segdiff_dist.config.choices import Device
from segdiff_dist.experiment import collect
from segdiff_dist.serving.config import ServeConfig, require_packages
from segdiff_dist.stages.base import Cost, Plan, Result, Stage

if TYPE_CHECKING:
    from segdiff_dist.serving.served_model import ServedModel
    from segdiff_dist.tracking.tracker import Tracker

_PACKAGES = ("fastapi", "python_multipart", "prometheus_client", "uvicorn")


@dataclass(frozen=True, kw_only=True)
class Studio(Stage):
    """Open a page to draw a mask and paint CT and MR images of it. It is served to this machine alone, and needs no
    network. Without --model: the small model that comes with the package, which was trained on drawn
    patients (the phantom), not on real ones. Ctrl-C ends it."""

    only_reads: ClassVar = True

    model: str | None = None
    """A run folder, an exported pipeline, a URL (file:, https:, s3:) of one, or a Hugging Face name OWNER/NAME. null:
    the model that comes with the package."""
    port: Annotated[int, Interval(ge=0, le=65_535)] = 8701
    """The port of the page. 0: any that is free."""
    browser: Literal["auto", "none"] = "auto"
    """auto: the page is opened in a browser if the command runs in a terminal on a desktop. none: its address is only
    printed."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the networks. auto: bf16 where the device has arithmetic for it."""

    def check(self) -> StudioPlan:
        """Opens the model, and the port."""
        require_packages("studio", _PACKAGES)
        given = () if self.model is None else (self.model,)
        # CT and MR of one mask come within some milliseconds, and cost half as much in one batch.
        config = ServeConfig(
            models=given, studio=True, batch_wait_ms=100.0, device=self.device, precision=self.precision
        )
        config.check()
        listening, served = collect(lambda: _bound(self.port), lambda: _served_model(config))
        return StudioPlan(self, config, served, listening)


@dataclass(frozen=True)
class StudioPlan(Plan):
    """A loaded model, and a port that is taken."""

    stage: Studio
    config: ServeConfig
    served: ServedModel
    listening: socket.socket

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}/"

    def cost(self) -> Cost:
        """What is served, and where."""
        model = self.served.model
        address = "any free port" if self.stage.port == 0 else self.url
        return Cost(notes=(f"model: {model.name}, {model.pipeline.size} pixels", f"address: {address}"))

    def run(self, tracker: Tracker) -> Result:
        """Serve until Ctrl-C."""
        from segdiff_dist.studio.local import serve_page

        serve_page(self.served, self.config, self.listening, self._say)
        return Result(("stopped",))

    def _say(self) -> None:
        print(f"segdiff studio: {self.url} (Ctrl-C ends it)", flush=True)
        print(f"model: {self.served.model.name}; its images are synthetic; the interface: {self.url}docs", flush=True)
        if self.stage.browser == "auto" and _has_desktop():
            threading.Thread(target=webbrowser.open, args=(self.url,), daemon=True).start()


def _served_model(config: ServeConfig) -> ServedModel:
    from data_shards.fan_out import num_cores
    from segdiff_dist.serving.served_model import ServedModel

    [(name, where)] = config.named_models.items()
    return ServedModel(name, where, config, num_cores())


def _bound(port: int) -> socket.socket:
    """A socket of this machine alone."""
    listening = socket.socket(socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        value = f"{port} cannot be used ({error.strerror or error})"
        raise problem("studio", "--port", value, "choose another one, or 0 for any that is free") from error
    return listening


def _has_desktop() -> bool:
    return sys.stdout.isatty() and bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
