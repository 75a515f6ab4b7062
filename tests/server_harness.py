"""A real server on a free loopback port, in a thread of its own, and the models that the tests serve."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider import LLM
from outrider.config import ServerConfig
from outrider.server.run import Server, bind, url_of
from tests.tiny_models import CONTEXT_LENGTH
from tests.tiny_tokenizers import byte_level, make_tiny_with

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant: ' }}{% endif %}{{ suffix }}"
)
TIMEOUT_S = 30.0
__all__ = ["CHATML", "CONTEXT_LENGTH", "Running", "make_chat_model", "serving", "wait_until"]


def make_chat_model(path: Path) -> Path:
    """A tiny random model that has a chat template, and text of all bytes."""
    tokenizer = deepcopy(byte_level(400))
    tokenizer.chat_template = CHATML
    return make_tiny_with(tokenizer, "llama", path)


@dataclass
class Running:
    """A server that runs: its address, and what is inside for tests to look at."""

    url: str
    server: Server
    llm: LLM
    stop: Callable[[], None]
    thread: threading.Thread

    @property
    def service(self) -> Any:
        return self.server._service


@contextmanager
def serving(llm: LLM, **config: Any) -> Iterator[Running]:
    """Serve until the block ends."""
    settings = ServerConfig(port=0, **config)
    started = threading.Event()
    with bind(settings) as sock:
        server = Server(llm, settings, started.set)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(sockets=[sock]),), daemon=True)
        url = url_of(sock) if settings.host != "0.0.0.0" else f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread.start()
        assert started.wait(TIMEOUT_S)
        running = Running(url, server, llm, lambda: _in_loop(loop, server.stop), thread)
        try:
            yield running
        finally:
            if thread.is_alive():
                running.stop()
                running.stop()  # at once
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "the server did not stop"
            loop.close()


def _in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(callback)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does; fails where it does not come."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
