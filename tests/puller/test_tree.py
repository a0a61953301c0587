"""Names of a store's files: every one lands below the model's folder, or the tree is refused."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.errors import PullError, PullErrorKind
from puller.tree import lay_out, safe

NAMES = st.text(st.sampled_from("ab./\\\0\n~%é "), max_size=12) | st.text(max_size=40)


@given(NAMES)
def test_no_name_leads_out(name):
    """Whatever a store calls a file, what comes of it is a path of plain elements, or a refusal that names it."""
    try:
        path = safe(name, "s3://bucket/model")
    except PullError as error:
        assert error.kind is PullErrorKind.BAD_REQUEST
        assert "s3://bucket/model" in error.text
        return
    assert not path.is_absolute()
    assert str(path) == name
    assert all(part not in ("", ".", "..") and "/" not in part and "\\" not in part for part in path.parts)


@given(st.lists(NAMES, max_size=8), st.lists(NAMES, max_size=3))
def test_a_tree_holds_every_file_once_and_every_folder_before_what_is_in_it(names, folders):
    """As many paths as files, no two alike, none of them also a folder; folders stand parents first."""
    try:
        paths, made = lay_out(names, folders, "x")
    except PullError as error:
        assert error.kind is PullErrorKind.BAD_REQUEST
        return
    assert [str(path) for path in paths] == names
    assert len(set(paths)) == len(paths)
    assert not set(paths) & set(made)
    there = {PurePosixPath()}
    for folder in made:
        assert folder.parent in there
        there.add(folder)
    assert all(path.parent in there for path in paths)


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["a", "a"]])
def test_what_no_tree_can_hold(names):
    """A file where a folder must be, and the same name twice."""
    with pytest.raises(PullError) as caught:
        lay_out(names, [], "x")
    assert caught.value.kind is PullErrorKind.BAD_REQUEST
