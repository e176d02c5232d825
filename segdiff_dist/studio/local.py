"""The service of one person: the application of `segdiff serve` over a model in this process, which starts in seconds.

`segdiff serve --studio` shows the same page over the processes of Ray Serve.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import uvicorn

from segdiff_dist.serving.app import build_app
from segdiff_dist.serving.batching import let_network_go_first
from segdiff_dist.serving.config import ServeConfig
from segdiff_dist.serving.messages import Event, MaskUpload, PaintRequest
from segdiff_dist.serving.served_model import ServedModel

# How long open requests are waited for at the end.
_PATIENCE_S = 2


class LocalModel:
    """The Backend of the application: one loaded model."""

    def __init__(self, served: ServedModel) -> None:
        self._model = served
        self.models = [served.describe()]

    async def paint(self, model: str, request: PaintRequest) -> AsyncIterator[Event]:
        """Backend.paint."""
        async for event in self._model.paint(request):
            yield event

    async def read_mask(self, model: str, mask: MaskUpload) -> dict[str, Any]:
        """Backend.read_mask."""
        return await self._model.read_mask(mask)

    async def examples(self, model: str) -> dict[str, bytes]:
        """Backend.examples."""
        return await asyncio.to_thread(self._model.examples)


def serve_page(
    served: ServedModel, config: ServeConfig, listening: socket.socket, on_start: Callable[[], None]
) -> None:
    """Answer on a bound socket until Ctrl-C. `on_start` is called when requests are answered."""
    let_network_go_first()
    app = build_app(LocalModel(served), config, None)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE_S)
    try:
        with suppress(KeyboardInterrupt):  # which uvicorn raises after it has closed all connections
            Server(settings).run(sockets=[listening])
    finally:
        served.close()
