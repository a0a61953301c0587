"""Lives, tombstones and routers as stored in etcd."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.schema.keys import Keys
from mesh.schema.lives import Life, RouterRecord, Tombstone
from mesh.schema.records import ModelRecord

KEYS = Keys("mm/test")
texts = st.text(max_size=20)
numbers = st.integers(0, 2**53)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


@given(st.builds(Life, texts, texts, numbers, numbers))
def test_a_life_comes_back_as_it_was(life):
    assert Life.decode(life.encode()) == life


@given(st.builds(Tombstone, texts, texts, texts, texts))
def test_a_tombstone_comes_back_as_it_was(tombstone):
    assert Tombstone.decode(tombstone.encode()) == tombstone


@given(st.builds(RouterRecord, texts, texts, numbers, st.tuples(numbers, numbers)))
def test_a_router_comes_back_as_it_was(router):
    assert RouterRecord.decode(router.encode()) == router


@pytest.mark.parametrize("kind", [Life, Tombstone, RouterRecord])
@given(
    value=st.binary(max_size=50)
    | JSON.map(lambda data: json.dumps(data).encode())
    | st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("data", "control", "ended", "open", "address", "workers", "protocol"), JSON)
    ).map(lambda data: json.dumps(data).encode())
    | st.just(b'{"data":"a","control":"b","open":1e999}')
    | st.just(b"[" * 100_000)
)
def test_whatever_stands_there_is_read_or_refused_with_one_error(kind, value):
    try:
        kind.decode(value)
    except ValueError:
        pass


@given(pod=names, incarnation=names, model=names)
def test_no_pods_key_is_a_tombstone(pod, incarnation, model):
    """The key of a copy never equals that of a tombstone, whatever the pod's name, and each key can be parsed back."""
    assert KEYS.copy(model, pod) != KEYS.tombstone(model)
    assert KEYS.copy(model, pod) < KEYS.tombstone(model)
    assert KEYS.copy_of(KEYS.copy(model, pod)) == (model, pod)
    assert KEYS.life_of(KEYS.life(pod, incarnation)) == (pod, incarnation)
    start, end = KEYS.presence_range
    assert start <= KEYS.life(pod, incarnation) < end
    assert not start <= KEYS.router(pod) < end


@pytest.mark.parametrize("changed", ["type", "path", "key", "sha256"])
def test_only_the_same_registration_is_allowed_over_a_tombstone(changed):
    record = ModelRecord("onnx", "file:///m", "k", sha256="0" * 64)
    assert Tombstone.of(record).allows(record)
    other = {"type": "onnx", "path": "file:///m", "key": "k", "sha256": "0" * 64, changed: ""}
    assert not Tombstone.of(record).allows(ModelRecord(**other))
