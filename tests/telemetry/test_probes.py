import asyncio
import contextlib

import aiohttp
import pytest

from mesh.telemetry import metrics, probes


@contextlib.asynccontextmanager
async def served(*, ready=lambda: None, live=lambda: None, give=lambda: b""):
    server = probes.Probes(("127.0.0.1", 0), ready, live, give)
    port = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
    finally:
        await server.close()


@pytest.mark.parametrize("path", ["/ready", "/ready/", "/live", "/live/"])
async def test_yes_is_200(path):
    async with served() as session, session.get(path) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("path", ["/ready", "/live"])
async def test_no_is_503_with_the_reason(path):
    async with served(ready=lambda: "no pods yet", live=lambda: "no pods yet") as session, session.get(path) as answer:
        assert (answer.status, await answer.text()) == (503, "no pods yet\n")


async def test_a_question_that_raises_is_a_no():
    def broken():
        raise KeyError("x")

    async with served(ready=broken) as session, session.get("/ready") as answer:
        assert (answer.status, await answer.text()) == (
            503,
            "the check failed; the log of this process has the cause\n",
        )


async def test_metrics_may_be_gathered_from_elsewhere():
    async def give():
        await asyncio.sleep(0)
        return b"x 1\n"

    async with served(give=give) as session, session.get("/metrics") as answer:
        assert (answer.status, await answer.read()) == (200, b"x 1\n")
        assert answer.headers["content-type"] == metrics.CONTENT_TYPE


async def test_metrics_that_do_not_come_are_given_up(monkeypatch):
    monkeypatch.setattr(probes, "_METRICS_TIMEOUT", 0.01)
    async with served(give=lambda: asyncio.Event().wait()) as session, session.get("/metrics") as answer:
        assert answer.status == 503


async def test_a_taken_port_is_an_error():
    first = probes.Probes(("127.0.0.1", 0), lambda: None, lambda: None, lambda: b"")
    port = await first.start()
    with pytest.raises(OSError, match=str(port)):
        await probes.Probes(("127.0.0.1", port), lambda: None, lambda: None, lambda: b"").start()
    await first.close()
    await first.close()
