"""The tests' own Hub, asked by the real client."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.helpers import ROOT
from tests.hub_server import (
    DROP,
    DROP_IN_BODY,
    ENDLESS,
    FLIP_BYTE,
    LOST_ANSWER,
    TRUNCATE,
    Fault,
    HubServer,
    hang,
    online,
    status,
)

REPO = "alice/model"
CARD = b"---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", xet=True) as server:
        online(monkeypatch, server.url)
        yield server


@pytest.fixture
def api(server: HubServer) -> HfApi:
    api = HfApi(token="hf_alice")
    api.create_repo(REPO, private=True)
    return api


def push(api: HfApi, files: dict[str, bytes | None], **more: Any) -> str:
    """One commit; None deletes. Its sha."""
    operations = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
        for path, content in files.items()
    ]
    return api.create_commit(REPO, operations, commit_message=more.pop("title", "A push"), **more).oid


def download(server: HubServer, directory: Path) -> dict[str, bytes]:
    return contents(snapshot_download(REPO, endpoint=server.url, token="hf_alice", cache_dir=directory))


def contents(directory: str | Path) -> dict[str, bytes]:
    snapshot = Path(directory)
    return {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}


def refused(code: int, call: Any, *args: Any, **kwargs: Any) -> HfHubHTTPError:
    with pytest.raises(HfHubHTTPError) as error:
        call(*args, **kwargs)
    assert error.value.response.status_code == code
    return error.value


def test_what_is_pushed_comes_back(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    server.multipart_from = 700_000
    files = {
        "README.md": CARD,
        "weights/model.safetensors": os.urandom(2_000_000),
        "weights/small.bin": b"in LFS by its name",
        "empty.txt": b"",
        "deep/er/name with spaces+and%.txt": "größe".encode(),
    }
    sha = push(api, dict(files), commit_description="more")
    assert download(server, tmp_path / "cache") == files | {".gitattributes": server.repo(REPO).read(".gitattributes")}
    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.card_data and info.card_data.license) == (sha, True, "mit")
    lfs = {s.rfilename: s.lfs and s.lfs.size for s in info.siblings or []}
    assert lfs["weights/model.safetensors"] == 2_000_000
    assert lfs["README.md"] is None
    assert len([r for r in server.requests if r.method == "PUT"]) == 3 + 1
    assert server.repo(REPO).stored_bytes() == 2_000_000 + 18
    assert [(c.title, c.parent is None) for c in server.repo(REPO).commits("main")] == [
        ("A push", False),
        ("initial commit", True),
    ]
    # What is there already is not sent again, and unchanged files make no commit.
    push(api, {"again.safetensors": files["weights/model.safetensors"]})
    assert push(api, {"README.md": CARD}) == server.repo(REPO).branches["main"]
    assert len([r for r in server.requests if r.method == "PUT"]) == 3 + 1


def test_listings(server: HubServer, api: HfApi) -> None:
    server.page_size = 3
    push(api, {f"step_{i}/{name}": b"%d" % i for i in range(3) for name in ("a.bin", "b.txt")})
    tree = list(api.list_repo_tree(REPO, recursive=True))
    assert [entry.path for entry in tree] == [
        ".gitattributes",
        *(f"step_{i}{name}" for i in range(3) for name in ("", "/a.bin", "/b.txt")),
    ]
    assert [entry.path for entry in api.list_repo_tree(REPO, "step_1")] == ["step_1/a.bin", "step_1/b.txt"]
    assert [entry.path for entry in api.get_paths_info(REPO, ["step_1", "no", "step_2/b.txt"])] == [
        "step_1",
        "step_2/b.txt",
    ]
    for i in range(3):
        server.repo(REPO).commit_as("somebody", {"n.txt": b"%d" % i}, title=f"{i}")
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["2", "1", "0", "A push", "initial commit"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "step_9"))
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nothing.txt", token="hf_alice")


def test_parts_of_a_file(server: HubServer, api: HfApi) -> None:
    push(api, {"a.bin": b"0123456789", "a.txt": b"0123456789"})
    for name in ("a.bin", "a.txt"):

        def get(part: str, name: str = name) -> tuple[int, bytes]:
            headers = {"Authorization": "Bearer hf_alice", "Range": f"bytes={part}"}
            url = f"{server.url}/{REPO}/resolve/main/{name}"
            response = httpx2.get(url, headers=headers, follow_redirects=True)
            return response.status_code, response.content

        assert get("2-4") == (206, b"234")
        assert get("7-") == (206, b"789")
        assert get("-2") == (206, b"89")
        assert get("8-20") == (206, b"89")
        assert get("10-")[0] == 416


def test_a_stale_parent_is_refused(server: HubServer, api: HfApi) -> None:
    head = api.repo_info(REPO).sha
    server.repo(REPO).commit_as("somebody", {"theirs.bin": b"new", "both.txt": b"theirs"})
    refused(412, push, api, {"mine.bin": b"mine"}, parent_commit=head)
    assert "mine.bin" not in server.repo(REPO).files("main")
    push(api, {"mine.bin": b"mine"}, parent_commit=api.repo_info(REPO).sha)
    assert {"mine.bin", "theirs.bin"} < server.repo(REPO).files("main").keys()


def test_concurrent_commits_all_land(server: HubServer, api: HfApi) -> None:
    names = [f"{i}.bin" for i in range(8)]
    threads = [threading.Thread(target=push, args=(api, {name: name.encode()})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(names) < server.repo(REPO).files("main").keys()
    assert len(server.repo(REPO).commits("main")) == 9


def test_deleting(server: HubServer, api: HfApi) -> None:
    push(api, {"step_1/a.bin": b"a", "step_1/b.txt": b"b", "step_10/a.bin": b"c"})
    refused(404, push, api, {"step_2/": None, "new.txt": b"new"})
    with pytest.raises(EntryNotFoundError):
        push(api, {"step_1/c.txt": None})
    push(api, {"step_1/": None})
    assert server.repo(REPO).files("main").keys() == {".gitattributes", "step_10/a.bin"}


def test_branches_and_squash(server: HubServer, api: HfApi) -> None:
    api.create_branch(REPO, branch="state/run 1")
    refused(409, api.create_branch, REPO, branch="state/run 1")
    first = push(api, {"a.bin": b"1" * 1000, "keep.txt": b"kept"}, revision="state/run 1")
    push(api, {"a.bin": b"2" * 100}, revision="state/run 1")
    assert {b.name for b in api.list_repo_refs(REPO).branches} == {"main", "state/run 1"}
    assert server.repo(REPO).files("main").keys() == {".gitattributes"}
    assert server.repo(REPO).stored_bytes() == 1100
    api.super_squash_history(REPO, branch="state/run 1", commit_message="squashed")
    assert [c.title for c in server.repo(REPO).commits("state/run 1")] == ["squashed"]
    assert server.repo(REPO).stored_bytes() == 100
    assert server.repo(REPO).read("a.bin", "state/run 1") == b"2" * 100
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision=first)
    api.delete_branch(REPO, branch="state/run 1")
    assert api.list_repo_refs(REPO).branches[0].name == "main"
    refused(404, push, api, {"a.bin": b"3"}, revision="state/run 1")


def test_who_may_what(server: HubServer, api: HfApi) -> None:
    reader, bob = (HfApi(endpoint=server.url, token=token) for token in ("hf_reader", "hf_bob"))
    nobody, wrong = (HfApi(endpoint=server.url, token=token) for token in (False, "hf_wrong"))
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader.model_info(REPO).id == REPO
    reader.auth_check(REPO)
    refused(403, reader.auth_check, REPO, write=True)
    refused(403, push, reader, {"a.txt": b"a"})
    refused(403, reader.create_repo, "alice/other")
    assert reader.create_repo(REPO, exist_ok=True).repo_id == REPO
    refused(403, bob.create_repo, "alice/other")
    refused(409, api.create_repo, REPO)
    for stranger, code in ((bob, 404), (nobody, 401)):
        assert isinstance(refused(code, stranger.model_info, REPO), RepositoryNotFoundError)
        assert isinstance(refused(code, stranger.model_info, "alice/absent"), RepositoryNotFoundError)
    assert not isinstance(refused(401, wrong.model_info, REPO), RepositoryNotFoundError)
    api.create_repo("alice/public")
    assert nobody.model_info("alice/public").private is False
    del server.tokens["hf_alice"]
    refused(401, api.whoami)
    server.delete_repo(REPO)
    refused(404, reader.model_info, REPO)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("- a list", "mapping"),
        ("license: [1]", "license"),
        ("base_model: not a name", "base_model"),
        ("model-index:\n- name: m", "results"),
        ("model-index:\n- name: m\n  results:\n  - task: {}", "task.type"),
        ("model-index:\n- name: m\n  results: none", "results"),
        ("a: [", "Invalid YAML"),
    ],
)
def test_a_card_that_the_hub_refuses(api: HfApi, metadata: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        push(api, {"README.md": f"---\n{metadata}\n---\n".encode()})


def test_a_full_card(api: HfApi) -> None:
    metric = "{type: f1, value: 88.5, name: F1}"
    result = f"{{task: {{type: question-answering}}, dataset: {{type: squad, name: SQuAD}}, metrics: [{metric}]}}"
    index = f"model-index: [{{name: m, results: [{result}]}}]"
    push(api, {"README.md": f"---\nlicense: mit\nbase_model: org/bert\n{index}\n---\n".encode()})
    card = api.model_info(REPO).card_data
    assert card is not None
    assert card.eval_results is not None
    assert card.eval_results[0].metric_value == 88.5


def test_a_new_server_on_the_same_directory(tmp_path: Path, server: HubServer, api: HfApi) -> None:
    push(api, {"a.bin": b"a" * 10, "b.txt": b"b"})
    before = server.repo(REPO)
    server.close()
    with HubServer(tmp_path / "hub", port=server.port) as again:
        assert push(api, {"a.bin": b"a" * 10}) == before.branches["main"]
        after = again.repo(REPO)
        assert (after.private, after.branches, after.commits()) == (True, before.branches, before.commits())
        assert download(again, tmp_path / "cache")["a.bin"] == b"a" * 10
    with pytest.raises(Exception, match="closed"):
        before.commit_as("somebody", {"late.txt": b""})


class TestFaults:
    """Each kind once, as the client shows it."""

    def test_status(self, server: HubServer, api: HfApi) -> None:
        server.faults.add(Fault("POST", "/commit/", status(503, {"Content-Type": "text/html"}, b"<html>busy"), after=1))
        push(api, {"a.txt": b"1"})
        assert "busy" not in str(refused(503, push, api, {"a.txt": b"2"}))
        assert server.requests[-1].status == 503
        push(api, {"a.txt": b"3"})
        assert len(server.repo(REPO).commits()) == 3

    def test_dropped_and_tried_again(self, server: HubServer, api: HfApi) -> None:
        """The client repeats the upload of a file by itself."""
        dropped = server.faults.add(Fault("PUT", "/storage/", DROP))
        push(api, {"a.bin": os.urandom(3_000_000)})
        assert [r.status for r in server.requests if r.method == "PUT"] == [0, 200]
        assert dropped.used == 1

    def test_dropped_in_the_body(self, server: HubServer, api: HfApi, tmp_path: Path) -> None:
        content = os.urandom(3_000_000)
        server.faults.add(Fault("PUT", "/storage/", DROP_IN_BODY))
        push(api, {"a.bin": content})
        assert [r.status for r in server.requests if r.method == "PUT"] == [0, 200]
        server.faults.add(Fault("GET", "/storage/", DROP_IN_BODY))
        with pytest.raises(httpx2.ReadError):
            download(server, tmp_path / "cache")
        assert download(server, tmp_path / "cache")["a.bin"] == content

    def test_lost_answer(self, server: HubServer, api: HfApi) -> None:
        server.faults.add(Fault("POST", "/commit/", LOST_ANSWER))
        with pytest.raises(httpx2.RemoteProtocolError):
            push(api, {"a.txt": b"1"})
        assert server.repo(REPO).read("a.txt") == b"1"

    def test_hang(self, server: HubServer, api: HfApi) -> None:
        server.faults.add(Fault("GET", "/api/models/", hang(0.3)))
        start = time.monotonic()
        assert api.repo_info(REPO).id == REPO
        assert time.monotonic() - start >= 0.3
        server.faults.add(Fault("GET", "/api/models/", hang()))
        with pytest.raises(httpx2.TimeoutException):
            api.repo_info(REPO, timeout=0.2)
        server.faults.add(Fault("GET", "/api/models/", hang()))
        errors: list[Exception] = []

        def ask() -> None:
            try:
                api.repo_info(REPO)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.2)
        start = time.monotonic()
        server.close()
        thread.join(5)
        assert time.monotonic() - start < 1
        assert isinstance(errors[0], httpx2.RemoteProtocolError)

    def test_flipped_byte(self, server: HubServer, api: HfApi, tmp_path: Path) -> None:
        """The client does not notice."""
        content = os.urandom(100_000)
        push(api, {"a.bin": content})
        server.faults.add(Fault("GET", "/storage/", FLIP_BYTE))
        got = download(server, tmp_path / "cache")["a.bin"]
        assert len(got) == len(content)
        assert sum(a != b for a, b in zip(got, content, strict=True)) == 1

    def test_truncated(self, server: HubServer, api: HfApi, tmp_path: Path) -> None:
        """The client asks again."""
        content = os.urandom(1_000_000)
        push(api, {"a.bin": content})
        server.faults.add(Fault("GET", "/storage/", TRUNCATE))
        assert download(server, tmp_path / "cache")["a.bin"] == content
        assert len([r for r in server.requests if r.method == "GET" and "/storage/" in r.path]) == 2

    def test_endless(self, server: HubServer, api: HfApi) -> None:
        push(api, {"a.txt": b"a"})
        server.faults.add(Fault("GET", "/resolve/", ENDLESS, times=None))
        url = f"{server.url}/{REPO}/resolve/main/a.txt"
        with httpx2.stream("GET", url, headers={"Authorization": "Bearer hf_alice"}) as response:
            pieces = response.iter_raw()
            assert sum(len(next(pieces)) for _ in range(100)) > 1_000_000
        server.faults.clear()
        assert httpx2.get(url, headers={"Authorization": "Bearer hf_alice"}).content == b"a"


AUTHORIZED = "Host: hub\r\nAuthorization: Bearer hf_alice\r\n"
WHOAMI = f"GET /api/whoami-v2 HTTP/1.1\r\n{AUTHORIZED}\r\n"
BODY = f"POST /api/models/{REPO}/preupload/main HTTP/1.1\r\n{AUTHORIZED}"


@pytest.mark.parametrize(
    ("request_", "is_answered"),
    [
        ("", False),
        ("GET /api/who", False),
        (WHOAMI[:-2], False),
        (f"{BODY}Content-Length: 5000\r\n\r\n" + "{" * 2000, False),
        (f"{BODY}Transfer-Encoding: chunked\r\n\r\n800\r\n" + "{" * 1000, False),
        (WHOAMI, True),  # the connection is kept for a next request, which does not come
        (WHOAMI + "GET /api", True),
        (f"GET /{REPO}/resolve/main/a.txt HTTP/1.1\r\n{AUTHORIZED}\r\n", False),  # of an answer that has no end
    ],
    ids=["connection", "request line", "headers", "body", "chunk", "after an answer", "next request", "answer"],
)
@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_leaves_is_no_error(
    request_: str, is_answered: bool, is_reset: bool, server: HubServer, api: HfApi, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed, and the connection's thread ends."""
    push(api, {"a.txt": b"a"})
    server.faults.add(Fault("GET", "/resolve/", ENDLESS))
    threads = threading.active_count()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request_.encode())
        if is_answered:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        if is_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while threading.active_count() > threads:
        time.sleep(0.01)
    assert api.whoami()["name"] == "alice"
    server.close()
    assert capfd.readouterr() == ("", "")


def test_a_server_that_closes_ends_its_connections_quietly(
    server: HubServer, api: HfApi, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a body too; when it returns, its threads have ended."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{BODY}Content-Length: 5000\r\n\r\n{{".encode())
        while not any(name.startswith("hub server: connection") for name in names_of_threads()):
            time.sleep(0.01)
        server.close()
        assert not [name for name in names_of_threads() if name.startswith("hub server")]
        with suppress(ConnectionResetError):  # what the system sends where the server had not read all of the body
            assert client.recv(1000) == b""
    assert capfd.readouterr() == ("", "")


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_in_another_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.hub_server", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            online(monkeypatch, url)
            api = HfApi(token="hf_alice")
            fault = {"method": "GET", "path": "whoami", "action": "status", "code": 418, "body": "tea"}
            assert httpx2.post(f"{url}/_test/faults", json=[fault]).status_code == 200
            refused(418, api.whoami)
            assert api.whoami()["name"] == "alice"
            requests = httpx2.get(f"{url}/_test/requests").json()
            assert requests == [["GET", "/api/whoami-v2", 418], ["GET", "/api/whoami-v2", 200]]
            api.create_repo(REPO)
            push(api, {"a.bin": b"a"})
        finally:
            process.kill()
    assert HubServer(tmp_path).repo(REPO).read("a.bin") == b"a"


XET_CLIENT = """
import sys
from contextlib import suppress
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

folder, cache = map(Path, sys.argv[1:])
api = HfApi(token="hf_alice")
for version in (1, 2):
    files = sorted((folder / str(version)).iterdir())
    # From a path and from memory, which the client sends differently.
    contents = [path if i % 2 else path.read_bytes() for i, path in enumerate(files)]
    operations = [CommitOperationAdd(path.name, content) for path, content in zip(files, contents)]
    api.create_commit("alice/model", operations, commit_message=str(version))
print(snapshot_download("alice/model", token="hf_alice", cache_dir=cache))
"""


def test_the_client_with_xet(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    """Contents that Xet packs in each of its ways, and a second version that shares chunks with the first."""
    random = np.random.default_rng(0)
    weights = bytearray(random.standard_normal(500_001).astype("float32").tobytes() + b"odd")
    files = {
        "weights.safetensors": bytes(weights),
        "random.bin": random.bytes(200_000),
        "text.bin": b"again and again " * 50_000,
        "one.bin": b"1",
        "small.txt": b"no LFS",
    }
    weights[1_000_000:1_000_004] = b"\0\0\0\0"
    for version, of_version in enumerate((files, {"weights.safetensors": bytes(weights)}), start=1):
        (tmp_path / str(version)).mkdir()
        for name, content in of_version.items():
            (tmp_path / str(version) / name).write_bytes(content)
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_HUB_DISABLE_XET", None)
    command = [sys.executable, "-c", XET_CLIENT, str(tmp_path), str(tmp_path / "downloads")]
    client = subprocess.run(command, env=environment, check=True, timeout=60, stdout=subprocess.PIPE, text=True)

    repo = server.repo(REPO)
    first = repo.commits()[1].sha
    assert repo.read("weights.safetensors") == bytes(weights)
    assert {name: repo.read(name, first) for name in files} == files
    assert repo.stored_bytes() == sum(len(files[name]) for name in files if name != "small.txt") + len(weights)
    downloaded = contents(client.stdout.splitlines()[-1])
    del downloaded[".gitattributes"]
    assert downloaded == files | {"weights.safetensors": bytes(weights)}
    xorbs = [r for r in server.requests if r.path.startswith("/v1/xorbs/")]
    assert [r.status for r in xorbs] == [200, 200]
    assert not any(r.method == "PUT" for r in server.requests)
    # Without Xet, the same client has nothing left to send.
    push(api, {"copy.safetensors": bytes(weights)})
    assert not any(r.method == "PUT" for r in server.requests)
    assert repo.read("copy.safetensors") == bytes(weights)
