"""Settings of `llorch serve`."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from llorch.settings import ChatModelSettings, NamedPath, StringList

TEST_CALLBACK = "localhost:9999"


class ServeSettings(ChatModelSettings):
    """Serve a model over HTTP."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes any that is free and prints it")
    api_key: SecretStr | None = Field(
        None, description="keys that clients must send, separated by commas; better set as LLORCH_API_KEY"
    )
    api_key_file: NamedPath | None = Field(
        None, description="file with more such keys, one a line; empty lines and those that begin with # do not count"
    )
    insecure: bool = Field(False, description="allow an address that others can reach without an API key")
    allowed_host: StringList = Field(
        [], description="name that a worker without an API key answers to beside localhost; may be repeated"
    )
    allowed_origin: StringList = Field(
        [], description="site whose pages may ask this worker (CORS), https://HOST, or * for all; may be repeated"
    )

    alias: str | None = Field(None, min_length=1, description="the model's id below /v1, its own name by default")
    worker_id: str | None = Field(None, min_length=1, description="this worker's name in its pool, random by default")
    callback_url: str | None = Field(
        None, description=f"pool manager's URL, told once when the model is ready; {TEST_CALLBACK} in it is test mode"
    )
    callback_timeout: float = Field(10.0, gt=0, description="seconds that one try of the callback may take")
    callback_pause: float = Field(0.5, ge=0, description="seconds before the second try; the pause doubles each time")
    heartbeat_url: str | None = Field(None, description="URL that is told every so often how busy this worker is")
    heartbeat_interval: float = Field(30.0, gt=0, description="seconds between two heartbeats")
    traces: bool = Field(
        False, description="send OpenTelemetry traces to where OTEL_EXPORTER_OTLP_ENDPOINT says (extra `otel`)"
    )
    uri: str | None = Field(None, description="where the pool reaches this worker, http://HOST:PORT by default")

    max_queue: int = Field(64, ge=0, description="requests that may wait for a place")
    queue_timeout: float | None = Field(
        None, gt=0, description="most seconds that a request waits, no limit by default"
    )
    max_running_per_key: int | None = Field(
        None, ge=1, description="most requests of one API key that run at a time, no limit by default; others wait"
    )
    mixed_chunk: int = Field(
        128, ge=1, description="most prompt tokens of a step in which other requests get their next token"
    )
    request_timeout: float | None = Field(
        None, gt=0, description="most seconds that a request runs, no limit by default"
    )
    step_timeout: float = Field(
        180.0, gt=0, description="seconds that one step may take; then the device hangs, and the worker ends"
    )
    max_tokens_limit: int = Field(
        2048, ge=1, description="most tokens that one request may ask for; below /v1 what the context leaves by default"
    )
    read_timeout: float = Field(30.0, gt=0, description="most seconds that a client takes to send its request")
    write_timeout: float = Field(
        60.0, gt=0, description="seconds after which a client that reads nothing of its answer is cut off"
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="largest request body")
    keep_alive: float = Field(10.0, gt=0, description="seconds of silence in a stream before a keep-alive comment")
    metrics_interval: float = Field(1.0, gt=0, description="seconds between the metrics events of a stream")
    shutdown_timeout: float = Field(30.0, ge=0, description="seconds that running requests get to finish at the end")

    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="console on a terminal and json elsewhere, or one of them"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @field_validator("api_key", mode="before")
    @classmethod
    def _joined(cls, value: object) -> object:
        """A list, as llorch.toml may have it."""
        if not isinstance(value, list):
            return value
        if not all(isinstance(key, str) and "," not in key for key in value):
            raise ValueError("expected texts without commas")
        return ",".join(value)

    @field_validator("api_key")
    @classmethod
    def _holds_a_key(cls, value: SecretStr | None) -> SecretStr | None:
        # a variable that was meant to hold keys and holds none must not leave the worker open
        if value is not None and not _split(value):
            raise ValueError("expected one key or several separated by commas")
        return value

    @field_validator("api_key_file")
    @classmethod
    def _lists_keys(cls, value: Path | None) -> Path | None:
        if value is not None and not _listed(value):
            raise ValueError("expected a file with a key in it")
        return value

    @model_validator(mode="after")
    def _limits_keys_that_there_are(self) -> ServeSettings:
        if self.max_running_per_key is not None and not self.api_keys:
            raise ValueError("--max-running-per-key needs API keys: set LLORCH_API_KEY")
        return self

    @field_validator("allowed_origin")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        # what browsers send: a path, or no scheme, would never match
        for origin in value:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise ValueError("expected * or what a browser calls a site, such as https://chat.example")
        return value

    @field_validator("callback_url", "heartbeat_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and TEST_CALLBACK not in value and not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL that begins with http:// or https://")
        return value

    @property
    def known_hosts(self) -> tuple[str, ...]:
        """Names in Host headers that are this worker's beside localhost: its own, the pool's for it, those allowed."""
        return (self.host, *([] if self.uri is None else [urlsplit(self.uri).netloc]), *self.allowed_host)

    @property
    def openai_tokens_limit(self) -> int | None:
        """The limit below /v1, where clients expect to fill the context: None where the operator has set none."""
        return self.max_tokens_limit if "max_tokens_limit" in self.model_fields_set else None

    @functools.cached_property
    def api_keys(self) -> tuple[str, ...]:
        given = [] if self.api_key is None else _split(self.api_key)
        return (*given, *([] if self.api_key_file is None else _listed(self.api_key_file)))


def _split(value: SecretStr) -> list[str]:
    return [key for part in value.get_secret_value().split(",") if (key := part.strip())]


def _listed(path: Path) -> list[str]:
    """The keys in a file. Raises ValueError where it cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"expected a file that can be read ({reason})") from error
    return [line for line in lines if line and not line.startswith("#")]
