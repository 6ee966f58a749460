"""The one message to the pool manager: this worker is ready."""

from __future__ import annotations

from typing import Any

import httpx
import structlog
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential

from llorch.errors import LlorchError
from llorch.http.settings import TEST_CALLBACK

log = structlog.stdlib.get_logger(__name__)

TRIES = 5


class CallbackError(LlorchError):
    """The callback URL did not take the worker's registration."""

    code = "CALLBACK_FAILED"


async def announce(url: str, registration: dict[str, Any], *, timeout: float, pause: float) -> None:
    """POSTs the registration, five times at most. Raises CallbackError when all fail.

    `timeout` is the time limit of each try and `pause` the wait after the first, both in seconds; the wait doubles.
    """
    if TEST_CALLBACK in url:
        log.info("callback skipped: the URL says test mode", callback=shown_url(url))
        return
    tries = AsyncRetrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(multiplier=pause, min=0, max=30),
        retry=retry_if_exception_type(httpx.HTTPError),
        before_sleep=_log_failure,
    )
    try:
        async with httpx.AsyncClient(timeout=timeout) as client:
            async for attempt in tries:
                with attempt:
                    response = await client.post(url, json=registration)
                    response.raise_for_status()
    except RetryError as error:
        reason = _reason(error.last_attempt.exception())
        raise CallbackError(
            f"the callback to {shown_url(url)} failed {TRIES} times, last: {reason}; "
            "check --callback-url and that the pool manager runs"
        ) from error
    log.info("callback sent", callback=shown_url(url), status=response.status_code)


def _log_failure(state: RetryCallState) -> None:
    failure = state.outcome.exception() if state.outcome is not None else None
    wait = round(state.next_action.sleep, 2) if state.next_action is not None else 0.0
    log.warning("callback failed", attempt=state.attempt_number, reason=_reason(failure), next_try_in_s=wait)


def _reason(failure: BaseException | None) -> str:
    if isinstance(failure, httpx.HTTPStatusError):
        return f"status {failure.response.status_code}"
    return f"{type(failure).__name__}: {failure}"


def shown_url(url: str) -> str:
    """The URL without what may be secret in it: user, password and query."""
    parsed = httpx.URL(url)
    return str(parsed.copy_with(username=None, password=None, query=None, fragment=None))
