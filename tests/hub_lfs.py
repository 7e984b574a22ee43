"""The LFS protocol of the tests' Hub, and the storage that it sends clients to, which asks for no token."""

from math import ceil
from typing import Any

from tests.hub_http import MODEL, REPO, Call, Response, route
from tests.hub_store import HubError, write_atomically

OBJECT = "/storage/(?P<oid>[0-9a-f]{64})"


@route("POST", f"/{REPO}[.]git/info/lfs/objects/batch", "write")
def lfs_batch(call: Call) -> Response:
    """How to upload each object; nothing to do for those that are here."""
    multipart = "multipart" in call.json["transfers"]
    objects: list[dict[str, Any]] = []
    for wanted in call.json["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        objects.append({"oid": oid, "size": size})
        if call.hub.store.blobs.size(oid) is None:
            href = f"{call.hub.storage_url}/storage/{oid}"
            header: dict[str, str] = {}
            if multipart and size > call.hub.multipart_from:
                parts = range(1, ceil(size / call.hub.multipart_from) + 1)
                header = {"chunk_size": str(call.hub.multipart_from)} | {str(n): f"{href}?part={n}" for n in parts}
            verify = f"{call.hub.url}/api/models/{call.repo.id}/lfs-verify"
            objects[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": {"href": verify}}
    return Response.json({"transfer": "basic", "objects": objects})


@route("POST", f"{MODEL}/lfs-verify", "write")
def lfs_verify(call: Call) -> Response:
    if call.hub.store.blobs.size(call.json["oid"]) != call.json["size"]:
        raise HubError(404, f"Not uploaded, or of another size: {call.json['oid']}")
    return Response.json({})


@route("PUT", OBJECT)
def put_object(call: Call) -> Response:
    """A whole object, kept if its content is what its name says, or one part of it, kept until all are there."""
    oid, part, blobs = call.names["oid"], call.query.get("part"), call.hub.store.blobs
    if part is None:
        write_atomically(blobs.path(oid), call.body, sha256=oid)
        return Response()
    sha256 = write_atomically(blobs.path(f"{oid}.{part}"), call.body)
    return Response(headers={"ETag": f'"{sha256}"'})


@route("POST", OBJECT)
def complete_object(call: Call) -> Response:
    """The end of an upload in parts."""
    oid, blobs = call.names["oid"], call.hub.store.blobs
    parts = [blobs.path(f"{oid}.{part['partNumber']}") for part in call.json["parts"]]
    if blobs.size(oid) is None:
        if not all(part.exists() for part in parts):
            raise HubError(400, "Not all parts have been uploaded")
        write_atomically(blobs.path(oid), (part.read_bytes() for part in parts), sha256=oid)
    for part in parts:
        part.unlink(missing_ok=True)
    return Response.json({})


@route("GET", OBJECT)
def get_object(call: Call) -> Response:
    oid, blobs = call.names["oid"], call.hub.store.blobs
    if blobs.size(oid) is None:
        raise HubError(404, "No such object")
    return Response.file(blobs.path(oid), call.headers.get("Range"), {"ETag": f'"{oid}"'})
