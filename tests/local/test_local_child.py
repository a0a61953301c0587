"""Supervision of one child process, and of all children of a mesh in order."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from mesh.local import child as child_module
from mesh.local import duties, supervisor
from mesh.local.child import Child, Part
from mesh.local.settings import UpError, UpSettings
from mesh.process.restarts import RestartPolicy
from mesh.process.tasks import Tasks
from tests.support.waiting import until


class FakeProcess:
    """A fake child process that behaves as a test says."""

    def __init__(self, world, name, argv, on_line):
        self.world, self.name, self.argv, self.on_line = world, name, argv, on_line
        self.pid = 1000 + len(world.started)
        self.returncode = None
        self.tail = ()
        self._ended = asyncio.Event()

    def heard(self):
        return 0.0

    async def wait(self, timeout=None):
        async with asyncio.timeout(timeout):
            await self._ended.wait()
        return self.returncode

    async def terminate(self, grace):
        self.world.events.append(f"{self.name} terminated")
        await asyncio.sleep(0)
        self.die(0)
        return 0

    def kill(self):
        if self.returncode is None:
            self.world.events.append(f"{self.name} killed")
            self.die(-9)

    def die(self, returncode, *tail):
        if self.returncode is None:
            self.returncode = returncode
            self.tail = tail
            self._ended.set()


class World:
    """A spawner of fake processes, which it remembers."""

    def __init__(self):
        self.started = []
        self.events = []
        self.missing = {}
        self.environments = []

    async def spawn(self, argv, *, name, on_line, env, beats):
        assert beats, "the child is not asked"
        self.environments.append(env)
        self.events.append(f"{name} started")
        self.started.append(FakeProcess(self, name, argv, on_line))
        return self.started[-1]

    def part(self, name="pod-1", start_timeout=5.0):
        counter = iter(range(100))

        async def ready():
            return self.missing.get(name, "")

        return Part(name, lambda: ["run", name, str(next(counter))], ready, 1.0, start_timeout=start_timeout)

    def child(self, name="pod-1", start_timeout=5.0):
        part = self.part(name, start_timeout)
        return Child(part, lambda name, line: self.events.append(f"{name}: {line}"), spawn=self.spawn)


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(child_module, "POLICY", RestartPolicy(first=0.001, longest=0.01))
    return World()


@pytest.fixture
async def tasks():
    made = Tasks()
    yield made
    await made.close()


async def test_a_child_that_dies_is_started_again(world, tasks):
    """A child that dies is started again with a new command line, until it is stopped."""
    child = world.child()
    await child.start()
    tasks.run(duties.PART, child.run)
    world.started[0].die(-9)
    await until(lambda: len(world.started) == 2)
    world.started[1].die(1)
    await until(lambda: len(world.started) == 3)
    assert [process.argv[2] for process in world.started] == ["0", "1", "2"]
    assert child.statistics() == child_module.ChildStatistics("pod-1", 1002, 3)
    await child.stop()
    assert child.statistics().pid is None
    assert world.events[-1] == "pod-1 terminated"
    assert len(world.started) == 3


async def test_a_child_that_cannot_start_tells_its_last_lines(world):
    """If a child cannot start, its last lines are reported, in readable form if they are structured. It is not started
    again, because it would fail again."""
    world.missing["pod-1"] = "still starting"
    child = world.child()
    starting = asyncio.ensure_future(child.start())
    await until(lambda: world.started)
    world.started[0].die(1, "Traceback", '{"level": "error", "event": "no room", "bytes": 5}')
    with pytest.raises(UpError) as caught:
        await starting
    text = str(caught.value)
    assert "pod-1 ended with status 1" in text
    assert "    Traceback" in text
    assert "error no room  bytes=5" in text
    assert len(world.started) == 1


async def test_a_child_that_is_never_ready_is_given_up(world):
    """A child that never becomes ready is given up. The error says what its probe was missing."""
    world.missing["pod-1"] = "no lease yet"
    child = world.child(start_timeout=0.02)
    with pytest.raises(UpError, match=r"pod-1 is not ready after 0\.02 s: no lease yet"):
        await child.start()
    await child.stop()
    assert world.events == ["pod-1 started", "pod-1 terminated"]


async def test_a_start_that_is_given_up_leaves_nothing(world):
    """A start that is given up, for instance by Ctrl-C, leaves no process."""
    world.missing["pod-1"] = "starting"
    child = world.child()
    starting = asyncio.ensure_future(child.start())
    await until(lambda: world.started)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await child.stop()
    assert world.started[0].returncode == 0


async def test_a_real_child_is_minded(tasks):
    lines = []

    async def ready():
        return "" if lines else "nothing said"

    code = "import sys, time; print('up', flush=True); time.sleep(600)"
    part = Part("real", lambda: [sys.executable, "-c", code], ready, 5.0, start_timeout=30.0)
    child = Child(part, lambda name, line: lines.append((name, line)))
    await child.start()
    tasks.run(duties.PART, child.run)
    first = child.statistics()
    assert lines == [("real", "up")]
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: child.statistics().starts == 2 and len(lines) == 2, timeout=30)
    await child.stop()
    assert child.statistics().pid is None


@pytest.fixture
def local(world, monkeypatch, tmp_path):
    """Returns the settings of a mesh whose children are fakes."""
    monkeypatch.setattr(supervisor.single, "find", lambda: "/no/etcd")
    monkeypatch.setattr(supervisor.single, "version", lambda binary: "3.5.1")
    monkeypatch.setattr(
        supervisor, "Child", lambda part, on_line: Child(world.part(part.name), on_line, spawn=world.spawn)
    )
    monkeypatch.setattr(supervisor, "_check_ports", lambda settings: None)
    return UpSettings(pods=2, data_dir=tmp_path / "data")


class Lines:
    """A printer that keeps its lines."""

    def __init__(self):
        self.texts = []
        self.on_broken = None

    def line(self, name, line):
        self.texts.append(line)

    def text(self, text):
        self.texts.append(text)


async def test_parts_start_and_end_in_order(world, local):
    """Parts start and end in order: etcd starts first and ends last, and the router ends before the pods."""
    printer = Lines()
    running = asyncio.ensure_future(supervisor.run(local, printer, _nothing))
    await until(lambda: len(world.started) == 4)
    assert world.events[0] == "etcd started"
    assert set(world.events[1:]) == {"pod-1 started", "pod-2 started", "router started"}
    world.events.clear()
    await until(lambda: printer.on_broken is not None)
    signal.raise_signal(signal.SIGINT)
    await asyncio.wait_for(running, 10)
    assert world.events[0] == "router terminated"
    assert set(world.events[1:3]) == {"pod-1 terminated", "pod-2 terminated"}
    assert world.events[3:] == ["etcd terminated"]


async def test_nothing_is_told_ready_before_it_is(world, local):
    """The function that prints the lines to try is called only when the last part is ready."""
    told = []

    async def ready(mesh):
        told.append([child.name for child in mesh.statistics() if child.pid])

    world.missing["pod-2"] = "loading"
    running = asyncio.ensure_future(supervisor.run(local, Lines(), ready))
    await until(lambda: len(world.started) == 4)
    assert not told
    world.missing.clear()
    await until(lambda: told)
    assert told == [["etcd", "pod-1", "pod-2", "router"]]
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(running, 10)


async def test_a_part_that_fails_takes_the_others_down(world, local):
    """If a part fails, the other parts are ended, and `mesh up` ends with the reason."""
    world.missing |= {"pod-1": "starting", "pod-2": "starting"}
    running = asyncio.ensure_future(supervisor.run(local, Lines(), _nothing))
    await until(lambda: len(world.started) == 4)
    next(process for process in world.started if process.name == "pod-2").die(3, "no such device")
    with pytest.raises(UpError, match=r"pod-2 ended with status 3\nits last lines:\n    no such device"):
        await asyncio.wait_for(running, 10)
    assert all(process.returncode is not None for process in world.started)


async def test_a_second_signal_kills(world, local):
    """A second signal kills all parts, so a user in a hurry need not wait for calls in flight."""
    stuck = asyncio.Event()

    async def never(self, grace):
        world.events.append(f"{self.name} asked")
        await self.wait()
        stuck.set()
        return self.returncode

    running = asyncio.ensure_future(supervisor.run(local, Lines(), _nothing))
    await until(lambda: len(world.started) == 4)
    for process in world.started:
        process.terminate = never.__get__(process)
    await asyncio.sleep(0)
    signal.raise_signal(signal.SIGINT)
    await until(lambda: "router asked" in world.events)
    signal.raise_signal(signal.SIGINT)
    await asyncio.wait_for(running, 10)
    assert {f"{name} killed" for name in ("router", "pod-1", "pod-2", "etcd")} <= set(world.events)


async def test_nobody_reading_ends_the_mesh(world, local):
    """If nothing reads the output, as in `mesh up | head`, the mesh ends."""
    printer = Lines()
    running = asyncio.ensure_future(supervisor.run(local, printer, _nothing))
    await until(lambda: len(world.started) == 4)
    printer.on_broken()
    await asyncio.wait_for(running, 10)
    assert all(process.returncode is not None for process in world.started)


async def _nothing(mesh):
    pass


def test_command_lines_name_everything_a_part_needs(tmp_path):
    """A part's command line contains everything it needs: new ports at each start, JSON logs, and the samples' folder
    as a root."""
    settings = UpSettings(
        data_dir=tmp_path,
        file_roots=(Path("/models"),),
        threads=3,
        capacity=5,
        http_allow_private=True,
        storage_config=Path("/secret"),
        disk_budget=7,
    )
    pod = supervisor.parts.LocalPod(settings, 2, etcd_url="http://127.0.0.1:5", session=None)
    one, two = pod.argv(), pod.argv()
    assert one != two
    for option, value in {
        "--name": "pod-2",
        "--etcd": "http://127.0.0.1:5",
        "--capacity": "5",
        "--threads": "3",
        "--model-dir": str(tmp_path / "pod-2"),
        "--log-format": "json",
        "--base": "mm/mesh",
        "--storage-config": "/secret",
        "--disk-budget": "7",
    }.items():
        assert one[one.index(option) + 1] == value
    roots = [one[i + 1] for i, word in enumerate(one) if word == "--file-root"]
    assert roots == [str(tmp_path / "samples"), "/models"]
    router = supervisor.parts.router(settings, etcd_url="http://127.0.0.1:5", run_dir=tmp_path, session=None).argv()
    assert router[router.index("--listen") + 1] == "127.0.0.1:8033"
    assert router[router.index("--run-dir") + 1] == str(tmp_path)
