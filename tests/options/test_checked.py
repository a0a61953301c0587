"""Parsing of option values, and the option that an error names."""

import pytest
import typer

from mesh.options import checked


def test_the_total_for_bodies_holds_messages_of_the_largest_size():
    """With `auto`, the memory for bodies has room for at least four messages of the largest size. A value is refused if
    one message does not fit into the half that is reserved for large requests."""
    assert checked.body_bytes("auto", least=100 << 20, max_message="16MiB") == 100 << 20
    assert checked.body_bytes("auto", least=100 << 20, max_message="64MiB") == 256 << 20
    assert checked.body_bytes("3MiB", least=1, max_message="1MiB") == 3 << 20
    with pytest.raises(typer.BadParameter, match=r"1\.0 MiB is too small for .*: give 2\.0 MiB or more") as error:
        checked.body_bytes("1MiB", least=1, max_message="1MiB")
    assert error.value.param_hint == "--max-body-bytes"
