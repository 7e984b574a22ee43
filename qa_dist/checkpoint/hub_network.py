"""Deadlines for whole requests, enforced at the connection.

The time-outs of the HTTP client count from one piece to the next, so a server that sends one byte of its headers each
second can hold a request without end. Here every request ends, whatever the server does.
"""

import math
import time
from typing import Any, Literal

import httpcore2
import httpx2

SLOWEST = 1000.0
"""Bytes per second of a body, sent or received, below which a request is given up."""
PIECE = 16 * 1024
"""Bytes that are handed to the connection at a time."""


class Connection(httpcore2.NetworkStream):
    """A connection that gives up a request which takes too long.

    A request has three parts: it is sent, the headers of the answer arrive, the body of the answer arrives. The
    headers have to be complete within the client's time-out. Bodies may take any time as long as they keep up the
    rate `SLOWEST`, averaged over that time-out.
    """

    def __init__(self, stream: httpcore2.NetworkStream):
        self._stream = stream
        self._part: Literal["idle", "sending", "headers", "body"] = "idle"
        self._end = 0.0
        """Of the time in which the headers, or the next part of a body, have to arrive."""
        self._moved = 0
        """Bytes in that time."""

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send `buffer`. Raises `httpcore2.WriteTimeout`."""
        if self._part != "sending":
            self._begin("sending", timeout)
        for start in range(0, len(buffer), PIECE):
            piece = buffer[start : start + PIECE]
            self._stream.write(piece, self._left(httpcore2.WriteTimeout))
            self._count(len(piece), timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has arrived. Raises `httpcore2.ReadTimeout`."""
        if self._part in ("idle", "sending"):
            self._begin("headers", timeout)
        data = self._stream.read(max_bytes, self._left(httpcore2.ReadTimeout))
        self._count(len(data), timeout)
        return data

    def expect_body(self, timeout: float | None) -> None:
        """Start the time of the body: the headers are complete."""
        self._begin("body", timeout)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(self, *args: Any, **options: Any) -> httpcore2.NetworkStream:
        """Return the encrypted connection."""
        return Connection(self._stream.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection below knows, such as its socket."""
        return self._stream.get_extra_info(info)

    def _begin(self, part: Literal["sending", "headers", "body"], timeout: float | None) -> None:
        self._part, self._moved = part, 0
        self._end = math.inf if timeout is None else time.monotonic() + timeout

    def _left(self, error: type[Exception]) -> float | None:
        """Return the seconds that are left, None for any number. Raises `error` where there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise error(f"too slow: {self._moved:,} bytes of the {self._part} in the time allowed")
        return None if math.isinf(left) else left

    def _count(self, size: int, timeout: float | None) -> None:
        self._moved += size
        if self._part in ("sending", "body") and timeout is not None and self._moved >= SLOWEST * timeout:
            self._begin(self._part, timeout)


class Network(httpcore2.NetworkBackend):
    """Makes connections with deadlines."""

    def __init__(self, backend: httpcore2.NetworkBackend):
        self._backend = backend

    def connect_tcp(self, *args: Any, **options: Any) -> httpcore2.NetworkStream:
        """Return a new connection over TCP."""
        return Connection(self._backend.connect_tcp(*args, **options))

    def connect_unix_socket(self, *args: Any, **options: Any) -> httpcore2.NetworkStream:
        """Return a new connection over a socket of this machine."""
        return Connection(self._backend.connect_unix_socket(*args, **options))

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._backend.sleep(seconds)


def with_deadlines(client: httpx2.Client, timeout: httpx2.Timeout) -> None:
    """Have every request of `client` end: `timeout` holds for those that ask for a longer one, or for none."""

    def limit(request: httpx2.Request) -> None:
        # A redirected request has the extensions of the first, so one time-out covers them all.
        started = request.extensions.setdefault("started", time.monotonic())
        asked = request.extensions.setdefault("asked_timeout", request.extensions.get("timeout", {}))
        limits: dict[str, float | None] = {}
        for name, most in timeout.as_dict().items():
            wanted = asked.get(name)
            limits[name] = most if most is None or wanted is None else min(wanted, most)
        if limits["read"] is not None:
            limits["read"] -= time.monotonic() - started
            if limits["read"] <= 0:
                raise httpx2.ReadTimeout("redirected for too long", request=request)
        request.extensions["timeout"] = limits

    def expect_body(response: httpx2.Response) -> None:
        connection = response.extensions.get("network_stream")
        if isinstance(connection, Connection):
            connection.expect_body(response.request.extensions["timeout"]["read"])

    client.event_hooks["request"].append(limit)
    client.event_hooks["response"].append(expect_body)
    # The client has no public way to replace the network below its proxies and connection pools.
    for transport in (client._transport, *client._mounts.values()):
        if transport is not None:
            pool: Any = transport._pool  # pyright: ignore[reportAttributeAccessIssue]
            pool._network_backend = Network(pool._network_backend)
