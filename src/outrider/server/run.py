"""Listening, and stopping in order: no new requests, time for the running ones, exit status 0."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from outrider.config import ServerConfig
from outrider.errors import ConfigError
from outrider.server.app import Service, build_app

if TYPE_CHECKING:
    from outrider.llm import LLM

ANSWERS_S = 5  # for sending what ended with the grace time
KEEP_ALIVE_S = 65  # longer than clients keep connections, so that none is closed in their hands


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the server's address; before a model is loaded, which takes long.

    Raises:
        ConfigError: the address cannot be had.
    """
    where = f"{config.host}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"address {where}", got=reason, expected="one to listen at", remedy="choose another --host or --port"
        ) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """What clients take as their base URL, without ``/v1``."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn with our way of stopping.

    The first signal stops it: requests that run have the grace time, then they end with an error. The second one ends
    them at once.

    Args:
        on_started: called when requests can come.
    """

    def __init__(self, llm: LLM, config: ServerConfig, on_started: Callable[[], None] = lambda: None) -> None:
        app = build_app(llm, config)
        self._service: Service = app.state.service
        self._grace_s = config.grace_s
        self._on_started = on_started
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.grace_s) + ANSWERS_S,
            )
        )

    def stop(self) -> None:
        """Stop in order; called again, at once. In the event loop's thread."""
        if self.should_exit:
            self._service.engine.abort_all()
            return
        self.should_exit = True
        self._service.engine.drain()
        asyncio.get_running_loop().call_later(self._grace_s, self._service.engine.abort_all)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals that were obeyed are not raised again afterwards, as uvicorn would: the exit status is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for of in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(of, self.stop)
        try:
            yield
        finally:
            for of in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(of)


def serve_until_stopped(server: Server, sock: socket.socket) -> None:
    """Run the server; returns when it was told to stop and has."""
    asyncio.run(server.serve(sockets=[sock]))
