"""The Xet side of the tests' Hub: it takes the chunks of the real `hf_xet` and puts the files together from them.

A client cuts files into chunks, packs chunks into xorbs and uploads those; then it uploads a shard, which says for
each file which chunks of which xorbs it is made of. Here a shard turns its files into ordinary LFS blobs, so that
commits and downloads need to know nothing of Xet. Of the protocol's newer forms (upload grants, streamed answers to
shards) the client is told 404, and takes the older ones.
"""

import struct
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from tests.hub_http import MODEL, REVISION, Call, Response, User, route
from tests.hub_store import HubError, write_atomically

ENTRY = 48
"""The size of everything in a shard."""
BOOKEND = b"\xff" * 32
"""In place of a hash: the end of a section."""
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30

Segment = tuple[str, int, int]
"""A xorb, its first chunk and the one behind its last."""


@route("GET", f"{MODEL}/xet-write-token/{REVISION}", "write")
@route("GET", f"{MODEL}/xet-read-token/{REVISION}", "read")
def xet_token(call: Call) -> Response:
    """Where the chunks go, and what to show there: the Hub's own token."""
    if not call.hub.xet:
        raise HubError(404, "This server has no Xet")
    url, token = call.hub.storage_url, call.headers.get("Authorization", "").removeprefix("Bearer ")
    expires = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return Response.json({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def _writer(call: Call) -> User:
    if call.user is None or call.user.role != "write":
        raise HubError(403 if call.user else 401, "No token that may write")
    return call.user


@route("POST", "/v1/xorbs/default/(?P<hash>[0-9a-f]{64})")
def put_xorb(call: Call) -> Response:
    _writer(call)
    path = _xorb(call, call.names["hash"])
    inserted = not path.exists()
    write_atomically(path, call.body)
    return Response.json({"was_inserted": inserted})


@route("POST", "/v1/shards")
def put_shard(call: Call) -> Response:
    """Makes the files that the shard describes, each of which names its sha256."""
    _writer(call)
    blobs = call.hub.store.blobs
    for sha256, segments in _files(call.body.read()):
        if blobs.size(sha256) is None:
            write_atomically(blobs.path(sha256), _content(call, segments), sha256)
    return Response.json({"result": 1})


def _xorb(call: Call, name: str) -> Path:
    return call.hub.store.blobs.path(f"{name}.xorb")


def _content(call: Call, segments: list[Segment]) -> Iterator[bytes]:
    for name, first, end in segments:
        path = _xorb(call, name)
        if not path.exists():
            raise HubError(400, f"No such xorb: {name}")
        yield from (chunk() for chunk in islice(_chunks(path.read_bytes()), first, end))


def _hex(digest: bytes) -> str:
    """Xet writes a hash as four little-endian numbers, also a sha256."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest[:32]))


def _files(shard: bytes) -> Iterator[tuple[str, list[Segment]]]:
    """Of a shard's first section, each file's sha256 and where its bytes are."""
    entries = (shard[at : at + ENTRY] for at in range(ENTRY, len(shard), ENTRY))
    for header in entries:
        if header.startswith(BOOKEND):
            return
        flags, count = struct.unpack_from("<2I", header, 32)
        segments = [next(entries) for _ in range(count)]
        for _ in range(count if flags & WITH_VERIFICATION else 0):
            next(entries)
        if not flags & WITH_METADATA:
            raise HubError(400, "A file without its sha256")
        ranges = [(_hex(segment), *struct.unpack_from("<2I", segment, 40)) for segment in segments]
        yield _hex(next(entries)), ranges


def _chunks(xorb: bytes) -> Iterator[partial[bytes]]:
    """Each chunk, to be unpacked where it is wanted. What follows the last one starts with no chunk's version."""
    at = 0
    while at < len(xorb) and xorb[at] == 0:
        packed, unpacked = (int.from_bytes(xorb[at + i : at + i + 3], "little") for i in (1, 5))
        yield partial(_unpack, xorb[at + 8 : at + 8 + packed], xorb[at + 4], unpacked)
        at += 8 + packed


def _unpack(content: bytes, scheme: int, size: int) -> bytes:
    if scheme not in (0, 1, 2):
        raise HubError(400, f"Unknown compression: {scheme}")
    result = _lz4_frame(content) if scheme else content
    if scheme == 2:  # bytes 0, 4, 8, ..., then 1, 5, 9, ... and so on
        grouped, result, at = result, bytearray(len(result)), 0
        for group in range(4):
            length = len(result[group::4])
            result[group::4] = grouped[at : at + length]
            at += length
    if len(result) != size:
        raise HubError(400, f"A chunk of {len(result)} bytes that says {size}")
    return bytes(result)


def _lz4_frame(frame: bytes) -> bytes:
    """The LZ4 frame format: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md."""
    flags = frame[4]
    at = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)
    result = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        length = size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + length]
        if size == length:
            _lz4_block(block, result)
        else:
            result += block
        at += 4 + length + (4 if flags & 0x10 else 0)
    return bytes(result)


def _lz4_block(block: bytes, result: bytearray) -> None:
    """Literals and copies of what is already there, in turn."""
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        more = 255 if nibble == 15 else 0
        while more == 255:
            more = block[at]
            at += 1
            nibble += more
        return nibble

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        result += block[at : at + literals]
        at += literals
        if at < len(block):
            distance = int.from_bytes(block[at : at + 2], "little")
            at += 2
            copied = length(token & 15) + 4
            source = result[len(result) - distance :][:copied]
            result += (source * (copied // len(source) + 1))[:copied]
