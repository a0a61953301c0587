"""The file into which bytes are written: from several connections, in any order, with gaps, with too many or too few
bytes, or after its end."""

import hashlib
import itertools
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.errors import PullError, PullErrorKind
from puller.limits import PullLimits
from puller.sink import Sink, Stopped


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that makes sinks in separate folders. They are closed at the end."""
    made = []

    def make(**options):
        path = tmp_path_factory.mktemp("sink") / "file"
        options.setdefault("admit", lambda size: None)
        sink = Sink(path, shown="s3://b/k", limits=options.pop("limits", None) or PullLimits(), **options)
        made.append(sink)
        return sink, path

    yield make
    for sink in made:
        sink.close()


@st.composite
def pieces(draw):
    """Generates bytes, cut into pieces in some order."""
    content = draw(st.binary(max_size=200))
    cuts = sorted(draw(st.sets(st.integers(0, len(content)), max_size=8)) | {0, len(content)})
    return content, draw(st.permutations(list(itertools.pairwise(cuts))))


@given(pieces())
def test_pieces_in_any_order_make_the_file(make, given):
    """Written and missing ranges always add up to the file, and the digest is that of the complete file."""
    content, parts = given
    sink, path = make(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    for start, end in parts:
        assert any(low <= start and end <= high for low, high in sink.missing())
        sink.write(content[start:end], start)
        assert sink.written + sum(high - low for low, high in sink.missing()) == len(content)
    assert sink.missing() == []
    assert sink.finish() == len(content)
    assert path.read_bytes() == content
    assert sink.digest("sha256") == hashlib.sha256(content).hexdigest()
    assert sink.digest("md5") == ""


def test_what_is_not_all_there_is_an_error(make):
    """A gap or a premature end is an error, whether or not the size was announced."""
    sink, _ = make(size=4)
    sink.write(b"ab", 0)
    with pytest.raises(PullError, match="2 of 4 bytes") as caught:
        sink.finish()
    assert caught.value.kind is PullErrorKind.INTEGRITY
    sink, _ = make()
    sink.write(b"cd", 2)
    with pytest.raises(PullError, match="ended before"):
        sink.finish()


def test_more_than_was_announced_is_an_error_and_not_written(make):
    """More bytes than announced are an error and are not written, so a store that keeps sending cannot fill the
    disk."""
    sink, path = make(size=2)
    with pytest.raises(PullError, match="sent more"):
        sink.write(b"abc", 0)
    assert path.read_bytes() == b""


def test_admission_is_asked_as_it_grows(make):
    """Room is reserved once at the start if the size is known, otherwise as bytes arrive."""
    asked = []
    sink, _ = make(admit=asked.append)
    sink.write(b"ab", 0)
    sink.write(b"cd", 2)
    sink.write(b"ab", 0)
    assert asked == [2, 4]
    make(admit=asked.append, size=9)
    assert asked == [2, 4, 9]

    def refuse(size):
        raise PullError(PullErrorKind.TOO_LARGE, "no")

    with pytest.raises(PullError, match="no"):
        make(admit=refuse, size=1)


def test_a_wrong_digest_names_both(make):
    expected = hashlib.md5(b"right", usedforsecurity=False).hexdigest()
    sink, _ = make(md5=expected)
    sink.write(b"wrong", 0)
    with pytest.raises(PullError) as caught:
        sink.finish()
    assert caught.value.kind is PullErrorKind.CHECKSUM
    assert expected in caught.value.text
    assert hashlib.md5(b"wrong", usedforsecurity=False).hexdigest() in caught.value.text


def test_what_a_store_says_later_must_agree(make):
    """A size that differs from the store's earlier answer means that the file has changed. A different digest means
    that it is another file."""
    sink, _ = make(size=4, sha256="a" * 64)
    sink.expect(size=4, sha256="A" * 64)
    with pytest.raises(PullError) as caught:
        sink.expect(size=5)
    assert caught.value.kind is PullErrorKind.CHANGED
    with pytest.raises(PullError) as caught:
        sink.expect(sha256="b" * 64)
    assert caught.value.kind is PullErrorKind.CHECKSUM


def test_restarted_it_is_empty(make):
    """A sink that starts over is empty, and so are its digests."""
    sink, path = make()
    sink.compute("sha256")
    sink.write(b"old and long", 0)
    sink.restart()
    assert sink.written == 0
    sink.write(b"new", 0)
    assert sink.finish() == 3
    assert path.read_bytes() == b"new"
    assert sink.digest("sha256") == hashlib.sha256(b"new").hexdigest()


def test_closed_it_takes_nothing_but_ends_what_has_begun(make):
    """A closed sink accepts no writes. A write that has already begun keeps its file descriptor until it is done."""
    sink, path = make(size=3)
    with sink.hold() as descriptor:
        sink.close()
        assert sink.stopped
        with pytest.raises(Stopped):
            sink.write(b"x", 0)
        os.pwrite(descriptor, b"abc", 0)
    assert path.read_bytes() == b"abc"
    with pytest.raises(Stopped), sink.hold():
        pass


def test_a_pause_for_the_bandwidth_ends_with_the_pull(make):
    """A thread that waits for bandwidth is released when its bytes are no longer wanted."""
    sink, _ = make(limits=PullLimits(bytes_per_second=1))
    ended = threading.Event()

    def pull():
        with pytest.raises(Stopped):
            sink.pace(1000)
        ended.set()

    thread = threading.Thread(target=pull)
    thread.start()
    sink.close()
    thread.join(10)
    assert ended.is_set()
