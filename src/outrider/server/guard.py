"""What every request has to pass before any route sees it: the key, the origin, and the size of its body."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.config import ServerConfig
from outrider.server.failures import Failure, failure


def respond(failed: Failure) -> Response:
    """A failure as a response."""
    return Response(
        failed.body.model_dump_json(), failed.status, headers=failed.headers, media_type="application/json"
    )


class Guard:
    """ASGI middleware around everything, unknown paths included.

    A browser lets any page send requests to a server on its machine, and names the page's origin: a request with one
    that is not allowed is refused, as is a body that is not declared to be JSON (pages may send others unasked).
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._key = None if config.api_key is None else _digest(config.api_key.encode())
        self._origins = config.allowed_origins
        self._max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        failed = self._check(scope["method"], Headers(scope=scope))
        if failed is not None:
            await respond(failed)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _check(self, method: str, headers: Headers) -> Failure | None:
        if not self._is_authorised(headers):
            return failure(
                401,
                "missing or wrong API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        origin = headers.get("origin")
        if origin is not None and not _is_allowed(origin, self._origins):
            return failure(
                403, f"origin {origin[:80]!r} is not allowed; see --allow-origin", code="origin_not_allowed"
            )
        if method == "POST" and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return failure(415, "expected a body of Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _is_authorised(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests are of one length, so that the comparison tells nothing about the key's.
        return hmac.compare_digest(_digest(given.strip().encode()), self._key) and scheme.lower() == "bearer"

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` for bodies that do not say how long they are."""
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large().body.error.message)  # answered as any other failure
            return message

        return bounded

    def _too_large(self) -> Failure:
        return failure(413, f"request body: expected at most {self._max_body_bytes} bytes")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _is_allowed(origin: str, allowed: Iterable[str]) -> bool:
    return any(of in ("*", origin) for of in allowed)
