"""Names in internal headers, which arrive as they were sent whatever characters they contain."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.wire import headers, metadata

TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(TEXTS, TEXTS)
def test_alias_and_version_arrive_as_they_were_sent(alias, version):
    """An alias and a version may contain slashes, percent signs, line ends and letters of any alphabet. Their header is
    still valid in a head, and they arrive unchanged."""
    value = headers.named_as(alias, version)
    assert headers.read_as(value) == (alias, version)
    assert value in metadata.encode_headers([(headers.AS, value)])


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_listed_versions_arrive_as_they_were_sent(versions):
    value = headers.listed(versions)
    assert headers.read_listed(value) == versions
    assert value in metadata.encode_headers([(headers.VERSIONS, value)])
