"""Complete workers in front of fake pods, with a real etcd, a real feed and real connections."""

import asyncio
import os
import tempfile

import pytest

from mesh.etcd import Snapshot
from mesh.pb import agent_pb2
from mesh.schema.records import LEAVING
from mesh.statuses import Code
from mesh.telemetry import metrics
from mesh.wire import framing, pieces
from mesh.wire.client import Pool, Reply
from router.process import sockets
from router.process.worker import WorkerProcess
from router.settings import RouterSettings
from router.state.feed import ranges
from router.state.feed.server import FeedServer
from tests.support import fakecalls
from tests.support.asked import Asked
from tests.support.fakepod import INFER, FakePod, Refuses, answer, request
from tests.support.waiting import until
from tests.support.workers import workers


@pytest.fixture
def run_dir():
    """Returns a folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        yield folder


async def test_registered_on_one_worker_served_by_the_other_at_once(etcd, etcd_server, keys):
    """The second worker serves the model as soon as the registration has returned, although it has just answered that
    the model is unknown."""
    async with FakePod("a", etcd, keys) as pod, workers(etcd_server.settings, keys, 2) as mesh:
        await mesh.sees("a")
        for number in range(10):
            name = f"model/{number} é"
            assert (await mesh.infer(name, 1)).code == Code.NOT_FOUND
            await Asked(mesh.processes[0].management).register(name, "onnx", "file:///m")
            reply = await mesh.infer(name, 1)
            assert answer(reply.frame)[0] == "a"
        assert len(pod.loads) == 10


async def test_a_hundred_callers_of_two_workers_load_a_model_once(etcd, etcd_server, keys):
    """Two workers choose pods for the load at the same time. One claim wins, and all calls go to its pod."""
    async with (
        FakePod("a", etcd, keys) as a,
        FakePod("b", etcd, keys) as b,
        FakePod("c", etcd, keys) as c,
        workers(etcd_server.settings, keys, 2) as mesh,
    ):
        await mesh.sees("a", "b", "c")
        await Asked(mesh.processes[0].management).register("m", "onnx")
        replies = await asyncio.gather(*(mesh.infer("m", number % 2) for number in range(100)))
        assert len({answer(reply.frame) for reply in replies}) == 1
        assert sum(len(pod.models) for pod in (a, b, c)) == 1


async def test_an_id_registered_again_never_answers_from_its_former_life(etcd, etcd_server, keys):
    """While two workers serve calls, an id is unregistered and registered again eight times. Each answer comes from the
    registration that was current when the call began, or from a later one."""
    async with (
        FakePod("a", etcd, keys),
        FakePod("b", etcd, keys),
        workers(etcd_server.settings, keys, 2) as mesh,
    ):
        await mesh.sees("a", "b")
        management = [Asked(process.management) for process in mesh.processes]
        await management[0].register("m", "onnx")
        floor = 0
        wrong: list[object] = []
        answers = 0
        stop = False

        async def ask(worker: int) -> None:
            nonlocal answers
            while not stop:
                at_least = floor
                reply = await mesh.infer("m", worker)
                if reply.code == Code.OK:
                    answers += 1
                    if int(answer(reply.frame)[1]) < at_least:
                        wrong.append((reply, at_least))
                elif reply.code not in (Code.NOT_FOUND, Code.UNAVAILABLE):
                    wrong.append(reply)

        askers = [asyncio.create_task(ask(number % 2)) for number in range(6)]
        for life in range(8):
            await management[life % 2].unregister("m")
            status = await management[(life + 1) % 2].register("m", "onnx", f"file:///{life}")
            assert status.created
            found = await etcd.get(keys.model("m"))
            floor = found.create_revision
            goal = answers + 5
            await until(lambda goal=goal: answers >= goal, why="the new registration is served")
        stop = True
        await asyncio.gather(*askers)
        assert not wrong


async def test_a_pod_that_dies_without_a_word(etcd, etcd_server, keys):
    """When a pod has died silently, no other pod may load its models until its lease ends. A call waits until then and
    is served."""
    async with (
        FakePod("a", etcd, keys) as a,
        FakePod("b", etcd, keys) as b,
        workers(etcd_server.settings, keys) as mesh,
    ):
        await mesh.sees("a", "b")
        await Asked(mesh.processes[0].management).register("m", "onnx")
        first = answer((await mesh.infer("m")).frame)[0]
        dead, other = (a, b) if first == "a" else (b, a)
        await dead.die()
        call = asyncio.create_task(mesh.infer("m"))
        await until(lambda: other.loads, why="another pod is asked meanwhile")
        assert not call.done()
        await dead.lose_lease()
        reply = await call
        assert answer(reply.frame)[0] == other.name
        assert dead.name not in mesh.processes[0].view.pods


async def test_every_lease_lost_at_once_costs_nothing(etcd, etcd_server, keys):
    """If all leases are lost at once, no call fails and no load is repeated. No copy is suspect once all pods are
    back."""
    async with (
        FakePod("a", etcd, keys) as a,
        FakePod("b", etcd, keys) as b,
        workers(etcd_server.settings, keys) as mesh,
    ):
        await mesh.sees("a", "b")
        for number in range(6):
            await Asked(mesh.processes[0].management).register(f"m{number}", "onnx", load_now=True, sync=True)
        loads = len(a.loads) + len(b.loads)
        view = mesh.processes[0].view
        await asyncio.gather(a.lose_lease(), b.lose_lease())
        await until(lambda: all(pod.suspect for pod in view.pods.values()), why="all are suspect")
        replies = [await mesh.infer(f"m{number}") for number in range(6)]
        assert {reply.code for reply in replies} == {Code.OK}
        await a.publish()
        await b.publish()
        await until(lambda: not any(copy.suspect for copies in view.copies.values() for copy in copies))
        assert [(await mesh.infer(f"m{number}")).code for number in range(6)] == [0] * 6
        assert len(a.loads) + len(b.loads) == loads


async def test_a_suspect_never_answers_for_a_model_that_was_unregistered(etcd, etcd_server, keys):
    """The record is deleted while the pod is suspect and still holds a copy. The worker reads the record, and does not
    call the pod."""
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys, 2) as mesh:
        await mesh.sees("a")
        management = Asked(mesh.processes[0].management)
        await management.register("m", "onnx", load_now=True, sync=True)
        assert (await mesh.infer("m", 1)).code == Code.OK
        await a.lose_lease()
        await until(lambda: mesh.processes[1].view.pods["a"].suspect)
        await etcd.delete(keys.model("m"))
        assert (await mesh.infer("m", 1)).code == Code.NOT_FOUND
        assert len(a.calls) == 1


async def test_a_suspect_whose_agent_is_gone_is_dropped_without_any_call(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        await a.die()
        await a.lose_lease()
        await until(lambda: "a" not in mesh.processes[0].view.pods, why="a probe has found out")


async def test_a_pod_that_leaves_is_not_suspect(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        await a.publish(LEAVING)
        await a.lose_lease()
        view = mesh.processes[0].view
        await until(lambda: not view.pods)
        assert not view.copies


async def test_an_eviction_that_the_view_has_not_heard_of(etcd, etcd_server, keys):
    """If the view does not show an eviction yet, the pod answers *not here* and the model is loaded again. The caller
    does not notice."""
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        revision = a.models.pop("m")
        await etcd.delete(keys.copy("m", "a"))
        assert (await mesh.infer("m")).code == Code.OK
        assert a.models["m"] == revision
        assert len(a.loads) == 2


async def test_a_load_that_fails_is_the_callers_answer(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")

        async def fail(request: agent_pb2.LoadRequest) -> None:
            raise Refuses(fakecalls.failed("no such file"))

        a.on_load = fail
        status = await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        assert status.status == "LOADING_FAILED"
        assert status.errors[0].startswith("no such file (")
        reply = await mesh.infer("m")
        assert reply.code == Code.INTERNAL
        assert reply.text.startswith("no such file (")


async def test_a_cancel_closes_the_call_in_the_pod(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx")
        calls = []
        a.on_call = calls.append
        with pytest.raises(TimeoutError):
            await mesh.infer("m", timeout=0.3)
        await until(lambda: calls and calls[0].cancelled, why="the pod's call is cancelled")
        assert mesh.processes[0].forwarder.in_flight == 0


@pytest.mark.parametrize("shape", ["client", "server", "both"])
async def test_streams_of_every_shape_pass(etcd, etcd_server, keys, shape):
    """Messages pass in order, with metadata at both ends. If both sides send streams, each message is answered before
    the next is sent. The model is loaded for the stream."""
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx")

        async def echo(call) -> None:
            call.start([(b"x-start", b"s"), (b"mesh-load", b"2")])
            count = 0
            while (frame := await call.read()) is not None:
                count += 1
                if shape != "client":
                    for _ in range(3 if shape == "server" else 1):
                        await call.write(frame)
            if shape == "client":
                await call.write(framing.pack(b"%d" % count))
            call.finish(Code.ABORTED if shape == "both" else 0, "the end", [(b"x-end", b"e"), (b"mesh-x", b"x")])

        tasks = []
        a.on_call = lambda call: tasks.append(asyncio.create_task(echo(call)))
        stream = mesh.pools[0].open(b"/some.Service/stream", [(b"mm-model-id", b"m")])
        frames = [framing.pack(b"%d" % number) for number in range(5)]
        got: list[bytes] = []
        if shape == "both":
            await stream.write(frames[0])
            reply = await stream.first()
            assert await reply.read() == frames[0]
            for frame in frames[1:]:
                await stream.write(frame)
                assert await reply.read() == frame
            stream.end()
        else:
            for frame in frames[: 1 if shape == "server" else 5]:
                await stream.write(frame)
            stream.end()
            reply = await stream.first()
        if isinstance(reply, Reply):
            got, end = [reply.frame], reply
        else:
            assert reply.headers == [(b"x-start", b"s")]
            while (frame := await reply.read()) is not None:
                got.append(frame)
            end = await reply.result()
        expected = {"client": [framing.pack(b"5")], "server": [frames[0]] * 3, "both": []}
        assert got == expected[shape]
        assert end.trailers == [(b"x-end", b"e")]
        assert end.code == (Code.ABORTED if shape == "both" else Code.OK)
        await asyncio.gather(*tasks)
        await until(lambda: mesh.processes[0].forwarder.in_flight == 0)
        assert mesh.processes[0].view.pods["a"].in_flight == 0


async def test_a_stream_whose_copy_has_gone_is_sent_again(etcd, etcd_server, keys):
    """A stream whose copy is gone is sent again, including the messages sent so far, to the pod where the model is
    loaded next."""
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        a.models.pop("m")
        await etcd.delete(keys.copy("m", "a"))

        async def echo(call) -> None:
            frames = []
            while (frame := await call.read()) is not None:
                frames.append(frame)
            call.reply(b"".join(frames[:1]))

        tasks = []
        a.on_call = lambda call: tasks.append(asyncio.create_task(echo(call)))
        stream = mesh.pools[0].open(b"/some.Service/stream", [(b"mm-model-id", b"m")])
        await stream.write(framing.pack(b"first"))
        await until(lambda: len(a.loads) == 2)
        await stream.write(framing.pack(b"second"))
        stream.end()
        reply = await stream.first()
        assert isinstance(reply, Reply)
        assert reply.frame == framing.pack(b"first")
        await asyncio.gather(*tasks)


async def test_what_a_stream_keeps_to_be_sent_again_counts(etcd, etcd_server, keys):
    """The messages that a stream keeps for a retry count against the budget until its reply begins."""
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        calls, got = [], []

        async def take(call) -> None:
            calls.append(call)
            while (frame := await call.read()) is not None:
                got.append(frame)

        tasks = []
        a.on_call = lambda call: tasks.append(asyncio.create_task(take(call)))
        budget = mesh.processes[0].budget
        stream = mesh.pools[0].open(b"/some.Service/stream", [(b"mm-model-id", b"m")])
        large = framing.pack(bytes(pieces.ABOVE // 2))  # larger ones pass in pieces, and are not kept
        for frame in (large, framing.pack(b"second"), framing.pack(b"third")):
            await stream.write(frame)
        await until(lambda: len(got) == 3, why="all of them were passed on")
        assert len(large) <= budget.held < 2 * len(large)
        calls[0].start()
        await calls[0].write(framing.pack(b"reply"))
        await stream.first()
        await until(lambda: budget.held < 1000, why="the reply has begun: nothing is sent again")
        stream.cancel()
        await until(lambda: budget.held == 0)
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_stream_without_a_free_connection_is_refused_once(etcd, etcd_server, keys):
    """A stream without a free connection is refused at once, because further attempts would fail too. The pod is not
    blamed."""
    async with (
        FakePod("a", etcd, keys) as a,
        workers(etcd_server.settings, keys, max_connections_per_pod=1) as mesh,
    ):
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        calls = []
        a.on_call = calls.append
        metadata = [(b"mm-model-id", b"m")]
        first = mesh.pools[0].open(b"/some.Service/stream", metadata)
        await first.write(framing.pack(b"first"))
        await until(lambda: calls, why="the first stream has the connection")
        second = mesh.pools[0].open(b"/some.Service/stream", metadata)
        await second.write(framing.pack(b"second"))
        reply = await second.first()
        assert (reply.code, "its share" in reply.text) == (Code.RESOURCE_EXHAUSTED, True), reply
        assert mesh.processes[0].forwarder.meter.unsent.value == 0
        assert mesh.processes[0].view.pods["a"].failed_at == 0
        first.cancel()
        await until(lambda: calls[0].cancelled)


async def test_a_client_that_leaves_its_stream_ends_it_in_the_pod(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx", load_now=True, sync=True)
        calls = []
        a.on_call = calls.append
        stream = mesh.pools[0].open(b"/some.Service/stream", [(b"mm-model-id", b"m")])
        await stream.write(framing.pack(b"first"))
        await until(lambda: calls)
        stream.cancel()
        await until(lambda: calls[0].cancelled)
        await until(lambda: mesh.processes[0].forwarder.in_flight == 0)


async def test_metrics_of_all_workers_are_merged(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys), workers(etcd_server.settings, keys, 2) as mesh:
        await mesh.sees("a")
        await Asked(mesh.processes[0].management).register("m", "onnx")
        for number in range(6):
            await mesh.infer("m", number % 2)
        merged = await mesh.processes[0].feed.merged()
        (metric,) = [m for m in merged["metrics"] if m["name"] == "modelmesh_api_request_milliseconds"]
        assert [(labels, sum(value[0])) for labels, value in metric["series"]] == [(["ModelInfer", "OK"], 6)]


async def test_a_draining_worker_says_so_and_finishes_what_it_has(etcd, etcd_server, keys):
    async with FakePod("a", etcd, keys) as a, workers(etcd_server.settings, keys) as mesh:
        await mesh.sees("a")
        process = mesh.processes[0]
        await Asked(process.management).register("m", "onnx", load_now=True, sync=True)
        calls = []
        a.on_call = calls.append
        call = asyncio.create_task(mesh.infer("m"))
        await until(lambda: calls)
        mesh.feed.drain()
        await until(lambda: process.why_not_ready() is not None)
        await until(lambda: "stopping" in (mesh.feed.ready()["worker0"] or ""))
        stopping = asyncio.create_task(process.server.close(5.0))
        await until(lambda: process.server.closing)
        calls[0].reply(framing.pack(b"done"))
        assert (await call).frame == framing.pack(b"done")
        await stopping


async def test_no_call_is_taken_before_what_is_where_is_known(run_dir, etcd_server, keys):
    """A worker that starts while calls arrive, such as the successor of a dead worker, lets the calls wait until it
    knows the pods and copies. Otherwise it would take loaded models for cold ones."""
    settings = RouterSettings("test", base=keys.base, run_dir=run_dir, etcd=etcd_server.settings)
    listening = sockets.Sockets({kind: settings.socket(kind, 0) for kind in sockets.KINDS})

    async def nothing() -> metrics.Snapshot:
        return metrics.merge([])

    feed = FeedServer(nothing)
    await feed.start(settings.feed)
    process = WorkerProcess(settings, 0, [os.dup(descriptor) for descriptor in listening.descriptors])
    starting = asyncio.create_task(process.start())
    pool = Pool(f"unix:{settings.socket(sockets.GRPC, 0)}")
    try:
        await until(lambda: feed.ready(), why="the worker has connected")
        call = asyncio.create_task(pool.call(INFER, [], request("m"), timeout=20))
        await until(lambda: pool.statistics().connections == 1, why="the call is on its way")
        assert not process.server.statistics().calls
        feed.apply(ranges.CONFIG, Snapshot(7, ()))
        feed.apply(ranges.PRESENCE, Snapshot(7, ()))
        assert (await call).code == Code.NOT_FOUND
        await starting
    finally:
        pool.close()
        starting.cancel()
        await process.stop()
        await feed.close()
        listening.close()
