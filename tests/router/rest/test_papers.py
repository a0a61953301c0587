"""Memory files that hold one message after another, without showing a reader bytes of another message."""

import gc
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.rest import papers
from tests.support.examples import examples

UNIT = papers._UNIT


class Pair:
    """Both ends of an exchange, in one process: what the worker does, and the converter's requests."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kept = papers.Kept()
        self.requests = papers.Requests(self.theirs)

    def exchange(self, sent, answered):
        """Sends a body and answers with another. Returns what the two readers see."""
        request, answer = self.kept.take(len(sent)), self.kept.take(None)
        for _ in papers.sending(self.ours, {"n": len(sent)}, [sent[:5], sent[5:]], request=request, answer=answer):
            pass
        arrived = self.requests.receive()
        seen = arrived.head, bytes(arrived.body)
        del arrived
        self.requests.reply({"m": len(answered)}, [answered])
        paper = papers.receive(self.ours, answer, self.kept.put)
        self.kept.put(request)
        return seen, paper

    def close(self):
        self.ours.close()
        self.theirs.close()
        self.kept.clear()
        self.requests.trim()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def test_a_reader_sees_nothing_of_the_messages_before(pair):
    """After files have held long secrets, the reader of a short message sees only the short message, in both
    directions."""
    secret = b"secret" * 500_000
    _, paper = pair.exchange(secret, secret)
    paper.close()
    sizes = pair.kept.sizes
    (head, body), paper = pair.exchange(b"ab", b"")
    assert pair.kept.sizes == sizes[:1], "the same files, one of which is still in use"
    assert (head, body) == ({"n": 2}, b"ab")
    assert (paper.head, bytes(paper.body)) == ({"m": 0}, b"")
    assert paper.body.nbytes == 0
    assert secret[-5:] in bytes(memoryview(paper.body.obj)), "it is in the file, behind the message"


@given(
    st.lists(
        st.tuples(st.integers(0, 3 * UNIT), st.integers(0, 3 * UNIT), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=examples(40), deadline=None)
def test_messages_are_what_was_sent_and_stay_so_while_they_are_used(steps):
    """Whatever sizes follow each other, each message arrives as it was sent, and no later message changes a message
    that is still in use."""
    pair = Pair()
    held = []
    for number, (sent, answered, holds) in enumerate(steps):
        request, reply = bytes([number]) * sent, bytes([100 + number]) * answered
        (head, body), paper = pair.exchange(request, reply)
        assert (head, body) == ({"n": sent}, request)
        assert (paper.head, bytes(paper.body)) == ({"m": answered}, reply)
        if holds:
            held.append((paper.body[1:], reply[1:]))
        del paper
        assert len(pair.kept.sizes) <= papers.FILES
        assert all(view == expected for view, expected in held)
    pair.close()


def test_an_exchange_takes_the_files_of_the_one_before(pair):
    for _ in range(3):
        pair.exchange(b"a" * UNIT, b"b" * 3 * UNIT)[1].close()
        assert sorted(pair.kept.sizes) == [2 * UNIT, 4 * UNIT], "with the head, each takes one unit more"


@pytest.mark.parametrize(
    ("sizes", "wanted", "taken"),
    [
        ([1, 3, 2], 2, 2),
        ([1, 3, 2], 3, 3),
        ([1, 3, 2], 4, 3),
        ([1, 3, 2], 0, 1),
        ([1, 3, 2], None, 3),
        ([], 1, 0),
    ],
)
def test_the_smallest_file_that_is_large_enough_is_taken(sizes, wanted, taken):
    kept = papers.Kept()
    for number, size in enumerate(sizes):
        file = papers.File.create(number)
        list(file._enlarging(size * UNIT))
        kept.put(file)
    file = kept.take(None if wanted is None else wanted * UNIT)
    assert file.size == taken * UNIT
    assert sorted(kept.sizes) == sorted(size * UNIT for size in sizes if size != taken)
    file.close()
    kept.clear()


def test_files_are_kept_within_bounds(monkeypatch):
    """Files beyond the number or the bytes are closed, the least recently used ones first. A file that is too large
    itself removes no other."""
    monkeypatch.setattr(papers, "BYTES", 4 * UNIT)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    kept = papers.Kept()

    def put(units):
        file = papers.File.create(0)
        list(file._enlarging(units * UNIT))
        file.mapping(0)
        kept.put(file)
        return [size // UNIT for size in kept.sizes]

    assert put(1) == [1]
    assert put(1) == [1, 1]
    assert put(2) == [2, 1, 1]
    assert put(1) == [1, 2, 1]
    assert put(2) == [2, 1], "4 units at most"
    assert put(5) == [2, 1]
    assert put(1) == [1, 2, 1]
    assert put(1) == [1, 1, 2], "3 files at most"
    kept.clear()
    assert kept.sizes == []
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before  # fewer if something of an earlier test was closed


def test_lengths_that_the_file_does_not_have_are_refused(pair):
    file = papers.File.create(0)
    with pytest.raises(papers.Gone, match="announced 300000 bytes in a file of 0"):
        papers.Paper(file, 0, 300_000, pair.kept.put)
    list(file.writing([b"no json"]))
    with pytest.raises(papers.Gone, match="not JSON"):
        papers.Paper(file, 7, 0, pair.kept.put)
    assert pair.kept.sizes == [], "a file is only used again if its message could be read"
    file.close()


def test_a_file_cannot_become_shorter_than_its_mappings():
    file = papers.File.create(0)
    list(file.writing([b"abc"]))
    with pytest.raises(PermissionError):
        os.ftruncate(file.descriptor, 1)
    file.close()


def test_without_memory_a_write_fails_with_an_error(monkeypatch):
    """If no memory can be reserved for a message, the write raises OSError. A write to mapped memory without the
    reservation would kill the process."""

    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    file = papers.File.create(0)
    with pytest.raises(OSError, match="No space"):
        list(file.writing([b"abc"]))
    file.close()
