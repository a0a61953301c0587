"""Tokens of copies: how they are written, and which copy may answer for which other copy."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.schema import copytoken

INCARNATIONS = st.text("0123456789abcdef", min_size=1, max_size=16)
NUMBERS = st.integers(0, 2**63 - 1)


@given(INCARNATIONS, NUMBERS, NUMBERS)
def test_what_is_written_is_read(incarnation: str, revision: int, generation: int) -> None:
    token = copytoken.make(incarnation, revision, generation)
    assert copytoken.read(token) == (incarnation.encode(), revision, generation)


def test_before_a_reload_it_is_what_earlier_versions_write() -> None:
    assert copytoken.make("abc", 7) == b"abc.7"
    assert copytoken.make("abc", 7, 2) == b"abc.7.2"


@given(st.binary(max_size=40))
def test_whatever_comes_is_read_or_is_none(token: bytes) -> None:
    """A token that cannot be read supersedes no copy and is superseded by none."""
    if copytoken.read(token) is None:
        assert not copytoken.supersedes(token, b"a.1")
        assert not copytoken.supersedes(b"a.1.9", token)


@given(INCARNATIONS, INCARNATIONS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_only_a_newer_generation_of_the_same_copy_supersedes(
    one: str, other: str, revision: int, another: int, generation: int, later: int
) -> None:
    held, meant = copytoken.make(one, revision, later), copytoken.make(other, another, generation)
    assert copytoken.supersedes(held, meant) == ((one, revision) == (other, another) and later > generation)
    assert copytoken.supersedes(copytoken.make(one, revision, later), copytoken.make(one, revision, generation)) == (
        later > generation
    )
