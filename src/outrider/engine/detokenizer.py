"""Text of a growing output: whole characters only, stop strings found wherever they fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Decodes an output token by token and looks for stop strings in the new text.

    Text is decoded in windows that begin a few tokens back, because a token's text depends on its neighbours
    (leading spaces, bytes of one character); the window moves on only past complete characters. The sum of the
    pieces is the text that is shown, streamed and returned, so these never differ.

    Args:
        decode: token ids -> text.
        context: the prompt's last tokens, so that the first output token is decoded as what follows them.
        stop: strings that end the output.
        include_stop: keep the stop string at the end of the text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._stop = stop
        self._include_stop = include_stop
        self._max_stop = max((len(s) for s in stop), default=0)
        self._token_ids = list(context)
        self._window_start = 0  # tokens [window_start, window_end) are in the text already and give context
        self._window_end = len(context)
        self._window_text = decode(context) if context else ""
        self._search_from = 0  # stop strings before it came too early to count
        self._stopped = False
        self.text = ""

    def append(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add a token; returns the stop string that it completes, after cutting the text there.

        Without `may_stop` (before min_tokens) stop strings are text like any other.
        """
        self._token_ids.append(token_id)
        full = self._decode(self._token_ids[self._window_start :])
        if full.endswith(REPLACEMENT) or len(full) <= len(self._window_text):
            return None  # the bytes of a character are not all there yet
        search_from = self._emit(full)
        if not may_stop:
            self._search_from = len(self.text)
            return None
        return self._cut_at_stop(max(search_from, self._search_from)) if self._stop else None

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add many tokens at once, without looking for stop strings."""
        self._token_ids.extend(token_ids)
        self.finish()

    def finish(self) -> None:
        """Decode what is left; the bytes of an incomplete character become U+FFFD."""
        if not self._stopped and self._window_end < len(self._token_ids):
            self._emit(self._decode(self._token_ids[self._window_start :]))

    def stable_text(self) -> str:
        """The text that can be shown already: without an end that may turn out to be a stop string's beginning."""
        if self._stopped or not self._stop:
            return self.text
        for length in range(min(self._max_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return self.text[:-length]
        return self.text

    def _emit(self, full: str) -> int:
        """Add the new text; returns from where on a stop string may end in it."""
        new = full[len(self._window_text) :]
        self._window_start = self._window_end
        self._window_end = len(self._token_ids)
        self._window_text = self._decode(self._token_ids[self._window_start :])
        search_from = max(0, len(self.text) - self._max_stop + 1)
        self.text += new
        return search_from

    def _cut_at_stop(self, search_from: int) -> str | None:
        """Cut at the stop string that ends first; of those, the one that starts first."""
        found = [(at + len(s), at, s) for s in self._stop if (at := self.text.find(s, search_from)) >= 0]
        if not found:
            return None
        end, start, stop = min(found)
        self.text = self.text[: end if self._include_stop else start]
        self._stopped = True
        return stop
