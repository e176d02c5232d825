"""What every request passes before the application sees it: where it comes from, its token, its length.

Plain ASGI, so that a body is counted as it arrives and refused before it is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segdiff_dist.serving.config import LOOPBACK
from segdiff_dist.serving.messages import ServiceError

# What needs the token. The page, its files, /docs and /healthz say nothing of models or requests.
_CLOSED = ("/models", "/labels", "/examples", "/masks", "/paint", "/metrics")
_NO_BODY = ("GET", "HEAD", "OPTIONS")
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class _TooLong(Exception):
    """More bytes than are taken."""


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Guard:
    """Refuses a request, or passes it on. `token_digest`: None takes requests without a token, of this machine alone.
    `on_answer`: called with the scope and the status of each answer."""

    app: ASGIApp
    token_digest: str | None
    most_bytes: int
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
        num_bytes, has_begun = 0, False

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.most_bytes:
                raise _TooLong
            return message

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if num_bytes > self.most_bytes:
                return  # whatever the application made of _TooLong
            if not has_begun:
                self.on_answer(scope, message["status"])
            has_begun = True
            await send(message)

        with suppress(_TooLong):
            await self.app(scope, counting, sending)
        if num_bytes > self.most_bytes and not has_begun:
            await self._refuse(scope, send, self._too_long())

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
    if error.status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    return headers


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def _name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
