"""The Hub's client, made fit for long runs: requests end, and all trouble has one form.

The client (`huggingface_hub`) waits without end for a Hub that does not answer, and tells of trouble in a dozen ways.
"""

import contextlib
import functools
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _xet, disable_progress_bars
from huggingface_hub.utils._http import hf_request_event_hook

from qa_dist.checkpoint.attempt import CancelledError, WatchedXetSessions, current
from qa_dist.checkpoint.hub_network import with_deadlines
from qa_dist.checkpoint.manifest import DamagedError

TIMEOUT = httpx2.Timeout(120.0, connect=15.0)
"""Seconds for the Hub to take up a connection, and to answer; see `hub_network`. A Hub under load has been seen to take
a minute for a commit."""

MOST_PATIENCE = 900.0
"""Seconds that a Hub may ask to wait."""
LONGEST_SLEEP = 10.0
"""Seconds that the client may sleep at the Hub's request; longer waits are those of the queue, which can end them."""
PASSING = (408, 409, 425, 429)
"""Answers besides those from 500 on that may be others later."""
REFUSALS = (501, 505, 507, 510, 511)
"""Answers from 500 on that are refusals: 507 stands for a quota that is used up."""
LFS_REFUSAL = "LFS batch API returned errors"
"""How the client begins the message of an upload that the Hub does not take: of one file or more."""
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})([^)]*)\)")
"""How Xet tells of an answer that it does not repeat the request for."""


XET_LIMITS = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "60s", "HF_XET_CLIENT_READ_TIMEOUT": "120s"}
"""How long Xet repeats a request, and waits for an answer; by default it is six minutes and five."""


class Remedy(Enum):
    """What to do about trouble with the Hub."""

    RETRY = "retry"
    """The Hub or the network is at fault; try again until it works."""
    REREAD = "reread"
    """The branch has moved; look at it again, then try again."""
    MEND = "mend"
    """The Hub refuses: a person has to do something. A few more tries tell a flaw from a refusal."""
    NONE = "none"
    """Trying again changes nothing."""


class HubError(Exception):
    """Why the Hub did not do what it was asked to."""

    def __init__(self, reason: str, remedy: Remedy, *, retry_after: float = 0.0, is_missing: bool = False):
        super().__init__(reason)
        self.remedy = remedy
        self.retry_after = retry_after
        """Seconds to wait first, as the Hub has asked for."""
        self.is_missing = is_missing
        """Whether the repository, the revision or the file is not there, as far as this token can see."""


def seconds_to_wait(headers: httpx2.Headers) -> float:
    """Return how long a Hub that refuses a request asks to wait before the next; 0 where it does not say."""
    return min(max(_retry_after(headers), _rate_limit_reset(headers)), MOST_PATIENCE)


def _retry_after(headers: httpx2.Headers) -> float:
    """Return the seconds of `Retry-After`, which gives a number or a date (RFC 9110, section 10.2.3)."""
    wait = headers.get("Retry-After", "").strip()
    if wait.isascii() and wait.isdigit():
        return float(wait)
    try:
        until = parsedate_to_datetime(wait).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    try:
        now = parsedate_to_datetime(headers.get("Date", "")).timestamp()  # by the same clock
    except (ValueError, OverflowError):
        now = time.time()
    return max(until - now, 0.0)


def _rate_limit_reset(headers: httpx2.Headers) -> float:
    """Return the seconds until a limit that is used up is reset, as huggingface.co tells it: `"api";r=0;t=12`
    (draft-ietf-httpapi-ratelimit-headers)."""
    resets = [0.0]
    for limit in headers.get("RateLimit", "").split(","):
        fields = dict(re.findall(r";\s*([a-z]+)\s*=\s*(\d+)", limit))
        if fields.get("r", "").strip("0") == "" and "r" in fields:
            windows = re.findall(r";\s*w\s*=\s*(\d+)", headers.get("RateLimit-Policy", ""))
            resets += [float(fields["t"])] if "t" in fields else [float(window) for window in windows]
    return max(resets)


def _of_response(response: httpx2.Response, said: str | None, *, is_missing: bool = False) -> HubError:
    """Return what an answer that is no success means. `said`: what the Hub has said of it."""
    status, request = response.status_code, response.request
    lines = (said or response.reason_phrase or "").strip().splitlines()
    reason = f"{status} {lines[0][:200] if lines else ''}".strip() + f" ({request.method} {request.url.path[:120]})"
    if status in (401, 403):
        reason = f"the token may not do that: {reason}"
    remedy = _remedy(status)
    wait = seconds_to_wait(response.headers) if remedy is Remedy.RETRY else 0.0
    return HubError(reason, remedy, retry_after=wait, is_missing=is_missing or status == 404)


def _remedy(status: int) -> Remedy:
    """Return what to do about an answer of this status."""
    if status == 412:
        return Remedy.REREAD
    if status in REFUSALS or not (status in PASSING or status >= 500):
        return Remedy.MEND
    return Remedy.RETRY


def _of_error(error: HfHubHTTPError) -> HubError:
    missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError)
    found = _of_response(error.response, error.server_message, is_missing=missing)
    if isinstance(error, RepositoryNotFoundError):
        reason = f"the repository is not there, or hidden from this token: {found}"
        return HubError(reason, found.remedy, retry_after=found.retry_after, is_missing=True)
    return found


def _translated(error: Exception) -> HubError:
    """What an error of the client means."""
    if isinstance(error, HfHubHTTPError):
        return _of_error(error)
    if isinstance(error, CancelledError):
        return HubError(str(error), Remedy.RETRY)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so the Hub is not asked", Remedy.NONE)
    if isinstance(error, LocalTokenNotFoundError):
        return HubError("there is no token: set HF_TOKEN, or log in with `hf auth login`", Remedy.MEND)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError | HubError | CancelledError):
        cause = error.__cause__  # an upload to the storage
        return cause if isinstance(cause, HubError) else _translated(cause)
    text = ": ".join(_first_line(one) for one in (error, error.__cause__) if one is not None)
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"no answer within {TIMEOUT.read:.0f} s", Remedy.RETRY)
    if isinstance(error, ValueError) and LFS_REFUSAL in str(error):
        return HubError(" ".join(str(error).split())[:300], Remedy.MEND)
    if isinstance(error, ConnectionError | RuntimeError) and (status := XET_STATUS.search(str(error))):
        return HubError(f"{status[1]}{status[2]} (of the Xet storage)", _remedy(int(status[1])))
    # Uploads fail with RuntimeError (LFS) and ConnectionError (Xet), answers that are no JSON with ValueError.
    if isinstance(error, httpx2.HTTPError | ConnectionError | TimeoutError | RuntimeError | ValueError | LookupError):
        return HubError(text, Remedy.RETRY)
    if isinstance(error, OSError) and error.filename:
        return HubError(f"{error.filename}: {error.strerror or text}", Remedy.MEND)
    return HubError(f"{type(error).__name__}: {text}", Remedy.MEND)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def troubles() -> Iterator[None]:
    """Raise whatever goes wrong with the Hub as `HubError`."""
    token = _is_ours.set(True)
    try:
        yield
    except (HubError, DamagedError):
        raise
    except Exception as error:
        raise _translated(error) from error
    finally:
        _is_ours.reset(token)


_is_ours: ContextVar[bool] = ContextVar("is_ours", default=False)
"""Whether this thread is within `troubles`."""


class _Client(httpx2.Client):
    """Reports its requests to the push that they are made for."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        attempt = current()
        if attempt is None:
            return super().send(request, **options)
        return attempt.send(request, lambda: super(_Client, self).send(request, **options))


@functools.cache
def with_time_outs() -> None:
    """Have every request of the client in this process end: by default those of its API have no time-out at all."""

    def make_client() -> httpx2.Client:
        client = _Client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=TIMEOUT)
        with_deadlines(client, TIMEOUT)
        client.event_hooks["response"].append(_hand_over_long_waits)
        return client

    set_client_factory(make_client)
    _xet._GLOBAL_XET_HOLDER = WatchedXetSessions()
    for name, seconds in XET_LIMITS.items():
        os.environ.setdefault(name, seconds)
    disable_progress_bars()
    # its remarks on what it is told to do on purpose
    warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\.")


def _hand_over_long_waits(response: httpx2.Response) -> None:
    """Raise `HubError` where the Hub asks for a wait that the client would sleep through, whatever comes meanwhile."""
    if not _is_ours.get() and current() is None:
        return
    if _remedy(response.status_code) is Remedy.RETRY and seconds_to_wait(response.headers) > LONGEST_SLEEP:
        raise _of_response(response, response.headers.get("X-Error-Message"))
