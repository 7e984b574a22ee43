"""A manifest that has changed, or that contradicts itself, is never used."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_dist.checkpoint import manifest as manifests
from qa_dist.checkpoint.manifest import DamagedError, File, Manifest, TensorSpec, damage
from qa_dist.checkpoint.progress import Progress
from qa_dist.checkpoint.state import non_finite
from qa_dist.checkpoint.store import Shards, write_manifest, write_shard
from qa_dist.errors import UserError
from tests.helpers import ROOT, make_manifest, sealed

DIRECTORY = "step_00000020"
SHARD = "state-00000-of-00001.safetensors"
SCHEMA_1 = ROOT / "tests/fixtures/schema_1" / DIRECTORY
ROWS = [
    {"epoch": 1, "step": 14, "train_loss": 4.5, "exact_match": 1.5, "f1": 2.0, "loss": None},
]


def whole(**fields: Any) -> Manifest:
    """A manifest in which every field has a value."""
    progress = Progress(
        step=20,
        updates=19,
        epoch=2,
        batches_done=6,
        loss_sum=25.5,
        loss_count=5,
        skipped_in_a_row=1,
        train_seconds=0.5,
        history=copy.deepcopy(ROWS),
        exported_epoch=1,
        exported_step=14,
    )
    progress.meter.add(2.5, samples=8, tokens=70, padded_tokens=80, flops=1e9, times=(0.5, 0.1))
    digest = "0123456789abcdef" * 4
    given: dict[str, Any] = {
        "epoch": 2,
        "progress": progress,
        "config": {"task": "question_answering", "data": {"train_file": ["é \U0001f600"]}, "train": {"epochs": 2}},
        "data": digest,
        "validation": digest,
        "run_id": "317e920ea12ef95e",
        "loss_scale": {"scale": 65536.0},
        "metrics_bytes": 100,
        "score": 12.5,
        "tensors": {
            f"{kind}/head.bias": TensorSpec(dtype="F32", shape=[2]) for kind in ("weight", "exp_avg", "exp_avg_sq")
        }
        | {"buffer/steps": TensorSpec(dtype="I64", shape=[])},
        "files": {SHARD: File(10, digest, (digest,)), "config.json": File(2, digest)},
        "sections": {"adapter": {"base": "x"}},
    }
    return make_manifest(20, world_size=2).model_copy(update=given | fields)


def parse(content: bytes, name: str = DIRECTORY) -> Manifest:
    return Manifest.parse(content, name)


def test_what_is_written_is_read():
    assert parse(whole().to_json().encode()) == whole()


def test_every_flipped_bit_is_noticed():
    """Each bit of the file, one after the other, the digest's own included."""
    content = whole().to_json().encode()
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(DamagedError):
                parse(bytes(flipped))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_cut_and_shuffled_manifests_are_noticed(data: Any):
    content = whole().to_json().encode()
    first, second = sorted(data.draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=2, unique=True)))
    with pytest.raises(DamagedError):
        parse(content[:first] + content[second:])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a manifest, except for those of the settings and of later versions."""
    if path and path[0] in ("config", "sections", "schema_version", "digest"):
        return []
    if isinstance(value, dict):
        return [path, *(place for key, inner in value.items() for place in leaves(inner, (*path, key)))]
    if isinstance(value, list):
        return [path, *(place for i, inner in enumerate(value) for place in leaves(inner, (*path, i)))]
    return [path]


HOSTILE: list[Any] = [True, "35", -1, 10**30, 1.5, [], {}, [[]], {"a": None}, "\ud800", "x" * 10_000, "1e999"]
MEANINGLESS = {
    # replaced by these, the field still has a value that it may have
    ("score",): (1.5, -1, 10**30),
    ("loss_scale",): ({},),
    ("tensors",): ({},),
    ("optimizer", "fused"): (True,),
    ("files", SHARD, "chunks"): ([],),
    ("data",): ("35", "1e999"),
    ("validation",): ("35", "1e999"),
    ("run_id",): ("35", "1e999"),
    ("progress", "loss_sum"): (1.5, -1, 10**30),
    ("progress", "train_seconds"): (1.5, 10**30),
    ("progress", "meter"): ({},),
    ("progress", "meter", "losses"): ([],),
}


def may_be(path: tuple[Any, ...], value: Any) -> bool:
    """Return True if `value` cannot be told from a good one in this place."""
    if path in MEANINGLESS:
        return any(type(value) is type(other) and value == other for other in MEANINGLESS[path])
    texts = path[0] == "launch" and path[1:] in (("strategy",), ("precision",), ("device",))
    row = path[:2] == ("progress", "history") and len(path) == 4 and path[-1] not in ("epoch", "step")
    number = path[-1] in ("flops", "seconds", "data_seconds") or path[:3] == ("progress", "meter", "losses")
    number |= path[:1] == ("loss_scale",) and len(path) == 2
    if texts:
        return value in ("35", "1e999")
    if row:
        return isinstance(value, bool | int | float | str) and value != "\ud800"
    if number:
        signed = path[:1] == ("loss_scale",) or "losses" in path
        return value is not True and isinstance(value, int | float) and (value >= 0 or signed)
    return False


def test_every_field_has_a_type_and_a_range():
    """A wrong value in any place, under a digest that is right, is a damaged manifest, never another error."""
    good = json.loads(whole().to_json())
    places = [place for place in leaves(good) if place]
    assert len(places) > 70
    for place in places:
        for value in HOSTILE:
            changed = copy.deepcopy(good)
            owner = changed
            for key in place[:-1]:
                owner = owner[key]
            if type(owner[place[-1]]) is type(value) and owner[place[-1]] == value:
                continue
            owner[place[-1]] = value
            if may_be(place, value):
                parse(sealed(changed))
                continue
            with pytest.raises(DamagedError):
                parse(sealed(changed))
                pytest.fail(f"{place} may be {value!r}")


def test_fields_that_are_missing_or_unknown():
    good = json.loads(whole().to_json())
    for name in ("step", "epoch", "launch", "optimizer", "config", "data", "progress", "score", "tensors", "files"):
        with pytest.raises(DamagedError, match=name):
            parse(sealed({key: value for key, value in good.items() if key != name}))
    with pytest.raises(DamagedError, match="later"):
        parse(sealed(good | {"later": 1}))
    parse(sealed(good | {"sections": {"later": {"anything": [1, 2]}}}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"step": 21}, "step and epoch are not those of progress"),
        ({"progress": {"step": 19}}, "step and epoch are not those of progress"),
        ({"progress": {"batches_done": 5}}, "20 steps are not 14 before the epoch and 5 of its batches"),
        ({"progress": {"updates": 21}}, "21 updates in 20 steps"),
        ({"progress": {"loss_count": 7}}, "7 losses of 6 batches"),
        ({"progress": {"exported_step": 21}}, "exported epoch 1 at step 21"),
        ({"progress": {"exported_step": None}}, "exported epoch 1 at step None"),
        ({"epoch": 3, "progress": {"epoch": 3}}, "in epoch 3, and its history ends with epoch 1"),
        ({"progress": {"history": []}}, "in epoch 2, and its history ends with epoch 0"),
        ({"progress": {"history": [*ROWS, *ROWS]}}, "are not in order"),
        ({"progress": {"history": [{"epoch": 1, "step": 14, "f1": [1]}]}}, "f1 is not a number"),
        ({"progress": {"history": [{"epoch": 1}]}}, "step is not a count"),
        ({"tensors": {"weight/a": {"dtype": "F16", "shape": [2]}}}, "'weight/a' is F16, and has to be F32"),
        ({"tensors": {"exp_avg/a": {"dtype": "F32", "shape": [2]}}}, "'exp_avg/a' has not the shape of its weight"),
        ({"tensors": {"weight/a": {"dtype": "F32", "shape": [2**30, 2**30]}}}, "is not a tensor of a model"),
        ({"tensors": {"other/a": {"dtype": "F32", "shape": [2]}}}, "is not a tensor of a model"),
        ({"files": {}}, "names no files"),
        ({"files": {"a.json": {"size": 5, "sha256": "0" * 64, "chunks": ["0" * 64] * 2}}}, "2 hashes of chunks"),
        ({"schema_version": 0}, "not one of qa_dist"),
        ({"schema_version": -1}, "not one of qa_dist"),
        ({"schema_version": True}, "not one of qa_dist"),
        ({"schema_version": "2"}, "not one of qa_dist"),
        ({"schema_version": None}, "not one of qa_dist"),
    ],
)
def test_contradictions(change: dict[str, Any], expected: str):
    values = json.loads(whole().to_json())
    for key, value in change.items():
        values[key] = values[key] | value if key == "progress" else value
    with pytest.raises(DamagedError) as raised:
        parse(sealed(values))
    assert expected in str(raised.value).replace("\\'", "'")


def test_a_newer_version_is_no_damage_but_a_flipped_version_is():
    values = json.loads(whole().to_json())
    with pytest.raises(UserError, match="written by a newer version of qa_dist"):
        parse(sealed(values | {"schema_version": 3, "anything": "else"}))
    with pytest.raises(DamagedError, match="has changed since it was written"):
        parse(whole().to_json().replace('"schema_version": 2', '"schema_version": 3').encode())


def nested(depth: int) -> bytes:
    values = json.loads(whole().to_json())
    inner: Any = 1
    for _ in range(depth):
        inner = {"a": inner}
    return sealed(values | {"config": inner})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: b"[" + b"[]," * 5_000_000 + b"[]]", "more entries than a manifest can have"),
        (lambda: b"[" + b"0," * 7_000_000 + b"0]", "more entries than a manifest can have"),
        (lambda: b" " * (manifests.MAX_BYTES + 1), "more than 16,777,216 bytes"),
        (lambda: b"[" * 100_000, "cannot be read"),
        (lambda: nested(40), "cannot be read"),
        (lambda: nested(900), "cannot be read"),
        (lambda: b"null", "cannot be read"),
        (lambda: b'"35"', "cannot be read"),
        (lambda: b"\xff{}", "cannot be read"),
        (lambda: sealed(json.loads(whole().to_json())).replace(b"12.5", b"NaN"), "NaN is not JSON"),
        (lambda: sealed(json.loads(whole().to_json())).replace(b"12.5", b"1e999"), "has changed"),
        (lambda: b'{"schema_version": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_bombs_cost_little(make: Callable[[], bytes], expected: str):
    content = make()
    before = time.process_time()
    with pytest.raises(DamagedError, match=expected):
        parse(content)
    assert time.process_time() - before < 10  # 30 MB of empty lists took 22 s


def test_a_manifest_of_schema_1_is_read():
    manifest = Manifest.read(SCHEMA_1)
    assert damage(SCHEMA_1, manifest) is None
    assert manifest.schema_version == 1
    assert str(manifest.launch) == "DeepSpeed ZeRO-2, float32, 2 processes on cpu"
    assert not manifest.optimizer.fused
    assert (manifest.run_id, manifest.metrics_bytes) != ("", 0)
    assert (manifest.progress.step, manifest.progress.epoch, manifest.progress.batches_done) == (20, 2, 6)
    assert parse(manifest.to_json().encode()).model_copy(update={"schema_version": 1}) == manifest


def test_the_fields_of_schema_1_are_checked_too():
    """It has no digest, so only what is of a wrong type, out of range or contradictory can be noticed."""
    good = json.loads((SCHEMA_1 / "manifest.json").read_text())
    for name, value in (("step", None), ("epoch", "35"), ("world_size", True), ("engine", 3), ("progress", "x")):
        with pytest.raises(DamagedError):
            parse(json.dumps(good | {name: value}).encode())
    for name, value in (("step", 19), ("batches_done", 7), ("history", "x"), ("loss_sum", None), ("epoch", 10**30)):
        with pytest.raises(DamagedError):
            parse(json.dumps(good | {"progress": good["progress"] | {name: value}}).encode())


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_damaged_part_of_a_shard_is_named(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifests, "CHUNK_BYTES", 1000)
    name = "state-00000-of-00001.safetensors"
    file = write_shard(tmp_path, name, {"weight/a": torch.arange(3000.0)})
    assert len(file.chunks) == -(-file.size // 1000) > 11
    write_manifest(tmp_path, make_manifest(3, files={name: file}))
    manifest = Manifest.read(tmp_path)
    assert damage(tmp_path, manifest) is None
    content = bytearray((tmp_path / name).read_bytes())
    content[place * 1000 + random.randrange(1000)] ^= 1
    (tmp_path / name).write_bytes(content)
    expected = f"has changed since it was written (1 of {len(file.chunks)} chunks, from byte {place * 1000:,} on)"
    assert expected in str(damage(tmp_path, manifest))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shards_of_another_precision_are_refused(dtype: torch.dtype, tmp_path: Path):
    name = "state-00000-of-00001.safetensors"
    file = write_shard(tmp_path, name, {"weight/a": torch.zeros(4, dtype=dtype)})
    spec = TensorSpec(dtype="F32", shape=[4])
    with pytest.raises(DamagedError, match=r"weight/a in state-00000-of-00001\.safetensors is .* instead of F32"):
        Shards(tmp_path, make_manifest(3, files={name: file}, tensors={"weight/a": spec}))


def test_what_is_not_finite_is_found():
    good = {"large": torch.full((8,), 3e38), "ints": torch.ones(3, dtype=torch.int64), "empty": torch.empty(0)}
    assert non_finite(good) == []
    for value in (float("nan"), float("inf"), float("-inf")):
        assert non_finite(good | {"bad": torch.tensor([1.0, value])}) == ["bad"]
    assert non_finite({"both": torch.tensor([float("inf"), float("-inf")])}) == ["both"]
