"""The list of the most recently used models, in a real etcd."""

import pytest

from mesh.schema.records import ModelRecord
from router.leader import recency
from router.leader.recency import Recency


@pytest.fixture
def clock():
    now = [1_000_000.0]

    def read() -> float:
        return now[0]

    read.now = now
    return read


async def test_another_leader_finds_what_was_noted(etcd, keys, clock):
    """The next leader finds the recorded models, latest use first, with the time since each use."""
    first = Recency(etcd, keys, clock=clock)
    await first.load()
    first.note({"a": 10_000, "b": 5_000, "c/ü": 20_000})
    first.note({"a": 15_000})
    await first.save()
    clock.now[0] += 100
    second = Recency(etcd, keys, clock=clock)
    await second.load()
    assert second.newest(2, without=lambda model: False) == [("b", 105_000), ("a", 110_000)]
    assert second.newest(9, without=lambda model: model in ("a", "b")) == [("c/ü", 120_000)]


async def test_it_is_bounded_and_pieces_go_that_are_not_needed(etcd, keys, clock, monkeypatch):
    monkeypatch.setattr(recency, "MOST", 25)
    monkeypatch.setattr(recency, "PIECE", 10)
    noted = Recency(etcd, keys, clock=clock)
    noted.note({f"m{number}": number * 1000 for number in range(40)})
    await noted.save()
    page = await etcd.page(keys.recent, keys.recent + b"\xff", limit=100)
    assert len(page.kvs) == 3
    noted.forget([f"m{number}" for number in range(12)])
    await noted.save()
    page = await etcd.page(keys.recent, keys.recent + b"\xff", limit=100)
    assert len(page.kvs) == 2
    again = Recency(etcd, keys, clock=clock)
    await again.load()
    assert [model for model, _ in again.newest(99, without=lambda model: False)] == [f"m{n}" for n in range(12, 25)]


async def test_without_a_list_the_last_uses_come_from_the_records(etcd, keys, clock):
    """If there is no list, as on ModelMesh's data, the last uses are taken from the records. A record that cannot
    be read does no harm."""
    await etcd.put(keys.model("old"), ModelRecord(type="t", last_used_ms=900_000_000).encode())
    await etcd.put(keys.model("new"), ModelRecord(type="t", last_used_ms=990_000_000).encode())
    await etcd.put(keys.model("never"), ModelRecord(type="t").encode())
    await etcd.put(keys.model("broken"), b"{")
    found = Recency(etcd, keys, clock=clock)
    await found.load()
    assert [model for model, _ in found.newest(9, without=lambda model: False)] == ["new", "old"]


@pytest.mark.parametrize("value", [b"", b"garbage", recency._pack({"a": "b"}), b"x\x9c\x03\x00"])
async def test_a_piece_that_is_not_ours_is_left_out(etcd, keys, clock, value):
    noted = Recency(etcd, keys, clock=clock)
    noted.note({"a": 1000})
    await noted.save()
    await etcd.put(keys.recent_piece(7), value)
    again = Recency(etcd, keys, clock=clock)
    await again.load()
    assert "a" in again
