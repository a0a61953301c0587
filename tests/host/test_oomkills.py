"""The number of kills for memory by the kernel."""

from pathlib import Path

from mesh.host import oomkills as tally


def test_the_kernels_count_is_read(tmp_path: Path) -> None:
    """The kernel's count of kills is found among others; without one the result is -1."""
    vmstat = tmp_path / "vmstat"
    assert tally.oom_kills(vmstat) == -1
    vmstat.write_text("nr_free_pages 5\noom_kill 12\nzswpin 0\n")
    assert tally.oom_kills(vmstat) == 12
    vmstat.write_text("nr_free_pages 5\n")
    assert tally.oom_kills(vmstat) == -1
