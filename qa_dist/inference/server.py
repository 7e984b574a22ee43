"""A page to ask a model on, and the same for programs: POST /answer. For the person at this machine, not the internet.

curl -H 'Content-Type: application/json' -d '{"question": "…", "context": "…", "top_k": 3}' localhost:8000/answer
curl -H 'Content-Type: application/json' -d '{"text": "…"}' localhost:8000/answer
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import ip_address
from typing import Any

from qa_dist.errors import UserError
from qa_dist.inference.served import Served

MOST_CONNECTIONS = 32
"""At a time; more are closed at once, so that those who only hold one open do not fill the memory."""
IDLE_SECONDS = 15.0
"""How long a client may take to send anything more of its request."""
MOST_DISCARDED = 100_000_000
"""Bytes of a request that is too long which are read, so that its client is there to be told."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
PARTS = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


class AnswerServer(ThreadingHTTPServer):
    """Answers on `http://host:port`; made, it listens."""

    daemon_threads = True

    def __init__(
        self,
        served: Served,
        host: str,
        port: int,
        *,
        max_characters: int,
        timeout: float,
    ):
        """`max_characters`: of the texts of a request together. `timeout`: seconds that an answer
        may take. Raises `UserError` where `host` and `port` cannot be listened on."""
        self.served = served
        self.max_characters, self.answer_timeout = max_characters, timeout
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.turn = threading.Semaphore(1)
        """The model answers one request at a time: two at once would take twice as long each."""
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--host {host} --port {port}: cannot be listened on: {reason}; name another") from None
        self.port = self.server_address[1]
        self.host = host
        self.is_local = _is_loopback(host)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which takes seconds where there is no network."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is nothing to tell."""
        logging.getLogger(__name__).debug("a connection failed", exc_info=True)


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: AnswerServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server_version, sys_version = "qa_dist", ""

    def do_GET(self) -> None:
        self._reply(self._part)

    def do_HEAD(self) -> None:
        self._reply(self._part)

    def do_POST(self) -> None:
        self._reply(self._answer)

    def _reply(self, make: Callable[[], tuple[str, bytes]]) -> None:
        status = HTTPStatus.OK
        try:
            self._require_known_host()
            if self.command != "POST" and {"Content-Length", "Transfer-Encoding"} & set(self.headers):
                self.close_connection = True  # a body that is not read is no next request
            kind, body = make()
        except _RefusedError as refused:
            status, kind, body = refused.status, *_json({"error": str(refused)})
        except UserError as error:
            status, kind, body = HTTPStatus.BAD_REQUEST, *_json({"error": str(error)})
        except TimeoutError:
            seconds = self.server.answer_timeout
            message = f"this takes more than {seconds:g} seconds (--timeout); shorten the text"
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, *_json({"error": message})
        except OSError:
            raise  # the client is gone
        except Exception as error:  # the server stays up
            logging.getLogger(__name__).exception("a request failed")
            message = f"the model failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, *_json({"error": message})
        if status != HTTPStatus.OK:
            self.close_connection = True  # what is left of its request has not been read
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _require_known_host(self) -> None:
        """Pages of other sites that point their name at this machine (DNS rebinding) are not answered."""
        host = (self.headers.get("Host") or "").rpartition(":")[0].strip("[]") or self.headers.get("Host") or ""
        if self.server.is_local and not _is_loopback(host.lower()):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, f"this server is asked for as {self.server.url}, not {host[:80]!r}"
            )

    def _part(self) -> tuple[str, bytes]:
        path = self.path.partition("?")[0]
        if path == "/model":
            return _json({**self.server.served.about, "max_characters": self.server.max_characters})
        if path not in PARTS:
            raise _RefusedError(
                HTTPStatus.NOT_FOUND, "there is no such page; the page is at /, the answers at POST /answer"
            )
        name, kind = PARTS[path]
        return f"{kind}; charset=utf-8", (resources.files("qa_dist.inference") / "page" / name).read_bytes()

    def _answer(self) -> tuple[str, bytes]:
        if self.path.partition("?")[0] != "/answer":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing to post to but /answer")
        # A page of another site can only post what a form can, which JSON is not.
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON, as Content-Type: application/json")
        values = self._values()
        if sum(map(len, self.server.served.texts(values))) > self.server.max_characters:
            raise self._too_long()
        begin = time.monotonic()
        if not self.server.turn.acquire(timeout=self.server.answer_timeout):
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "other requests are being answered; try again")
        try:
            left = max(self.server.answer_timeout - (time.monotonic() - begin), 0.0)
            reply = self.server.served.ask(values, left)
        finally:
            self.server.turn.release()
        return _json({**reply, "seconds": time.monotonic() - begin})

    def _values(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16) or "Transfer-Encoding" in self.headers:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed, and no Transfer-Encoding")
        if int(length) > 12 * self.server.max_characters + 10_000:  # as JSON a character takes 12 bytes at most
            for _ in self._parts(min(int(length), MOST_DISCARDED)):
                pass  # a client that is still sending would not hear why it is refused
            raise self._too_long()
        try:
            values = json.loads(b"".join(self._parts(int(length))))
        except (ValueError, RecursionError):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not JSON in UTF-8") from None
        if not isinstance(values, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not a JSON object")
        return values

    def _parts(self, length: int) -> Iterator[bytes]:
        """The body, in the time of an answer at most: a client that sends a byte now and then would never be done."""
        deadline = time.monotonic() + self.server.answer_timeout
        while length > 0:
            try:
                part = self.rfile.read1(min(length, 1 << 20))
            except TimeoutError:
                part = b""
            if not part or time.monotonic() > deadline:
                raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the request did not come as a whole")
            length -= len(part)
            yield part

    def _too_long(self) -> _RefusedError:
        limit = self.server.max_characters
        message = f"the texts have more than {limit:,} characters together; the limit is --max_characters"
        return _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: questions are nobody else's business."""


def _json(content: Any) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(content, ensure_ascii=True).encode()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
