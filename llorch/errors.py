"""Every error llorch raises on purpose.

    LlorchError
    ├── SettingsError                 a setting (option, variable, llorch.toml) cannot be used
    ├── ModelError                    a model file cannot be served
    │   ├── GGUFError                 the file is not readable as GGUF: damaged, truncated, something else
    │   ├── UnsupportedModelError     a well-formed file that asks for something llorch does not do
    │   └── TokenizerError            the vocabulary in the file cannot be used
    ├── ProviderError                 a compute provider cannot be used
    │   ├── UnknownProviderError      no installed distribution has a provider of that name
    │   ├── ProviderUnavailableError  installed, but absent hardware, broken import or another API version
    │   ├── BindError                 it opened, but does not offer what the model needs
    │   ├── KernelError               one of its kernels raised while it ran
    │   └── DeviceMemoryError         the device is out of memory
    ├── RequestError                  one request cannot be served; others are not touched
    │   ├── InvalidRequestError       its fields are wrong
    │   │   └── ChatTemplateError     its messages cannot be rendered with the model's chat template
    │   ├── ContextOverflowError      its prompt leaves the context no room
    │   ├── JobExistsError            a job of that id is waiting or running
    │   ├── QueueFullError            too many requests wait
    │   ├── QueueTimeoutError         it waited longer than it may
    │   ├── CancelledError            it was cancelled, or its client left
    │   └── InferenceTimeoutError     it ran longer than it may
    └── EngineError                   the engine cannot run
        └── EngineUnavailableError    it is loading, stopping or dead

A message says what was wrong, with both numbers where there are two, and what to do.
Each class carries the wire `code` of the worker's HTTP contract, and whether the same request may succeed later.
"""

from __future__ import annotations

from typing import ClassVar


class LlorchError(Exception):
    """Base of all errors that llorch raises on purpose."""

    code: ClassVar[str] = "INTERNAL"
    retriable: ClassVar[bool] = False


class SettingsError(LlorchError):
    """`setting`: the one that is wrong, by its field's name, where that is known."""

    code = "INVALID_SETTING"

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


class ModelError(LlorchError):
    code = "INVALID_MODEL"


class GGUFError(ModelError):
    pass


class UnsupportedModelError(ModelError):
    pass


class TokenizerError(ModelError):
    pass


class ProviderError(LlorchError):
    code = "PROVIDER_ERROR"


class UnknownProviderError(ProviderError):
    pass


class ProviderUnavailableError(ProviderError):
    pass


class BindError(ProviderError):
    pass


class KernelError(ProviderError):
    pass


class DeviceMemoryError(ProviderError):
    code = "VRAM_OOM"
    retriable = True


class RequestError(LlorchError):
    code = "INVALID_REQUEST"


class InvalidRequestError(RequestError):
    pass


class ChatTemplateError(InvalidRequestError):
    pass


class ContextOverflowError(RequestError):
    pass


class JobExistsError(RequestError):
    code = "JOB_EXISTS"


class QueueFullError(RequestError):
    code = "QUEUE_FULL"
    retriable = True


class QueueTimeoutError(RequestError):
    code = "QUEUE_TIMEOUT"
    retriable = True


class CancelledError(RequestError):
    code = "CANCELLED"


class InferenceTimeoutError(RequestError):
    code = "INFERENCE_TIMEOUT"
    retriable = True


class EngineError(LlorchError):
    retriable = True


class EngineUnavailableError(EngineError):
    code = "WORKER_UNHEALTHY"
