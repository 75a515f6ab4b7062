"""When an output ends: decided token by token, so that nothing after the end of an accepted block leaks."""

from __future__ import annotations

from collections.abc import Iterable

from outrider.request import Request


def append_tokens(request: Request, token_ids: Iterable[int]) -> int:
    """Append output tokens up to the one that ends the request; returns how many were appended."""
    count = 0
    for token_id in token_ids:
        request.token_ids.append(token_id)
        count += 1
        _check_end(request, token_id)
        if request.finished:
            break
    return count


def _check_end(request: Request, token_id: int) -> None:
    if token_id in request.stop_token_ids:  # masked by the processors while min_tokens is not reached
        request.finish_reason = "stop"
        request.stop_reason = token_id if token_id in request.params.stop_token_ids else None
        _flush(request)
        return
    if request.detokenizer is not None:
        stop = request.detokenizer.append(token_id, may_stop=request.num_output_tokens > request.params.min_tokens)
        if stop is not None:
            request.finish_reason, request.stop_reason = "stop", stop
            return
    if len(request.token_ids) >= request.max_length:
        request.finish_reason = "length"
        _flush(request)


def _flush(request: Request) -> None:
    if request.detokenizer is not None:
        request.detokenizer.finish()
