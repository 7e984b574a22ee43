"""A Hugging Face Hub on the loopback interface, for the real client: commits, LFS and Xet uploads, and their faults.

    server = HubServer(tmp_path / "hub")
    with server:
        api = HfApi(endpoint=server.url, token="hf_alice")

In a process of its own: `python -m tests.hub_server DIRECTORY`, which prints the URL.
"""

import argparse
import json
import os
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple

# Importing the modules of the endpoints registers their routes.
from tests import hub_api, hub_cards, hub_lfs, xet_server  # noqa: F401
from tests.hub_faults import (
    DROP,
    DROP_IN_BODY,
    ENDLESS,
    FLIP_BYTE,
    LOST_ANSWER,
    TRICKLE,
    TRICKLE_BODY,
    TRUNCATE,
    Action,
    Fault,
    Faults,
    hang,
    slow_body,
    spoiled,
    status,
)
from tests.hub_http import Body, Call, Response, User, answer
from tests.hub_store import Commit, Entry, HubError, Repo, Store

if TYPE_CHECKING:
    import pytest

__all__ = [
    "DROP",
    "DROP_IN_BODY",
    "ENDLESS",
    "FLIP_BYTE",
    "LOST_ANSWER",
    "TRICKLE",
    "TRICKLE_BODY",
    "TRUNCATE",
    "Action",
    "Commit",
    "Entry",
    "Fault",
    "HubServer",
    "Repo",
    "Request",
    "User",
    "hang",
    "online",
    "slow_body",
    "status",
]


class Request(NamedTuple):
    """What the server was asked: the path as it came, quoted and with its query; status 0 for no answer at all."""

    method: str
    path: str
    status: int


class HubServer:
    """The Hub and its storage. All data are below `directory`, where the next server finds them.

    `port`: 0 for a free one; that of a server that was closed, for a Hub that comes back.
    """

    def __init__(self, directory: Path, *, port: int = 0, xet: bool = False):
        self.store = Store(directory)
        self.tokens = {
            "hf_alice": User("alice"),
            "hf_reader": User("alice", role="read"),
            "hf_bob": User("bob"),
        }
        self.faults = Faults()
        self.xet = xet
        self.page_size = 1000
        """Entries of a listing that come in one answer."""
        self.multipart_from = 64 * 1024**2
        """Larger LFS files are uploaded in parts of this size."""
        self.closing = threading.Event()
        self.requests: list[Request] = []
        """In the order in which they were answered."""
        self.lost_connections = 0
        """Connections that a client has ended in the middle of a request, or by a reset; not an error of the server."""
        self._port = port
        self._listener: _Listener | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        """The same server under another name: to that, as to the Hub's real storage, the client sends no token."""
        return f"http://localhost:{self.port}"

    @property
    def port(self) -> int:
        assert self._listener is not None, "the server has not been started"
        return self._listener.server_address[1]

    def repo(self, repo_id: str) -> Repo:
        repo = self.store.get(repo_id)
        if repo is None:
            raise KeyError(repo_id)
        return repo

    def delete_repo(self, repo_id: str) -> None:
        self.store.delete(repo_id)

    def start(self) -> None:
        self._listener = _Listener(self, self._port)
        self._listener.start()

    def close(self) -> None:
        """At once: requests in flight lose their connections, and can change nothing any more."""
        self.store.close()
        self.closing.set()
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listener(ThreadingMixIn, TCPServer):
    allow_reuse_address = True
    block_on_close = False  # `close` waits, once it has ended the connections
    request_queue_size = 128

    def __init__(self, hub: HubServer, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._serving: list[threading.Thread] = []

    def start(self) -> None:
        self._start("hub server", self.serve_forever, 0.02)

    def close(self) -> None:
        """End all connections, and the threads that serve them."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._serving:
            if thread is not threading.current_thread():
                thread.join(10)

    def _start(self, name: str, target: Callable[..., None], *args: Any) -> None:
        self._serving = [thread for thread in self._serving if thread.is_alive()]
        self._serving.append(threading.Thread(target=target, args=args, name=name, daemon=True))
        self._serving[-1].start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        self._start("hub server: connection", self.process_request_thread, request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what is an error of this server. A client may leave at any place, and `close` ends connections."""
        if isinstance(sys.exception(), OSError):
            self.hub.lost_connections += 1
        else:
            super().handle_error(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)


class _Cut(Exception):  # noqa: N818
    """The connection ends here, without an answer."""

    def __init__(self, reset: bool = False):
        self.reset = reset


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server, _Listener)
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: tests look at `HubServer.requests`."""

    def do_GET(self) -> None:
        try:
            self._serve()
        except _Cut as cut:
            self.hub.requests.append(Request(self.command, self.path, 0))
            self._end(cut.reset)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        body = Body(self.rfile, self.headers)
        if self.path.startswith("/_test/"):
            return self._send(self._control(body))
        action = self.hub.faults.take(self.command, self.path)
        if action.kind == "drop" or (action.kind == "hang" and self.hub.closing.wait(action.seconds)):
            raise _Cut
        if action.kind == "drop_in_body" and next(iter(body), None):
            raise _Cut(reset=True)
        if action.kind == "status":
            self.hub.closing.wait(action.seconds or 0)
            response = Response(action.code, action.body, dict(action.headers))
        else:
            response = self._answer(body)
        body.skip()
        if action.kind == "lost_answer":
            raise _Cut
        self.hub.requests.append(Request(self.command, self.path, response.status))
        return self._trickle(response, action) if "trickle" in action.kind else self._send(response, action)

    def _answer(self, body: Body) -> Response:
        try:
            return answer(Call(self.hub, self.command, self.path, self.headers, body))
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            return Response.error(HubError(500, f"The test server failed: {error!r}"))

    def _trickle(self, response: Response, action: Action) -> None:
        """Send the headers, or a body whose first chunk never gets a size, byte by byte."""
        self.close_connection = True
        body = action.kind == "trickle_body"
        headers = response.headers | ({"Transfer-Encoding": "chunked"} if body else {"X-Slow": "." * 2000})
        head = f"HTTP/1.1 {response.status} OK\r\n" + "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        if body:
            self.wfile.write(f"{head}\r\n".encode())
        for byte in b"0" * 2000 if body else head.encode():
            self.wfile.write(bytes([byte]))
            if self.hub.closing.wait(action.seconds):
                return

    def _send(self, response: Response, action: Action | None = None) -> None:
        fault = action.kind if action else "none"
        pieces = response.pieces()
        if fault == "endless":
            self.close_connection = True
        else:
            response.headers.setdefault("Content-Length", str(response.size))
        self.send_response_only(response.status)
        response.headers.setdefault("Date", self.date_time_string())
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for piece in spoiled(fault, pieces, response.size):
            self.wfile.write(piece)
            pause = 0.002 if fault == "endless" else action.seconds if action and fault == "slow_body" else 0
            if self.hub.closing.wait(pause):
                break
        if fault in ("truncate", "drop_in_body"):
            self._end(reset=fault == "drop_in_body")

    def _end(self, reset: bool) -> None:
        """Of the connection: orderly, or by the reset that a peer sends that crashed."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def _control(self, body: Body) -> Response:
        """What a test does from another process: POST all faults that shall hold, GET the requests."""
        if self.command == "POST" and self.path == "/_test/faults":
            self.hub.faults.replace(Fault.from_json(fault) for fault in json.loads(body.read()))
            return Response.json({})
        body.skip()
        return Response.json(self.hub.requests) if self.path == "/_test/requests" else Response(404)


def online(monkeypatch: "pytest.MonkeyPatch", endpoint: str | None = None) -> None:
    """For the rest of a test, the client of this process uses the network, by plain HTTP without Xet.

    It read both from the environment when it was imported, and looks at these constants with each request.
    `endpoint`: for code that names none.
    """
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    if endpoint is not None:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", endpoint)  # of the functions that are no methods
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description="A Hub on the loopback interface")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--xet", action="store_true")
    arguments = parser.parse_args()
    with HubServer(arguments.directory, port=arguments.port, xet=arguments.xet) as server:
        print(server.url, flush=True)
        with suppress(KeyboardInterrupt):
            server.closing.wait()


if __name__ == "__main__":
    main()
