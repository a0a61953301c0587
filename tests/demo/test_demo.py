"""The demo: it finds wrong answers and errors, retries what may be retried, and counts everything."""

import asyncio
import os
import subprocess
import sys

import pytest
from rich.console import Console

from mesh.demo import DemoError, run_demo
from mesh.demo.calls import CallFailed
from mesh.demo.numbers import processes
from mesh.demo.report import quantile
from mesh.demo.traffic import KEPT, Traffic
from mesh.statuses import Code, Reason
from tests.support.waiting import until


async def demo(mesh, fleet, **options):
    options = {"requests": 200, "seconds": 0, "clients": 4, "skew": 0.5, **options}
    return await run_demo(mesh.endpoint, fleet, grpc_endpoint=mesh.grpc_endpoint, **options)


def shown(report) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(console)
    return console.export_text()


@pytest.mark.parametrize("raw", [True, False], ids=["raw answers", "typed answers"])
async def test_a_mesh_that_answers_rightly(mesh, tiny, raw):
    """With a correct mesh the demo registers all models, uses every form of request and compares every answer. It
    reports success."""
    mesh.raw = raw
    report = await demo(mesh, tiny, root_pid=os.getpid())
    assert report.ok
    assert report.tally.right == report.tally.requests == 200 == mesh.calls
    assert set(mesh.registered) == {sample.id for sample in tiny.models}
    assert set(report.tally.milliseconds) == {"gRPC raw", "gRPC typed", "REST JSON", "REST binary"}
    assert all(len(taken) == 50 for taken in report.tally.milliseconds.values())
    assert report.tally.models == set(mesh.registered)
    assert report.evictions == 400
    assert report.hit_rate == 1.0
    text = shown(report)
    assert "All 200 answers are right." in text
    assert "400" in text


async def test_wrong_answers_are_found(mesh, tiny):
    """If a model gives another model's answers, each wrong answer is counted in every form of request. The report names
    the model."""
    mesh.wrong = tiny.models[2].id  # the one with texts
    report = await demo(mesh, tiny)
    assert not report.ok
    assert report.tally.wrong > 4
    assert report.tally.right + report.tally.wrong == 200
    assert all(mesh.wrong in text for text in report.tally.texts)
    for way in ("gRPC raw", "gRPC typed", "REST JSON", "REST binary"):
        assert any(way in text for text in report.tally.texts)
    assert "wrong answers" in shown(report)


async def test_errors_are_counted_and_their_texts_kept(mesh, tiny):
    """An error that a client may not retry ends the request. Only the texts of the first errors are kept."""
    reason = Reason.LOAD_FAILED
    mesh.fault = lambda model, number: (reason.code, reason.http, "it is [broken]")
    report = await demo(mesh, tiny)
    assert report.tally.errors == 200 == mesh.calls
    assert len(report.tally.texts) == KEPT
    assert "it is [broken]" in shown(report)
    assert not report.ok


@pytest.mark.parametrize("reason", [Reason.UNAVAILABLE, Reason.NO_ROOM])
@pytest.mark.parametrize("text", ["later", "no JSON"])
async def test_what_may_be_had_later_is_asked_for_again(mesh, tiny, reason, text):
    """If every fourth request is refused, retries succeed and are reported."""
    mesh.fault = lambda model, number: (reason.code, reason.http, text) if number % 4 == 0 else None
    report = await demo(mesh, tiny, requests=40)
    assert report.ok
    assert report.tally.retries == {reason.code.name: mesh.calls - 40}
    assert f"{mesh.calls - 40} {reason.code.name}" in shown(report)


async def test_repeating_has_an_end(tiny):
    class Never:
        name = "never"

        async def infer(self, model_id, inputs):
            raise CallFailed(Code.UNAVAILABLE, "not there")

    tally = await Traffic(tiny, [Never()], clients=2, give_up=0.0).run(requests=6)
    assert tally.errors == 6


async def test_an_answer_that_cannot_be_read_is_wrong(tiny):
    """An answer that cannot be parsed counts as wrong, not as an error of the demo."""

    class Nonsense:
        name = "nonsense"

        async def infer(self, model_id, inputs):
            raise ValueError("the binary part is shorter than announced")

    tally = await Traffic(tiny, [Nonsense()]).run(requests=5)
    assert tally.wrong == 5


async def test_traffic_can_be_stopped_and_is_skewed(tiny):
    """One model gets more than half of the skewed traffic, which goes on until it is stopped."""
    called = []

    class Echo:
        name = "echo"

        async def infer(self, model_id, inputs):
            called.append(model_id)
            await asyncio.sleep(0)
            raise CallFailed(Code.INTERNAL, "no")

    traffic = Traffic(tiny, [Echo()], skew=2.0, seed=3)
    running = asyncio.create_task(traffic.run())
    await until(lambda: len(called) > 300)
    traffic.stop()
    tally = await running
    assert tally.requests == len(called)
    counts = sorted((called.count(model) for model in set(called)), reverse=True)
    assert counts[0] > len(called) / 2
    assert counts[0] > 2 * counts[1]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": {"line": 1, "id": "a", "reason": "CONFLICT", "text": "registered otherwise"}}, "otherwise"),
        ({"error": "not now", "reason": "REGISTRY_AWAY", "code": 14}, "not now"),
        ({"done": 3}, "was interrupted"),
    ],
    ids=["a line", "all of it", "the end"],
)
async def test_a_fleet_that_cannot_be_registered(mesh, tiny, answer, said):
    """If a fleet cannot be registered, the error contains the mesh's reason, or says that the import was
    interrupted."""
    mesh.import_error = answer
    with pytest.raises(DemoError, match=said):
        await demo(mesh, tiny)


async def test_models_that_were_made_again_are_reloaded(mesh, tiny):
    """If a mesh was kept and models were rebuilt since, they are reloaded. The first run reloads nothing."""
    first, second = tiny.models[0], tiny.models[1]
    mesh.digests = {first.id: "another", second.id: second.sha256}
    await demo(mesh, tiny)
    assert mesh.reloaded == []
    await demo(mesh, tiny)
    assert mesh.reloaded == [first.id]


async def test_a_demo_without_a_mesh_says_so(tiny):
    with pytest.raises(DemoError, match="gave no usable answer"):
        await run_demo("http://127.0.0.1:1", tiny, requests=1)


def test_processes_and_what_is_below_them():
    """Processes are listed with their children, their names and plausible memory, here for this process and a child."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, "-m", "some.module", "--name", "x"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = {memory.pid: memory for memory in processes(os.getpid())}
        child.kill()
    assert (found[child.pid].name, found[child.pid].depth) == ("some.module x", 1)
    assert 2**20 < found[child.pid].resident <= found[child.pid].peak < 2**30
    assert next(iter(found)) == os.getpid()
    assert processes(2**22 + 1) == []


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_quantiles(share, value):
    assert quantile(range(1, 101), share) == value
    assert quantile([], share) == 0
