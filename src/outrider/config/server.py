"""Settings of the server."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.config.checks import check_int, check_number, require

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
        key = self.api_key  # stays out of the message
        valid_key = key is None or (key != "" and key.isascii() and key.isprintable() and " " not in key)
        require(valid_key, "api_key", "another text", "printable ASCII characters without spaces")
        require(all(self.served_model_names), "served_model_names", "an empty name", "names")
        check_number("grace", self.grace_s, 0, MAX_GRACE_S)
        check_int("max_body_bytes", self.max_body_bytes, 1, 2**40)
