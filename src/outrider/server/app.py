"""The routes of the OpenAI-compatible server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from logging import getLogger
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from outrider.config import ServerConfig
from outrider.errors import OutriderError
from outrider.inputs.prompt import Prompt, chat_prompt, check_token_ids, encode_prompt
from outrider.inputs.tokenizer import Tokenizer
from outrider.server.answer import Head, new_id
from outrider.server.chats import ChatAnswer
from outrider.server.completions import CompletionAnswer
from outrider.server.engine_thread import EngineThread, Job, Run
from outrider.server.failures import EngineFailedError, Failure, ServerStoppingError, failure, failure_of
from outrider.server.guard import Guard, respond
from outrider.server.metrics import Metrics
from outrider.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Message, TokenizeRequest
from outrider.server.responses import Health, Models, Text, Tokens, Version
from outrider.server.served_model import VERSION, ServedModel
from outrider.server.streaming import ClientGoneError, EventStream, collect, unless_gone

if TYPE_CHECKING:
    from outrider.llm import LLM

CLIENT_CLOSED_REQUEST = 499  # nginx's, for its log: nobody reads it
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
T = TypeVar("T")


class Service:
    """What the routes share: the engine thread, and the one that encodes prompts and runs chat templates."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.model = ServedModel(llm, config)
        self.metrics = Metrics(llm, self.model.names[0])
        self.engine = EngineThread(llm, self.metrics)
        self.tokenizer = llm.tokenizer.clone()  # the engine thread decodes with the other one
        self.vocab_size = llm.model.vocab_size
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outrider-prompts")

    async def with_tokenizer(self, work: Callable[[Tokenizer], T]) -> T:
        """Work that may take long, in the tokenizer's own thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, self.tokenizer)

    async def start(self, jobs: Sequence[Job], *, streaming: bool) -> Run:
        """Hand jobs to the engine and wait until it has taken them.

        Raises:
            OutriderError, EngineFailedError, ServerStoppingError: it has not.
        """
        run = self.engine.submit(jobs, streaming=streaming)
        try:
            await run.accepted()
        except BaseException:  # a cancellation, too
            run.abort()
            raise
        return run

    def head(self, prefix: str) -> Head:
        return Head(new_id(prefix), self.model.names[0], self.model.fingerprint)

    def close(self) -> None:
        self.engine.stop()
        self._worker.shutdown(wait=False, cancel_futures=True)


def build_app(llm: LLM, config: ServerConfig) -> FastAPI:
    """The server over a loaded model; its engine thread lives as long as the application does.

    `app.state.service` is its `Service`.
    """
    service = Service(llm, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.close)

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="outrider", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    _add_failures(app)
    app.add_middleware(Guard, config=config)
    if config.allowed_origins:  # outermost: a browser asks without a key whether it may send one
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.model.check(body.model)
        params = body.sampling_params()
        prompts, echoes = await service.with_tokenizer(lambda tokenizer: _encode_prompts(body, tokenizer))
        run = await service.start([Job(prompt, params) for prompt in prompts], streaming=body.stream)
        answer = CompletionAnswer(service.head("cmpl"), body, echoes, run.prompt_token_ids)
        return await _respond(request, answer, run)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.model.check(body.model)
        params = body.sampling_params()
        prompt = await service.with_tokenizer(lambda tokenizer: _encode_chat(body, tokenizer))
        run = await service.start([Job(prompt, params)], streaming=body.stream)
        answer = ChatAnswer(service.head("chatcmpl"), body, service.tokenizer.bytes_of, run.prompt_token_ids)
        return await _respond(request, answer, run)


async def _respond(request: Request, answer: CompletionAnswer | ChatAnswer, run: Run) -> Response:
    if answer.request.stream:
        return EventStream(answer, run)
    try:
        samples, count = await unless_gone(request, collect(run, answer.request.n))
    finally:
        run.abort()
    return _json(answer.whole(samples, count.usage()))


def _encode_prompts(body: CompletionRequest, tokenizer: Tokenizer) -> tuple[list[Prompt], list[str]]:
    """Prompts as token ids, and their texts where they are to be echoed."""
    prompts: list[Prompt] = []
    for number, prompt in enumerate(body.prompts, 1):
        given = {"prompt": prompt, "add_special_tokens": body.add_special_tokens}
        name = f"prompt {number} of {len(body.prompts)}" if len(body.prompts) > 1 else "prompt"
        text, token_ids = encode_prompt(
            given if isinstance(prompt, str) else {"prompt_token_ids": prompt}, tokenizer, name=name
        )
        prompts.append({"prompt": text, "prompt_token_ids": token_ids})
    if not body.echo:
        return prompts, []
    return prompts, [
        of["prompt"] if of["prompt"] is not None else tokenizer.decode(of["prompt_token_ids"])  # type: ignore[index]
        for of in prompts
    ]


def _encode_chat(body: ChatRequest, tokenizer: Tokenizer) -> Prompt:
    if body.logprobs:
        tokenizer.bytes_of(0)  # makes its table here, and not in the event loop
    text, token_ids = _encode_messages(
        body.messages, tokenizer, add_generation_prompt=body.add_generation_prompt, **body.chat_template_kwargs
    )
    return {"prompt": text, "prompt_token_ids": token_ids}


def _encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, **variables: object
) -> tuple[str | None, list[int]]:
    return encode_prompt(chat_prompt([of.as_mapping() for of in messages], tokenizer, **variables), tokenizer)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.model.check(body.model)

        def encode(tokenizer: Tokenizer) -> Tokens:
            if body.messages is not None:
                _, token_ids = _encode_messages(
                    body.messages, tokenizer, add_generation_prompt=body.add_generation_prompt
                )
            else:
                given = {"prompt": body.prompt, "add_special_tokens": body.add_special_tokens}
                _, token_ids = encode_prompt(given, tokenizer)
            strs = [tokenizer.token(token_id) for token_id in token_ids] if body.return_token_strs else None
            length = service.model.max_length
            return Tokens(count=len(token_ids), max_model_len=length, tokens=token_ids, token_strs=strs)

        return _json(await service.with_tokenizer(encode))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.model.check(body.model)
        check_token_ids(body.tokens, service.vocab_size, name="token id")
        text = await service.with_tokenizer(lambda of: of.decode(body.tokens, skip_special_tokens=False))
        return _json(Text(prompt=text))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return _json(Models(data=[service.model.card(name) for name in service.model.names]))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.model.check(name)
        return _json(service.model.card(name))

    @app.get("/health")
    async def health() -> Response:
        if service.engine.failed:
            failed = failure_of(EngineFailedError())
            return Response(failed.body.model_dump_json(), 503, media_type="application/json")
        if service.engine.stopping:
            return _json(Health(status="stopping"), status=503)
        return _json(Health(status="ok"))

    @app.get("/version")
    async def version() -> Response:
        return _json(Version(version=VERSION, outrider=service.model.engine))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"Content-Type": EXPOSITION})


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return respond(_failure_of_parsing(error))

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return respond(failure(error.status_code, error.detail, headers=dict(error.headers or {})))

    @app.exception_handler(ClientGoneError)
    async def _gone(_: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def _known(_: Request, error: Exception) -> Response:
        return respond(failure_of(error))

    async def _unknown(_: Request, error: Exception) -> Response:
        getLogger("outrider").error("a request failed", exc_info=error)
        return respond(failure_of(error))

    for kind in (OutriderError, EngineFailedError, ServerStoppingError):
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(Exception, _unknown)


def _failure_of_parsing(error: RequestValidationError) -> Failure:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return failure(400, "request body: got invalid JSON, expected a JSON object")
    param = first.get("ctx", {}).get("param")
    if param is not None:
        return failure(400, first["msg"], param=param)
    path = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(path) or "request body"
    words = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return failure(400, f"{name}: {words}", param=path[0] if path else None)


def _json(of: BaseModel, *, status: int = 200) -> Response:
    return Response(of.model_dump_json(), status, media_type="application/json")
