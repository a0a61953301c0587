"""Waiting for etcd at the start."""

import pytest
from structlog.testing import capture_logs

from mesh.etcd import EtcdClosed, EtcdDenied, EtcdError, EtcdUnavailable, Patience


class Work:
    """Work that fails once with each of the given errors, then returns 7."""

    def __init__(self, patience: Patience, *errors: EtcdError) -> None:
        self.errors = list(errors)
        self.patience = patience
        self.whys: list[str] = []

    async def __call__(self) -> int:
        self.whys.append(self.patience.why)
        if self.errors:
            raise self.errors.pop(0)
        return 7


async def test_it_is_done_as_soon_as_etcd_is_there() -> None:
    """The work is done as soon as etcd is available. Until then the reason for waiting can be read at any time, and is
    logged once."""
    patience = Patience(pause=0.0)
    work = Work(patience, *(EtcdUnavailable(f"no {number}") for number in range(3)))
    with capture_logs() as lines:
        assert await patience.until_done(work) == 7
    assert work.whys == ["", *(f"etcd is unavailable: no {number}" for number in range(3))]
    assert patience.why == ""
    assert [(line["event"], line.get("why")) for line in lines] == [
        ("waiting for etcd", "no 0"),
        ("etcd answers", None),
    ]


async def test_the_log_is_reminded() -> None:
    """During a long wait the log repeats the latest reason, for readers who come later."""
    patience = Patience(pause=0.0, remind=0.0)
    with capture_logs() as lines:
        await patience.until_done(Work(patience, *(EtcdUnavailable(f"no {number}") for number in range(3))))
    assert [line["why"] for line in lines if "why" in line] == ["no 0", "no 1", "no 2"]


async def test_nothing_is_said_where_nothing_was_waited_for() -> None:
    patience = Patience()
    with capture_logs() as lines:
        assert await patience.until_done(Work(patience)) == 7
    assert lines == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        pytest.param(EtcdDenied("get at http://x: authentication failed"), "check the user, password", id="denied"),
        pytest.param(EtcdClosed("this client is closed"), "closed", id="closed"),
        pytest.param(EtcdError("nonsense"), "nonsense", id="refused"),
    ],
)
async def test_what_waiting_does_not_heal_is_raised(error: EtcdError, says: str) -> None:
    patience = Patience(pause=0.0)
    with pytest.raises(type(error), match=says):
        await patience.until_done(Work(patience, error))
