"""What can go wrong between a client and the tests' Hub."""

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal, get_args

Kind = Literal[
    "none",
    "status",
    "hang",
    "drop",
    "drop_in_body",
    "lost_answer",
    "flip_byte",
    "endless",
    "truncate",
    "trickle",
    "trickle_body",
    "slow_body",
]


@dataclass(frozen=True)
class Action:
    """What goes wrong with a request; see the constants and functions below."""

    kind: Kind
    code: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no such fault: {self.kind}")


def status(
    code: int, headers: Mapping[str, str] | None = None, body: bytes = b"", seconds: float | None = None
) -> Action:
    """This answer and nothing done, after so many seconds."""
    return Action("status", code, headers or {}, body, seconds)


def hang(seconds: float | None = None) -> Action:
    """The right answer late; with None, no answer until the server closes."""
    return Action("hang", seconds=seconds)


DROP = Action("drop")
"""The connection is closed before the body is read."""
DROP_IN_BODY = Action("drop_in_body")
"""The connection is reset when a part of the request's body is read; of a GET, when half the answer is sent."""
LOST_ANSWER = Action("lost_answer")
"""All is done as asked, but the connection is closed without an answer."""
FLIP_BYTE = Action("flip_byte")
"""The answer has its size, and one wrong byte."""
ENDLESS = Action("endless")
"""The answer's bytes do not end until the client closes."""
TRUNCATE = Action("truncate")
"""Half of what Content-Length says is sent."""
TRICKLE = Action("trickle", seconds=0.1)
"""The headers of the answer come one byte at a time."""
TRICKLE_BODY = Action("trickle_body", seconds=0.1)
"""The body of the answer comes one byte at a time, without end."""


def slow_body(seconds: float) -> Action:
    """A wait before each piece of the body of the answer."""
    return Action("slow_body", seconds=seconds)


@dataclass
class Fault:
    """Which requests go wrong, and how: `times` of those that match (None: all), after the first `after`."""

    method: str = ""
    path: str = ""
    """A regular expression, searched in the path as the client sends it: quoted, and with the query."""
    action: Action = DROP
    times: int | None = 1
    after: int = 0
    seen: int = field(default=0, init=False)
    used: int = field(default=0, init=False)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Fault":
        """`data`: the fields of a fault and of its action in one; `action` is the action's kind, `body` text."""
        rest = dict(data)
        action = Action(
            rest.pop("action"),
            rest.pop("code", 0),
            rest.pop("headers", {}),
            rest.pop("body", "").encode(),
            rest.pop("seconds", None),
        )
        return cls(action=action, **rest)

    def strikes(self, method: str, path: str) -> bool:
        if (self.method and method != self.method) or not re.search(self.path, path):
            return False
        self.seen += 1
        strikes = self.seen > self.after and (self.times is None or self.used < self.times)
        self.used += strikes
        return strikes


class Faults:
    """The faults of a server; the first one that strikes a request is the one that it gets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def replace(self, faults: Iterable[Fault]) -> None:
        with self._lock:
            self._faults = list(faults)

    def take(self, method: str, path: str) -> Action:
        with self._lock:
            return next((fault.action for fault in self._faults if fault.strikes(method, path)), Action("none"))


def spoiled(kind: Kind, pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """A body of `size` bytes as a fault lets it through."""
    if kind == "endless":
        yield from repeat(b"\0" * 65536)
    left = size // 2 if kind in ("truncate", "drop_in_body") else size
    for piece in pieces:
        if kind == "flip_byte" and piece and left == size:
            middle = len(piece) // 2
            piece = piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
        yield piece[:left]
        left -= len(piece[:left])
