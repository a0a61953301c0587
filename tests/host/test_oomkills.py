"""The kernel's count of processes that it killed for lack of memory."""

from pathlib import Path

from mesh.host import oomkills as tally


def test_the_kernels_count_is_read(tmp_path: Path) -> None:
    """If the file or the count is missing, the result is -1."""
    vmstat = tmp_path / "vmstat"
    assert tally.oom_kills(vmstat) == -1
    vmstat.write_text("nr_free_pages 5\noom_kill 12\nzswpin 0\n")
    assert tally.oom_kills(vmstat) == 12
    vmstat.write_text("nr_free_pages 5\n")
    assert tally.oom_kills(vmstat) == -1
