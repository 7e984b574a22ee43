"""The endpoints of the Hub's API that the client calls for models, one function each."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from tests.hub_cards import card_data
from tests.hub_http import MODEL, REPO, REVISION, Call, Response, User, route
from tests.hub_store import Add, Commit, Delete, Entry, HubError, is_lfs


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    user = call.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": user.role} for name in user.orgs]
    token = {"displayName": "test", "role": user.role}
    auth = {"type": "access_token", "accessToken": token}
    return Response.json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})


def _named_repo(call: Call) -> tuple[str, User]:
    """Of a request that carries the repository's name in its body."""
    data = call.json
    if data.get("type") not in (None, "model"):
        raise HubError(404, "This server has models only")
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    namespace = data.get("organization") or call.user.name
    return f"{namespace}/{data['name']}", call.writer(namespace)


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Response:
    repo_id, user = _named_repo(call)
    answer = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id}
    private = call.json.get("visibility") == "private" or bool(call.json.get("private"))
    with call.hub.store.writing():
        if call.hub.store.get(repo_id):
            return Response.json({"error": "You already created this model repo", **answer}, 409)
        call.hub.store.create(repo_id, private=private, author=user.name)
    return Response.json(answer)


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Response:
    repo_id, _ = _named_repo(call)
    with call.hub.store.writing():
        call.visible(repo_id)
        call.hub.store.delete(repo_id)
    return Response(200, b"OK")


@route("GET", MODEL, "read")
@route("GET", f"{MODEL}/revision/{REVISION}", "read")
def model_info(call: Call) -> Response:
    repo, commit = call.repo, call.repo.resolve(call.names.get("revision", "main"))
    siblings: list[dict[str, Any]] = []
    for path, entry in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in call.query:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        siblings.append(sibling)
    card = repo.read("README.md", commit.sha).decode() if "README.md" in commit.files else ""
    info = {
        "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.sha,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": repo.created,
        "lastModified": commit.date,
        "siblings": siblings,
        "cardData": card_data(card),
    }
    return Response.json(info)


@route("GET", f"{MODEL}/refs", "read")
def refs(call: Call) -> Response:
    def listed(references: Mapping[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in references.items()]

    branches, tags = listed(call.repo.branches, "heads"), listed(call.repo.tags, "tags")
    return Response.json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@route("GET", f"{MODEL}/commits/{REVISION}", "read")
def commits(call: Call) -> Response:
    def described(commit: Commit) -> dict[str, Any]:
        texts = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
        return {**texts, "authors": [{"user": commit.author}]}

    history = [described(commit) for commit in call.repo.commits(call.names["revision"])]
    return call.page(history, min(50, call.hub.page_size))


def _listed(path: str, entry: Entry) -> dict[str, Any]:
    listed: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.sha256:
        listed["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return listed


def _listing(files: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """Files and the folders that hold them, by path."""
    listing = {path: _listed(path, entry) for path, entry in files.items()}
    for folder in {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}:
        inside = [entry.oid for path, entry in files.items() if path.startswith(f"{folder}/")]
        oid = hashlib.sha1(json.dumps([folder, *inside]).encode()).hexdigest()
        listing[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
    return dict(sorted(listing.items()))


@route("GET", f"{MODEL}/tree/{REVISION}(?:/(?P<path>.+))?", "read")
def tree(call: Call) -> Response:
    path, revision = call.names["path"].strip("/"), call.names["revision"]
    listing = _listing(call.repo.files(revision))
    inside = {name: listed for name, listed in listing.items() if not path or name.startswith(f"{path}/")}
    if path and not inside:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    if call.query.get("recursive") != "true":
        depth = len(PurePosixPath(path).parts) + 1
        inside = {name: listed for name, listed in inside.items() if len(PurePosixPath(name).parts) == depth}
    return call.page(list(inside.values()), call.hub.page_size)


@route("POST", f"{MODEL}/paths-info/{REVISION}", "read")
def paths_info(call: Call) -> Response:
    listing = _listing(call.repo.files(call.names["revision"]))
    wanted = parse_qs(call.body.read().decode()).get("paths", [])
    return Response.json([listing[path.strip("/")] for path in wanted if path.strip("/") in listing])


@route("POST", f"{MODEL}/preupload/{REVISION}", "write")
def preupload(call: Call) -> Response:
    """Which files the client has to upload by LFS, and what the Hub has in their place: its sha256 or git's oid."""
    present = call.repo.files(call.names["revision"])
    files: list[dict[str, Any]] = []
    for file in call.json["files"]:
        path, mode = file["path"], "lfs" if is_lfs(file["path"], file["size"]) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        if path in present:
            files[-1]["oid"] = present[path].blob
    return Response.json({"files": files})


@route("POST", f"{MODEL}/commit/{REVISION}", "write")
def commit(call: Call) -> Response:
    lines = [json.loads(line) for line in call.body.read().splitlines()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None or call.query.get("create_pr"):
        raise HubError(400, "A commit needs a header, and this server has no pull requests")
    operations = [_operation(call, line["key"], line["value"]) for line in lines if line["key"] != "header"]
    made = call.repo.commit(
        call.names["revision"],
        header["summary"],
        operations,
        call.writer().name,
        parent=header.get("parentCommit"),
        message=header.get("description", ""),
    )
    url = f"{call.hub.url}/{call.repo.id}/commit/{made.sha}"
    return Response.json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _operation(call: Call, key: str, value: dict[str, Any]) -> Add | Delete:
    path, blobs = value["path"], call.hub.store.blobs
    if key == "file":
        content = value["content"]
        data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
        return Add(path, blobs.add_regular(data))
    if key == "lfsFile":
        size = blobs.size(value["oid"])
        if size is None or size != value.get("size", size):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        return Add(path, Entry.lfs(value["oid"], size))
    if key in ("deletedFile", "deletedFolder"):
        return Delete(path, key == "deletedFolder")
    raise HubError(400, f"Unknown operation: {key}")


@route("POST", f"{MODEL}/branch/{REVISION}", "write")
def create_branch(call: Call) -> Response:
    call.repo.create_branch(call.names["revision"], call.json.get("startingPoint") or "main")
    return Response.json({}, 201)


@route("DELETE", f"{MODEL}/branch/{REVISION}", "write")
def delete_branch(call: Call) -> Response:
    call.repo.delete_branch(call.names["revision"])
    return Response.json({})


@route("POST", f"{MODEL}/tag/{REVISION}", "write")
def create_tag(call: Call) -> Response:
    call.repo.create_tag(call.json["tag"], call.names["revision"])
    return Response.json({}, 201)


@route("POST", f"{MODEL}/super-squash/{REVISION}", "write")
def super_squash(call: Call) -> Response:
    title = call.json.get("message") or f"Super-squash branch '{call.names['revision']}'"
    made = call.repo.squash(call.names["revision"], title, call.writer().name)
    return Response.json({"commitId": made.sha})


@route("GET", f"{MODEL}/auth-check", "read")
@route("GET", f"{MODEL}/auth-check/write", "write")
def auth_check(call: Call) -> Response:
    return Response.json({})


@route("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "read")
def resolve(call: Call) -> Response:
    """A regular file itself; for one in LFS, the way to the storage, which is another host that asks for no token."""
    commit, path = call.repo.resolve(call.names["revision"]), call.names["path"]
    headers = {"X-Repo-Commit": commit.sha}
    entry = commit.files.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{entry.oid}"'
    if entry.sha256 is None:
        return Response.file(call.hub.store.blobs.path(entry.blob), call.headers.get("Range"), headers)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return Response(302, b"", headers | {"Location": f"{call.hub.storage_url}/storage/{entry.sha256}"})
