"""The files of the page, for the application of `segdiff_dist.serving`, with headers that keep it on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "page"
# Only the page's own files and the server that sent them. NiiVue has pictures and workers in its own file (data:,
# blob:), and decoders as WebAssembly.
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Checked against the file's tag each time: an upgraded package shows its own page.
    "Cache-Control": "no-cache",
}


class Page(StaticFiles):
    """The page at the root of an application: `app.mount("/", Page())`, after all other routes."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    def file_response(self, *args: Any, **options: Any) -> Response:
        """A file, with the headers."""
        response = super().file_response(*args, **options)
        response.headers.update(HEADERS)
        return response
