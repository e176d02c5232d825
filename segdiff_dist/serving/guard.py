"""What every request passes before the application sees it: where it comes from, its token, its body.

Plain ASGI, so that a body is counted as it arrives and refused before it is stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segdiff_dist.serving.config import LOOPBACK
from segdiff_dist.serving.messages import ServiceError

# What needs the token. The page, its files, /docs and /healthz say nothing of models or requests.
_CLOSED = ("/models", "/labels", "/examples", "/masks", "/paint", "/metrics")
_NO_BODY = ("GET", "HEAD", "OPTIONS")
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


# What follows a form's end is to be ignored (RFC 2046, 5.1.1). Few write any.
_EPILOGUE_BYTES = 4096


class _Refused(Exception):
    """The body is not taken."""


@dataclass
class _Body:
    """What is known of a body that arrives. `boundary`: of a form."""

    until: float
    boundary: bytes | None
    num_bytes: int = 0
    end: bytes = b""
    is_whole: bool = False
    error: ServiceError | None = None

    def refuse(self, error: ServiceError) -> _Refused:
        self.error = error
        return _Refused(error.detail)

    @property
    def is_cut_off(self) -> bool:
        """A form without its last boundary (RFC 2046, 5.1.1)."""
        return self.boundary is not None and self.num_bytes > 0 and b"--" + self.boundary + b"--" not in self.end


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Guard:
    """Refuses a request, or passes it on. `token_digest`: None takes requests without a token, of this machine alone.
    `body_s`: within which a body must be whole. `on_answer`: called with the scope and the status of each answer."""

    app: ASGIApp
    token_digest: str | None
    most_bytes: int
    body_s: float
    on_answer: Callable[[Scope, int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET (RFC 9110, 9.3.2): the server leaves the body out
            scope = {**scope, "method": "GET"}
        refused = self._refused(scope)
        if refused is not None:
            await self._refuse(scope, send, refused)
            return
        await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind, options = parse_options_header(Headers(scope=scope).get("content-type"))
        boundary = options.get(b"boundary") if kind == b"multipart/form-data" else None
        body, has_begun = _Body(time.monotonic() + self.body_s, boundary), False

        async def counting() -> Message:
            return await self._received(body, receive)

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if body.error is not None:
                return  # whatever the application made of _Refused
            if not has_begun:
                self.on_answer(scope, message["status"])
            has_begun = True
            await send(message)

        with suppress(_Refused):
            await self.app(scope, counting, sending)
        if body.error is not None and not has_begun:
            await self._refuse(scope, send, body.error)

    async def _received(self, body: _Body, receive: Receive) -> Message:
        """The next message. Raises _Refused."""
        if body.is_whole:
            return await receive()  # that the client left, whenever it does
        try:
            message = await asyncio.wait_for(receive(), max(0.0, body.until - time.monotonic()))
        except TimeoutError:
            value = f"not whole after {self.body_s:g} s"
            raise body.refuse(ServiceError(408, f"body: {value}: send it faster, or a packed one")) from None
        content = message.get("body", b"")
        body.num_bytes += len(content)
        body.end = (body.end + content)[-_EPILOGUE_BYTES:]
        body.is_whole = message["type"] == "http.request" and not message.get("more_body", False)
        if body.num_bytes > self.most_bytes:
            raise body.refuse(self._too_long())
        if body.is_whole and body.is_cut_off:
            value = f"cut off after {body.num_bytes:,} bytes: it has no last boundary"
            raise body.refuse(ServiceError(400, f"body: {value}: send it again"))
        return message

    async def _refuse(self, scope: Scope, send: Send, error: ServiceError) -> None:
        self.on_answer(scope, error.status)
        await answer(send, error)

    def _refused(self, scope: Scope) -> ServiceError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token_digest is None and _name_of(host) not in LOOPBACK:
            # A page of elsewhere whose name was made to point here (DNS rebinding).
            return ServiceError(403, f"Host: {host[:80]}: without a token the service is for {LOOPBACK[0]} alone")
        origin = headers.get("origin")
        if scope["method"] not in _NO_BODY and origin is not None and origin.partition("://")[2] != host:
            return ServiceError(403, f"Origin: {origin[:80]}: send requests from the service's own page, or a program")
        if not self._is_known(scope, headers):
            remedy = "send the header Authorization: Bearer TOKEN"
            return ServiceError(401, f"Authorization: missing or wrong: {remedy}")
        length = headers.get("content-length", "0")
        return self._too_long() if length.isdecimal() and int(length) > self.most_bytes else None

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        path = scope["path"]
        is_closed = any(path == one or path.startswith(f"{one}/") for one in _CLOSED)
        if self.token_digest is None or not is_closed:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(digest_of(token.strip()), self.token_digest)

    def _too_long(self) -> ServiceError:
        return ServiceError(413, f"body: longer than {self.most_bytes:,} bytes: send a smaller mask, or a packed one")


async def answer(send: Send, error: ServiceError) -> None:
    """An error as JSON."""
    body = json.dumps({"detail": error.detail}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(error)}
    await send({"type": "http.response.start", "status": error.status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def headers_of(error: ServiceError) -> dict[str, str]:
    """Of an answer that is an error."""
    headers = dict(HEADERS)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return headers


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def _name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
