"""Everything that a request may fail with, and its answer in OpenAI's shape."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from outrider.errors import NumericsError, OutriderError, QueueFullError
from outrider.sampling.params import SamplingParams
from outrider.server.responses import Error, ErrorDetail

RETRY_AFTER_S = 1
PARAMS = frozenset({"prompt", *(of.name for of in fields(SamplingParams))})


class ModelNotFoundError(OutriderError):
    """A request for a model that is not served."""


class EngineFailedError(Exception):
    """The engine stopped working while it ran a request, or before: its state is unknown, so it takes no more."""

    def __init__(self) -> None:
        super().__init__("the engine failed; the server's log says why, and it has to be started again")


class ServerStoppingError(Exception):
    """The server was told to stop, and the time that running requests had is over, or this one came too late."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


@dataclass(frozen=True)
class Failure:
    """An answer that is no result.

    Attributes:
        status: of HTTP; in a stream that has begun only the body is sent.
    """

    status: int
    body: Error
    headers: dict[str, str] = field(default_factory=dict)


def failure(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Failure:
    """A failure; its message is one line."""
    detail = ErrorDetail(message=" ".join(message.split()), type=type, param=param, code=code)
    return Failure(status, Error(error=detail), headers or {})


def failure_of(error: Exception) -> Failure:
    """How an exception is answered; what is inside of one that nobody foresaw stays in the log."""
    message, retry = str(error), {"Retry-After": str(RETRY_AFTER_S)}
    match error:
        case ModelNotFoundError():
            failed = failure(404, message, param="model", code="model_not_found")
        case QueueFullError():
            failed = failure(429, message, type="rate_limit_error", code="queue_full", headers=retry)
        case NumericsError():
            failed = failure(500, message, type="server_error", code="numerics")
        case ServerStoppingError():
            failed = failure(503, message, type="server_error", code="stopping", headers=retry)
        case EngineFailedError():
            failed = failure(500, message, type="server_error", code="engine_failed")
        case OutriderError():
            too_long = error.what.startswith(("prompt", "request")) and error.what.endswith(" length")
            code = "context_length_exceeded" if too_long else None
            failed = failure(400, message, param=error.what if error.what in PARAMS else None, code=code)
        case _:
            failed = failure(500, "internal error; the server's log says more", type="server_error")
    return failed
