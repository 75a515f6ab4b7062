"""Settings of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from outrider.config.checks import check_int, require

MAX_GRACE_S = 86_400.0


@dataclass(frozen=True)
class ServerConfig:
    """What is of the server and not of the engine behind it.

    Attributes:
        host: address to listen at; only this machine reaches the default.
        port: 0 takes any free one.
        api_key: what every request must carry as ``Authorization: Bearer KEY``; None asks for none.
        served_model_names: what requests may call the model, the first being its name in responses; none: as loaded.
        grace_s: seconds that running requests have to finish when the server is told to stop.
        allowed_origins: web origins whose pages may call the server (CORS); "*" is all.
        max_body_bytes: the largest request body.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    served_model_names: tuple[str, ...] = ()
    grace_s: float = 10.0
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20

    def __post_init__(self) -> None:
        require(bool(self.host.strip()), "host", repr(self.host), "an address or name")
        check_int("port", self.port, 0, 65535)
        valid_key = self.api_key is None or (
            bool(self.api_key) and self.api_key.isascii() and self.api_key.isprintable()
        )
        # The key itself stays out of the message.
        require(valid_key and self.api_key != "", "api_key", "another text", "printable ASCII characters")
        require(all(self.served_model_names), "served_model_names", "an empty name", "names")
        valid_grace = isinstance(self.grace_s, int | float) and math.isfinite(self.grace_s)
        require(
            valid_grace and 0 <= self.grace_s <= MAX_GRACE_S, "grace", self.grace_s, f"0 to {MAX_GRACE_S:g} seconds"
        )
        check_int("max_body_bytes", self.max_body_bytes, 1, 2**40)
