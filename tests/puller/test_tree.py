"""Names of files in a store: every file is written below the model's folder, or is skipped."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.errors import PullError, PullErrorKind
from puller.tree import fault, lay_out

NAMES = st.text(st.sampled_from("ab./\\\0\n~%é "), max_size=12) | st.text(max_size=40)


@given(NAMES)
def test_no_name_leads_out(name):
    """Any name in a store gives either a path of plain elements or a reason to skip the file."""
    if fault(name):
        return
    path = PurePosixPath(name)
    assert not path.is_absolute()
    assert str(path) == name
    assert all(part not in ("", ".", "..") and "/" not in part and "\\" not in part for part in path.parts)


@given(st.lists(NAMES, max_size=8), st.lists(NAMES, max_size=3))
def test_a_tree_holds_every_file_once_and_every_folder_before_what_is_in_it(names, folders):
    """Each file of a tree gets a path from its name, or is skipped. No path is both a file and a folder, and parents
    come first."""
    try:
        layout = lay_out(names, folders, "x")
    except PullError as error:
        assert error.kind in (PullErrorKind.BAD_REQUEST, PullErrorKind.EMPTY)
        if error.kind is PullErrorKind.EMPTY:
            usable = {name for name in names if not fault(name)}
            assert all(
                any(other.startswith(f"{name}/") for other in [*names, *folders]) or name in folders for name in usable
            )
        return
    paths, made = [path for _, path in layout.files], layout.folders
    assert [names[number] for number, _ in layout.files] == [str(path) for path in paths]
    assert len(layout.skipped) >= len(names) - len(paths)
    assert len(set(paths)) == len(paths)
    assert not set(paths) & set(made)
    there = {PurePosixPath()}
    for folder in made:
        assert folder.parent in there
        there.add(folder)
    assert all(path.parent in there for path in paths)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["a", "a/b"], ["a/b"]),
        (["a/b", "a"], ["a/b"]),
        (["m", "x//y", "/z", "../up", "b\\c", "n\nl"], ["m"]),
        (["m.onnx", "._m.onnx", ".nfs000001", "sub/._x", "lost+found/1"], ["m.onnx"]),
        ([".config", ".gitattributes", "a.nfs1"], [".config", ".gitattributes", "a.nfs1"]),
    ],
)
def test_what_cannot_be_of_a_model_is_skipped(names, kept):
    """Files that cannot belong to a model are skipped and reported. All others are kept."""
    layout = lay_out(names, [], "x")
    assert [str(path) for _, path in layout.files] == kept
    assert len(layout.skipped) == len(names) - len(kept)


def test_what_no_tree_can_hold():
    """A tree with the same name twice is refused. So is a tree whose files are all skipped; its error lists a limited
    number of them."""
    with pytest.raises(PullError) as caught:
        lay_out(["a", "a"], [], "x")
    assert caught.value.kind is PullErrorKind.BAD_REQUEST
    with pytest.raises(PullError, match=r"\._a") as caught:
        lay_out([f"._a{number}" for number in range(10_000)], [], "x")
    assert caught.value.kind is PullErrorKind.EMPTY
    assert len(caught.value.text) < 2000
