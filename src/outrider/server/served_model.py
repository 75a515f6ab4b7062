"""The model as clients see it: its names, how it is decoded, and what tells its outputs from others'."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from outrider.config import ServerConfig
from outrider.server.failures import ModelNotFoundError
from outrider.server.responses import EngineDescription, Model

if TYPE_CHECKING:
    from outrider.llm import LLM

BUNDLED = "bundled"
VERSION = version("outrider")


class ServedModel:
    """Attributes:
    names: what requests may call it; the first is what responses call it.
    fingerprint: of all that tokens depend on beside the request (under the coupled rule the drafter is not among it).
    """

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        engine = llm.config
        self.names = config.served_model_names or (engine.model or BUNDLED,)
        self.max_length = llm.model.context_length
        self._root = engine.model or BUNDLED
        self._created = int(time.time())
        self.engine = EngineDescription(
            decoding=engine.decoding.method,
            verification=engine.verification,
            exactness=engine.exactness,
            lossless=llm.engine.rule.lossless,
            weights=engine.weights,
            dtype=str(llm.model.dtype).removeprefix("torch."),
        )
        of_tokens = {name: value for name, value in asdict(engine).items() if name not in ("scheduler", "cache")}
        of_tokens["cache_dtype"] = str(llm.model.cache_dtype)
        if engine.verification == "coupled":
            del of_tokens["decoding"]
        digest = hashlib.sha256(json.dumps(of_tokens, sort_keys=True, default=str).encode()).hexdigest()
        self.fingerprint = f"outrider-{VERSION}-{digest[:12]}"

    def check(self, name: str | None) -> None:
        """Raises:
        ModelNotFoundError: another model is asked for; a request that names none gets this one.
        """
        if name is not None and name not in self.names:
            raise ModelNotFoundError("model", got=repr(name)[:80], expected=" or ".join(map(repr, self.names)))

    def card(self, name: str) -> Model:
        """What `/v1/models` says of it under one of its names."""
        return Model(
            id=name, created=self._created, root=self._root, max_model_len=self.max_length, outrider=self.engine
        )
