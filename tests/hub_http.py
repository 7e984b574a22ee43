"""What the endpoints of the tests' Hub are made of: requests, responses, who may do what, and the table of routes."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode

from tests.hub_store import HubError, Repo

if TYPE_CHECKING:
    from tests.hub_server import HubServer

PIECE = 64 * 1024
"""Bytes of a body that are held in memory at a time."""
LEFT = "the connection ended inside a body"


@dataclass(frozen=True)
class User:
    """Whom a token belongs to, and what it allows."""

    name: str
    role: Literal["read", "write"] = "write"
    orgs: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.orgs)


class Body:
    """A request's body, read from the socket as it is asked for."""

    def __init__(self, stream: BufferedIOBase, headers: Message):
        self._stream = stream
        chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self._pieces = self._chunked() if chunked else self._exactly(int(headers.get("Content-Length", 0)))

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def read(self) -> bytes:
        """All that has not been read yet."""
        return b"".join(self)

    def skip(self) -> None:
        """Past what has not been read yet: the connection's next request starts behind it."""
        for _ in self:
            pass

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self._from_client(lambda size=size: self._stream.read(min(size, PIECE)))
            if not piece:
                raise ConnectionError(LEFT)
            size -= len(piece)
            yield piece

    def _chunked(self) -> Iterator[bytes]:
        while size := int(self._line().split(b";")[0], 16):
            yield from self._exactly(size)
            self._line()
        while self._line():
            pass

    def _line(self) -> bytes:
        line = self._from_client(self._stream.readline)
        if not line.endswith(b"\n"):
            raise ConnectionError(LEFT)
        return line.strip()

    @staticmethod
    def _from_client(read: Callable[[], bytes]) -> bytes:
        """Return what `read` does. Raises `ConnectionError` where the connection has ended, in whichever way."""
        try:
            return read()
        except (OSError, ValueError) as error:  # ValueError: the server has closed it
            raise ConnectionError(LEFT) from error


@dataclass
class Response:
    status: int = 200
    content: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    size: int = -1
    """Of what is sent; -1 for all of `content`."""

    def __post_init__(self) -> None:
        if self.size < 0:
            self.size = self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def pieces(self) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content[self.start : self.start + self.size]
            return
        with self.content.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left and (piece := file.read(min(left, PIECE))):
                left -= len(piece)
                yield piece

    @classmethod
    def json(cls, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def error(cls, error: HubError) -> "Response":
        message = " ".join(error.message.encode("ascii", "replace").decode().split())
        headers = {"X-Error-Message": message, **({"X-Error-Code": error.code} if error.code else {}), **error.headers}
        return cls.json({"error": error.message}, error.status, headers)

    @classmethod
    def file(cls, path: Path, wanted: str | None, headers: dict[str, str]) -> "Response":
        """`wanted`: the request's Range header."""
        size = path.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
        if not match or not any(match.groups()):
            return cls(200, path, headers)
        first, last = match.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            return cls(416, b"", {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return cls(206, path, headers, start, end - start)


@dataclass
class Call:
    """One request."""

    hub: "HubServer"
    method: str
    target: str
    headers: Message
    body: Body
    names: dict[str, str] = field(default_factory=dict)
    """The parts of the path that the route names, unquoted."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @cached_property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2]))

    @cached_property
    def json(self) -> Any:
        return json.loads(self.body.read())

    @cached_property
    def user(self) -> User | None:
        """None without a token; a wrong or revoked token is refused, as the Hub does even for public things."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    @cached_property
    def repo(self) -> Repo:
        """The repository of the path; one that may not be seen looks like one that does not exist."""
        return self.visible(self.names["repo"])

    def visible(self, repo_id: str) -> Repo:
        user, repo = self.user, self.hub.store.get(repo_id)
        if repo and (not repo.private or (user and repo_id.split("/")[0] in user.namespaces)):
            return repo
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def writer(self, namespace: str = "") -> User:
        """The user, if they may write there: by default, to the repository of the path."""
        namespace = namespace or self.names["repo"].split("/")[0]
        if self.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if namespace not in self.user.namespaces:
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
        if self.user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to change a repository")
        return self.user

    def page(self, items: list[Any], limit: int) -> Response:
        """The part of `items` that the query's cursor names, with a link to the next one."""
        start, limit = int(self.query.get("cursor", 0)), min(limit, int(self.query.get("limit", limit)))
        response = Response.json(items[start : start + limit])
        if start + limit < len(items):
            query = urlencode({**self.query, "cursor": start + limit})
            response.headers["Link"] = f'<{self.hub.url}{self.path}?{query}>; rel="next"'
        return response


Access = Literal["", "read", "write"]
Endpoint = Callable[[Call], Response]


class Route(NamedTuple):
    method: str
    pattern: re.Pattern[str]
    access: Access
    endpoint: Endpoint


ROUTES: list[Route] = []
REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = f"/api/models/{REPO}"
REVISION = "(?P<revision>[^/]+)"


def route(method: str, pattern: str, access: Access = "") -> Callable[[Endpoint], Endpoint]:
    """`access`: what the endpoint needs to the repository that the path names."""

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append(Route(method, re.compile(pattern), access, endpoint))
        return endpoint

    return register


def answer(call: Call) -> Response:
    """What the endpoint that the call is for says; a HEAD is answered like a GET, and its body left out later."""
    for method, pattern, access, endpoint in ROUTES:
        match = pattern.fullmatch(call.path)
        if match and method == ("GET" if call.method == "HEAD" else call.method):
            call.names = {name: unquote(value or "") for name, value in match.groupdict().items()}
            try:
                if access:
                    call.visible(call.names["repo"])
                if access == "write":
                    call.writer()
                return endpoint(call)
            except HubError as error:
                return Response.error(error)
    return Response.error(HubError(404, "Sorry, we can't find the page you are looking for."))
