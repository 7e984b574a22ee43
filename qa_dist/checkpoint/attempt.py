"""One try of a push: whether it makes progress, and the means to end it.

Uploads are repeated inside of the libraries: by `huggingface_hub` for minutes, by `hf_xet` for longer. Meanwhile a
newer checkpoint, or the model, would wait. So the requests and the Xet uploads of a try report to it, and it can be
cancelled: then its Xet uploads are aborted and it starts no further request, above all no commit.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import httpx2
from huggingface_hub.utils import _xet

TROUBLES = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which a request is repeated."""
POOL = "ThreadPoolExecutor"
"""How the names of the threads begin that the client uploads in."""


class CancelledError(Exception):
    """The try was cancelled."""


class Attempt:
    """Use it as a context in the thread that makes the requests."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.problem = ""
        """The last thing that went wrong."""
        self._lock = threading.RLock()
        self._failed: set[tuple[str, str]] = set()
        self._new: set[int] = set()
        """Requests under way that have not failed before: each has its time, see `hub_network`."""
        self._failing_since: float | None = None
        self._succeeded = 0.0
        """When a request last did."""
        self._xet: list[_XetUpload] = []
        self._token: Token[Attempt | None] | None = None

    def __enter__(self) -> "Attempt":
        global _newest
        self._token, _newest = _of_thread.set(self), self
        return self

    def __exit__(self, *_: object) -> None:
        global _newest
        if self._token is not None:
            _of_thread.reset(self._token)
        if _newest is self:
            _newest = None

    # ------------------------------------------------------------------------------------ for the queue

    def cancel(self) -> None:
        """End the try as soon as that is possible; from then on it starts no request."""
        with self._lock:
            self.is_cancelled = True
            for upload in self._xet:
                upload.abort()

    def cancel_if_stuck(self, seconds: float) -> bool:
        """Cancel the try if it has made no progress for so long; return whether it was.

        Progress is a request that succeeds, or one that is under way for the first time, and bytes that Xet has
        processed. A try that makes no requests, as it reads files for instance, is not stuck.
        """
        with self._lock:
            now, since = time.monotonic(), []
            if self._failing_since is not None and not self._new:
                since.append(self._failing_since)
            since += [at for upload in self._xet if (at := upload.waiting_since(now)) is not None]
            if not since or now - min(since) < seconds:
                return False
            self.cancel()
            return True

    # ------------------------------------------------------------------------------ for what makes requests

    def require(self) -> None:
        """Raise `CancelledError` if the try was cancelled."""
        if self.is_cancelled:
            raise CancelledError(f"cancelled as it made no progress {self.problem}".strip())

    def send(self, request: httpx2.Request, send: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Make a request by calling `send`, and watch it. Raises `CancelledError`."""
        key, started = (request.method, str(request.url)), time.monotonic()
        with self._lock:
            self.require()
            if key not in self._failed:
                self._new.add(id(request))
        try:
            response = send()
        except Exception as error:
            self._end(request, key, started, str(error) or type(error).__name__)
            raise
        refused = response.status_code in TROUBLES
        answer = f"{response.status_code} ({request.method} {request.url.path[:120]})"
        self._end(request, key, started, answer if refused else "")
        return response

    def _end(self, request: httpx2.Request, key: tuple[str, str], started: float, problem: str) -> None:
        with self._lock:
            self._new.discard(id(request))
            if not problem:
                self._failing_since, self._succeeded = None, time.monotonic()
                return
            self._failed.add(key)
            self.problem = problem
            if self._failing_since is None:
                self._failing_since = max(started, self._succeeded)

    def start_xet(self, start: Callable[[], Any]) -> Any:
        """Return the Xet upload that `start` begins, and watch it. Raises `CancelledError`."""
        upload = _XetUpload()
        with self._lock:
            self.require()
            self._xet.append(upload)
        try:
            commit = start()  # this connects, and may take long
        except BaseException:
            upload.has_failed = True
            raise
        with self._lock:
            upload.commit = commit
            if self.is_cancelled:
                upload.abort()
            self.require()
        return commit


_of_thread: ContextVar[Attempt | None] = ContextVar("attempt", default=None)
_newest: Attempt | None = None


def current() -> Attempt | None:
    """Return the try that this thread works for.

    The client uploads in pools of threads that it makes for that, and these do not say for whom: so one of them works
    for the try that is the newest when it makes its first request.
    """
    found = _of_thread.get() or _newest
    if found is not None and threading.current_thread().name.startswith(POOL):
        _of_thread.set(found)
    return found


class _XetUpload:
    """An upload under way, and when it last processed anything."""

    def __init__(self) -> None:
        self.commit: Any = None
        """The `hf_xet.XetUploadCommit`, once there is a connection."""
        self.has_failed = False
        self._reached: tuple[int, ...] = ()
        self._since = time.monotonic()

    def waiting_since(self, now: float) -> float | None:
        """Return when it last processed anything; None where it has ended."""
        if self.has_failed:
            return None
        if self.commit is None:
            return self._since
        try:
            status, report = str(self.commit.status()), self.commit.progress()
        except Exception:  # so it says that it has failed
            return None
        if status.endswith(("Completed", "UserCancelled")):
            return None
        shard = report.shard
        reached = (
            report.total_bytes_completed,
            report.total_transfer_bytes_completed,
            *((shard.total_shard_bytes_upload_completed, shard.total_shards_completed) if shard else ()),
        )
        if reached != self._reached:
            self._reached, self._since = reached, now
        return self._since

    def abort(self) -> None:
        """End it, if it has not ended."""
        with contextlib.suppress(Exception):
            if self.commit is not None:
                self.commit.abort()
            elif not self.has_failed:  # while it connects, only all uploads of this process can be ended
                _xet.abort_xet_session()


class _WatchedSession:
    """A session of `hf_xet` whose uploads can be cancelled."""

    def __init__(self, session: Any):
        self._session = session

    def new_upload_commit(self, **options: Any) -> Any:
        attempt = current()
        if attempt is None:
            return self._session.new_upload_commit(**options)
        return attempt.start_xet(lambda: self._session.new_upload_commit(**options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class WatchedXetSessions(_xet.XetSessionHolder):
    """What the client takes its Xet sessions from."""

    def get(self) -> Any:
        """Return the session of this process."""
        return _WatchedSession(super().get())
