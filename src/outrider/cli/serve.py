"""`outrider serve`: an OpenAI-compatible server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

import typer

from outrider.cli import options as opt
from outrider.cli.option_groups import CacheOptions, DraftOptions, ModelOptions, with_groups
from outrider.cli.options import ENGINE, SERVER, EngineOptions, option
from outrider.config import EngineConfig, SchedulerConfig, ServerConfig
from outrider.errors import ConfigError


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and to whom; see `ServerConfig`."""

    host: Annotated[
        str, option("--host", help="Address to listen at; 0.0.0.0 is reached from other machines.", panel=SERVER)
    ] = ServerConfig.host
    port: Annotated[int, option("--port", help="0 takes any free one.", panel=SERVER)] = ServerConfig.port
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="OUTRIDER_API_KEY",
            help="What every request must carry as Authorization: Bearer KEY.",
            rich_help_panel=SERVER,
            metavar="KEY",
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        option(
            "--served-model-name",
            help="What requests call the model; repeat it, the first is named in responses. Default: as loaded.",
            panel=SERVER,
        ),
    ] = None
    grace: Annotated[
        float,
        option("--grace", help="Seconds that running requests have to finish after Ctrl-C or SIGTERM.", panel=SERVER),
    ] = ServerConfig.grace_s
    allow_origin: Annotated[
        list[str] | None,
        option(
            "--allow-origin", help="Web origin whose pages may call it (CORS); repeat it, * is all.", panel=SERVER
        ),
    ] = None

    def config(self) -> ServerConfig:
        """Raises:
        ConfigError: a value out of its range.
        """
        return ServerConfig(
            host=self.host,
            port=self.port,
            api_key=self.api_key,
            served_model_names=tuple(self.served_model_name or ()),
            grace_s=self.grace,
            allowed_origins=tuple(self.allow_origin or ()),
        )


@with_groups
def serve(
    *,
    target: ModelOptions,
    drafter: opt.Drafter = None,
    drafting: DraftOptions,
    verification: opt.Verification = EngineConfig.verification,
    cache: CacheOptions,
    max_num_seqs: opt.MaxNumSeqs = SchedulerConfig.max_num_seqs,
    max_batch_tokens: opt.MaxBatchTokens = SchedulerConfig.max_batch_tokens,
    max_waiting: Annotated[
        int, option("--max-waiting", help="Most sequences that wait; more are refused (429).", panel=ENGINE)
    ] = SchedulerConfig.max_waiting,
    threads: opt.Threads = None,
    server: ServerOptions,
) -> None:
    """Serve a model as OpenAI's API does: completions and chats, streamed or not, batched as they come.

    Ctrl-C or SIGTERM stops it in order; a second one ends running requests at once.
    """
    config = server.config()
    engine = EngineOptions.of(
        target,
        drafting,
        cache,
        drafter=drafter,
        verification=verification,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_waiting=max_waiting,
        threads=threads,
    )
    try:
        from outrider.server.run import Server, bind, serve_until_stopped, url_of
    except ModuleNotFoundError as error:
        raise ConfigError(
            "outrider serve",
            got=f"no package {error.name}",
            expected="the extra `server`",
            remedy="pip install 'outrider[server]'",
        ) from error
    with bind(config) as sock:
        if config.api_key is None and not _is_loopback(config.host):
            print(
                f"warning: {config.host} is reached from other machines, and no --api-key is asked of them",
                file=sys.stderr,
            )
        llm = engine.load()

        def say() -> None:
            words = f"decoding {llm.config.decoding.method}, verification {llm.config.verification}"
            name = (config.served_model_names or (llm.config.model or "the bundled model",))[0]
            print(f"outrider serves {name} at {url_of(sock)}/v1 ({words}); Ctrl-C stops it", flush=True)

        serve_until_stopped(Server(llm, config, say), sock)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
