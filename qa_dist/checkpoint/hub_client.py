"""The Hub's client, made fit for long runs: requests end, and all trouble has one form.

The client (`huggingface_hub`) waits without end for a Hub that does not answer, and tells of trouble in a dozen ways.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Iterator
from enum import Enum

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
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from qa_dist.checkpoint.manifest import DamagedError

TIMEOUT = httpx2.Timeout(120.0, connect=15.0)
"""Seconds for the Hub to take up a connection, and to send or take the next bytes. A Hub under load has been seen to
take a minute for a commit."""


MOST_PATIENCE = 900.0
"""Seconds that a Hub may ask to wait."""
SLOWEST = 1000.0
"""Bytes per second of an answer that is waited for."""


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


def _of_response(error: HfHubHTTPError) -> HubError:
    response = error.response
    status, request = response.status_code, response.request
    said = (error.server_message or response.reason_phrase or "").strip().splitlines()
    reason = f"{status} {said[0][:200] if said else ''}".strip() + f" ({request.method} {request.url.path[:120]})"
    missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError) or status == 404
    if isinstance(error, RepositoryNotFoundError):
        reason = f"the repository is not there, or hidden from this token: {reason}"
    elif status in (401, 403):
        reason = f"the token may not do that: {reason}"
    if status == 412:
        return HubError(reason, Remedy.REREAD)
    if status in (408, 409, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        seconds = min(float(wait), MOST_PATIENCE) if wait.isdigit() else 0.0
        return HubError(reason, Remedy.RETRY, retry_after=seconds)
    return HubError(reason, Remedy.MEND, is_missing=missing)


def _translated(error: Exception) -> HubError:
    """What an error of the client means."""
    if isinstance(error, HfHubHTTPError):
        return _of_response(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so the Hub is not asked", Remedy.NONE)
    if isinstance(error, LocalTokenNotFoundError):
        return HubError("there is no token: set HF_TOKEN, or log in with `hf auth login`", Remedy.MEND)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError):
        return _of_response(error.__cause__)  # of the storage
    text = ": ".join(_first_line(one) for one in (error, error.__cause__) if one is not None)
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"no answer within {TIMEOUT.read:.0f} s", Remedy.RETRY)
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
    try:
        yield
    except (HubError, DamagedError):
        raise
    except Exception as error:
        raise _translated(error) from error


@functools.cache
def with_time_outs() -> None:
    """Have every request of the client in this process end: by default those of its API have no time-out at all."""

    def make_client() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = TIMEOUT
        client.event_hooks["request"].append(_limit)
        client.event_hooks["response"].append(_watch)
        return client

    set_client_factory(make_client)
    disable_progress_bars()
    # its remarks on what it is told to do on purpose
    warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\.")


def _limit(request: httpx2.Request) -> None:
    """Listings ask for no time-out at all, whatever the client's own is."""
    asked = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: limit if asked.get(name) is None else asked[name] for name, limit in TIMEOUT.as_dict().items()
    }


class _Watched(httpx2.SyncByteStream):
    """A body that has to come at a rate: the client's time-out only counts from one piece to the next."""

    def __init__(self, stream: httpx2.SyncByteStream):
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        started, size = time.monotonic(), 0
        patience = TIMEOUT.read or 0.0
        for piece in self._stream:
            size += len(piece)
            if (seconds := time.monotonic() - started) > patience and size < SLOWEST * seconds:
                raise httpx2.ReadTimeout(f"only {size:,} bytes in {seconds:.0f} s")
            yield piece

    def close(self) -> None:
        self._stream.close()


def _watch(response: httpx2.Response) -> None:
    stream = response.stream
    assert isinstance(stream, httpx2.SyncByteStream)
    response.stream = _Watched(stream)
