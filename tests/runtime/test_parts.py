"""The small parts of the agent: what is worth telling, memory, unloads that get stuck, files, folders, options."""

import asyncio
import fcntl
import os
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from mesh import process
from mesh.host import oomkills as tally
from mesh.runtime import rundir
from mesh.runtime.__main__ import app
from mesh.runtime.agent import Agent
from mesh.runtime.blame import earlier
from mesh.runtime.blame.lastlooks import LastLooks
from mesh.runtime.blame.suspects import work
from mesh.runtime.cache import capacity, memory, unloads
from mesh.runtime.cache.files import Files
from mesh.runtime.cache.ledger import Entry, State
from mesh.runtime.cache.memory import MemoryWatch
from mesh.runtime.cache.rate import Rate
from mesh.runtime.presence.figures import GAP, REFRESH, Published, coarse_age_ms, worth_telling
from mesh.runtime.rundir import RunDir
from mesh.runtime.servers import serverprocess
from mesh.runtime.servers.serverprocess import Plan, ServerFailed, ServerProcess
from mesh.runtime.settings import RuntimeSettings
from mesh.runtime.sharedmemory.board import Board, Use
from mesh.runtime.sharedmemory.board import State as SlotState
from mesh.schema.records import LEAVING, PodRecord
from mesh.wire import requestdigest
from placement.footprint import Footprint
from placement.room import RoomVerdict
from placement.suspects import Cause, Doing, Work
from puller.puller import Puller
from puller.source import Source
from tests.runtime.pod_of_fakes import FakePod
from tests.support.waiting import until

# --- figures

BASE = PodRecord(
    "life", "a:1", "a:2", capacity_bytes=1000, used_bytes=500, copies=100, oldest_idle_ms=1_000_000, loading_threads=4
)


@pytest.mark.parametrize(
    ("change", "elapsed", "told"),
    [
        pytest.param({}, REFRESH * 10, False, id="nothing"),
        pytest.param({"state": LEAVING}, 0.0, True, id="leaving-at-once"),
        pytest.param({"data_address": "b:1"}, 0.0, True, id="address-at-once"),
        pytest.param({"used_bytes": 900}, GAP / 2, False, id="not-too-often"),
        pytest.param({"used_bytes": 549}, GAP, False, id="used-little"),
        pytest.param({"used_bytes": 550}, GAP, True, id="used"),
        pytest.param({"used_bytes": 501}, REFRESH, True, id="anything-after-a-while"),
        pytest.param({"copies": 110}, GAP, False, id="copies-little"),
        pytest.param({"copies": 111}, GAP, True, id="copies"),
        pytest.param({"oldest_idle_ms": 1_100_000}, GAP, False, id="age-little"),
        pytest.param({"oldest_idle_ms": 0}, GAP, True, id="age"),
        pytest.param({"loads_in_progress": 1}, GAP, True, id="first-load"),
        pytest.param({"rate": 99}, GAP, False, id="rate-little"),
        pytest.param({"rate": 100}, GAP, True, id="rate"),
    ],
)
def test_what_is_worth_telling(change: dict[str, int], elapsed: float, told: bool) -> None:
    """Every router gets every change: small ones wait, what concerns all goes at once."""
    now = replace(BASE, **change)  # type: ignore[arg-type]
    assert worth_telling(Published(BASE, 100.0), now, 100.0 + elapsed) is told


def test_loads_are_told_when_the_pod_begins_to_queue_them() -> None:
    loading = replace(BASE, loads_in_progress=3)
    published = Published(loading, 0.0)
    assert not worth_telling(published, replace(loading, loads_in_progress=4), GAP)
    assert worth_telling(published, replace(loading, loads_in_progress=5), GAP)


def test_the_rate_is_that_of_the_last_minute() -> None:
    """Also when calls have stopped; the first seconds are not taken for a minute."""
    now, calls = 0.0, 0
    rate = Rate(lambda: calls, clock=lambda: now)
    rate.read()
    assert rate.per_minute == 0
    now, calls = 5.0, 100
    rate.read()
    assert rate.per_minute == 400
    now, calls = 30.0, 600
    rate.read()
    assert rate.per_minute == 1200
    now = 89.0
    rate.read()
    now = 150.0
    rate.read()
    assert rate.per_minute == 0


# --- memory


def test_a_full_cache_is_below_the_limits() -> None:
    """At any capacity: else the watch would evict from every cache that is merely full. 100 MB are the server's own."""
    for models in (1 << 20, 64 << 20, 1 << 30, 16 << 30, 256 << 30):
        assert models + (100 << 20) < memory.EVICT * capacity.limit(models)


def test_the_automatic_capacity_fits() -> None:
    for available in (1 << 30, 4 << 30, 64 << 30):
        assert capacity.limit(capacity.auto_capacity(available)) == capacity.auto_limit(available) <= available
    assert capacity.auto_capacity(0) == 64 << 20


def test_a_small_container_is_not_planned_beyond_what_it_has() -> None:
    """There is the least capacity, and less room beside it; the agent takes 90 MB too."""
    for available in (400 << 20, 512 << 20, 640 << 20, 768 << 20):
        assert capacity.auto_capacity(available) >= 64 << 20
        assert capacity.auto_limit(available) + (90 << 20) < available


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    async with FakePod() as running:
        yield running


async def test_memory_above_the_limits(pod: FakePod) -> None:
    """Above 90 % the oldest go, as many as the excess takes; above 95 % no loads; below, all is well again."""
    await pod.fill("a", "b", "c", "d", size=100_000)
    pod.busy("a")
    resident, evicted = 0, []

    def evict(entry: Entry, why: str) -> None:
        evicted.append(entry.model_id)
        pod.ledger.enter(entry, State.UNLOADING)

    watch = MemoryWatch(pod.ledger, limit_bytes=1_000_000, used=lambda: resident, evict=evict)
    resident = 900_000
    watch.look()
    assert (evicted, watch.refusal) == ([], "")
    resident = 949_000
    watch.look()
    assert (evicted, watch.refusal) == (["b"], "")
    watch.look()  # b is on its way out
    assert evicted == ["b"]
    pod.ledger.remove(pod.entry("b"))
    resident = 1_050_000
    watch.look()
    assert evicted == ["b", "c", "d"]
    assert "95%" in watch.refusal
    resident = 500_000
    watch.look()
    assert watch.refusal == ""


async def test_one_figure_of_a_device_evicts_once(pod: FakePod) -> None:
    """It is a second old: what has gone because of it shows in the next one only."""
    pod.ledger.equip(1 << 30)
    pod.server.on_device = True
    await pod.fill("a", "b", "c", "d", size=100_000)
    taken, evicted = 960_000, []

    def evict(entry: Entry, why: str) -> None:
        evicted.append(entry.model_id)
        pod.ledger.enter(entry, State.UNLOADING)
        pod.ledger.remove(entry)  # the server has given it back; the figure does not know

    watch = MemoryWatch(pod.ledger, limit_bytes=1_000_000, used=lambda: taken, evict=evict, device=True)
    watch.look()
    watch.look()
    assert evicted == ["a"]
    watch.look()  # told again, it is a new one: nothing was given back
    assert evicted == ["a", "b"]
    taken = 985_000
    watch.look()
    assert "98%" in watch.refusal, "what is refused does not wait"
    watch.look()
    assert evicted == ["a", "b", "c"]
    taken = 940_000
    watch.look()
    watch.look()
    assert (evicted, watch.refusal) == (["a", "b", "c"], "")


async def test_what_is_yet_to_come_is_not_what_goes(pod: FakePod) -> None:
    """Room that loads have on the books makes the excess no larger."""
    await pod.fill("a", "b", "c", size=100_000)
    pod.ledger.weigh(pod.ledger.add("waiting", 1), 600_000)
    evicted: list[str] = []
    watch = MemoryWatch(
        pod.ledger, limit_bytes=1_000_000, used=lambda: 950_000, evict=lambda entry, why: evicted.append(entry.model_id)
    )
    watch.look()
    assert evicted == ["a"]


@pytest.mark.parametrize(
    ("wanted", "used", "models"),
    [
        pytest.param(950, 0, 950, id="all that the watch leaves alone"),
        pytest.param(900, 50, 900, id="what others leave of that"),
        pytest.param(951, 0, None, id="more than the watch leaves alone"),
        pytest.param(901, 50, None, id="more than others leave"),
        pytest.param(1, 990, None, id="nothing left"),
        pytest.param(0, 945, None, id="nothing left, and none asked for"),
    ],
)
def test_capacity_of_a_device(wanted: int, used: int, models: int | None) -> None:
    """Copies go above 95 % of it: more than that is no capacity."""
    if models is None:
        with pytest.raises(ValueError, match=r"are asked for models, of the device's|use --device cpu"):
            capacity.device_capacity(wanted << 20, used << 20, 1000 << 20)
    else:
        assert capacity.device_capacity(wanted << 20, used << 20, 1000 << 20) == models << 20
        assert 0 < capacity.device_capacity(0, used << 20, 1000 << 20) < models << 20


# --- unloads


async def test_a_copy_that_cannot_be_freed_stays_on_the_books(pod: FakePod, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of it does not end: nothing is answered from it any more, but its memory does not count as free, and its
    slot is not given to anybody, until the board says that it is gone."""
    monkeypatch.setattr(unloads, "_RETRY", 0.01)
    await pod.fill("stuck", size=600_000)
    slot = pod.entry("stuck").slot
    assert slot is not None
    pod.board.uses[slot] = Use(SlotState.UNLOADING, 1, 1, 1, 0, 0, 0, 0)
    assert await pod.loads.withdraw("stuck", 0, "test")
    assert "stuck" not in pod.keys.keys
    await until(lambda: pod.unloaded().count("stuck") >= 2, why="it is tried again")
    assert pod.ledger.physical_bytes == 600_000
    assert pod.ledger.room_for(Footprint(500_000)).verdict is RoomVerdict.FITS
    waiting = asyncio.create_task(pod.load("next", 500_000))
    await until(lambda: pod.ledger.count(State.WAITING), why="waits for the space")
    del pod.board.uses[slot]
    await waiting
    await pod.nothing_left("stuck")
    assert pod.resident == {"next"}


async def test_unload_errors_are_tried_again(pod: FakePod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unloads, "_RETRY", 0.01)
    await pod.fill("m", size=10)
    answer = type(pod.server).unloadModel
    failures = 2

    async def unload(self: object, request: object, context: grpc.aio.ServicerContext) -> object:
        nonlocal failures
        if failures:
            failures -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "not now")
        return await answer(pod.server, request, context)

    monkeypatch.setattr(type(pod.server), "unloadModel", unload)
    assert pod.server.server is not None
    await pod.server.server.stop(None)
    await pod.server.__aenter__()
    assert await pod.loads.withdraw("m", 0, "test")
    await pod.nothing_left("m")
    assert failures == 0


# --- suspects


async def test_who_was_at_work_when_the_server_died(pod: FakePod) -> None:
    """Each thread with its request, the event loop's included, and what is known without threads; never what merely
    waited or was idle."""
    board = Board.private(64)
    await pod.fill("idle", "queued", "running", "loading", "freeing", "looping", size=10)
    states = {
        "idle": Use(SlotState.LOADED, 1, 0, 0, 0, 9, 0, 0),
        "queued": Use(SlotState.LOADED, 1, 5, 0, 0, 9, 0, 0),
        "running": Use(SlotState.LOADED, 1, 2, 1, 0, 9, 0, 0),
        "loading": Use(SlotState.LOADING, 1, 0, 0, 0, 0, 0, 0),
        "freeing": Use(SlotState.UNLOADING, 1, 0, 0, 0, 9, 0, 0),
        "looping": Use(SlotState.LOADED, 1, 2, 2, 0, 9, 0, 0),
    }
    for name, use in states.items():
        slot = pod.entry(name).slot
        assert slot is not None
        pod.board.uses[slot] = use

    def at_work() -> list[Work[str]]:
        entries = pod.ledger.entries.values()
        held = [
            (one.model_id, one.slot, use) for one in entries if one.slot is not None and (use := pod.ledger.use(one))
        ]
        return work(held, board.at_work)

    frame = b"\0\0\0\0\0"
    digest = requestdigest.digest(frame).hex()
    me = threading.get_ident()
    board.attach(1)
    for name in ("running", "looping"):
        board.at_work.begin(pod.entry(name).slot or 0, frame)
    board.at_work.begin(pod.entry("loading").slot or 0)
    board.at_work.inline(frame)
    assert at_work() == [
        Work("running", Doing.RUNNING, me, digest=digest),
        Work("loading", Doing.LOADING, me),
        Work("freeing", Doing.FREEING),
        Work("looping", Doing.RUNNING, me, digest=digest),
        Work("looping", Doing.RUNNING, me, in_loop=True, digest=digest),
    ]
    slot = pod.entry("idle").slot
    assert slot is not None
    pod.board.uses[slot] = Use(SlotState.LOADED, 1, 2, 1, 0, 9, 0, 0)  # in a thread that is not noted, or in the loop
    assert [one.model for one in at_work() if not one.thread] == ["freeing", "idle", "looping"]
    board.close()


@pytest.mark.parametrize(
    ("end", "cause", "how"),
    [
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)", Cause.KILLED, "was killed by SIGKILL from outside", id="kill"
        ),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM)", Cause.KILLED, "was killed by SIGTERM", id="term"),
        pytest.param("os.abort()", Cause.CRASH, "was killed by SIGABRT", id="abort"),
        pytest.param("os._exit(3)", Cause.EXIT, "ended with status 3", id="exit"),
    ],
)
async def test_how_a_server_ended_is_told(tmp_path: Path, end: str, cause: Cause, how: str) -> None:
    """With the thread where it crashed in one."""
    code = f"import faulthandler, os, signal; faulthandler.enable(); {end}"
    deaths: list[serverprocess.Death] = []
    server = a_server(
        Plan((sys.executable, "-c", "pass"), tmp_path, 1.0), Board.create(tmp_path / "b", 4), on_death=deaths.append
    )
    server._child = await process.spawn([sys.executable, "-c", code], name="x", on_line=server._on_line)
    server._oom_kills = tally.oom_kills()
    death = await server._until_dead(server._child)
    assert (death.cause, death.how) == (cause, how)
    assert bool(death.thread) is (cause is Cause.CRASH)


@pytest.mark.parametrize(
    ("before", "after", "cause"), [(1, 2, Cause.MEMORY), (-1, -1, Cause.MEMORY), (7, 7, Cause.KILLED)]
)
async def test_a_kill_is_for_memory_where_the_kernel_counts_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int, cause: Cause
) -> None:
    """Or does not count at all: then nobody can tell."""
    server = a_server(
        Plan((sys.executable, "-c", "pass"), tmp_path, 1.0), Board.create(tmp_path / "b", 4), on_death=print
    )
    server._child = await process.spawn(
        [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], name="x"
    )
    monkeypatch.setattr(serverprocess, "oom_kills", lambda: after)
    server._oom_kills = before
    assert (await server._until_dead(server._child)).cause is cause


def test_the_kernels_count_is_read(tmp_path: Path) -> None:
    """From among others; -1 where there is none."""
    vmstat = tmp_path / "vmstat"
    assert tally.oom_kills(vmstat) == -1
    vmstat.write_text("nr_free_pages 5\noom_kill 12\nzswpin 0\n")
    assert tally.oom_kills(vmstat) == 12
    vmstat.write_text("nr_free_pages 5\n")
    assert tally.oom_kills(vmstat) == -1


# --- files


async def test_files_are_never_removed_under_the_next_pull(tmp_path: Path) -> None:
    """Removed and pulled again at once, many times over."""
    source = tmp_path / "m.onnx"
    source.write_bytes(b"model")
    files = Files(Puller(directory=tmp_path / "models", file_roots=[tmp_path]))
    for _ in range(20):
        pulled = await files.pull(Source(str(source)), into="m")
        files.discard("other")
        assert pulled.path.read_bytes() == b"model"
        files.discard("m")
    pulled = await files.pull(Source(str(source)), into="m")
    await files.remove("other")
    assert pulled.path.read_bytes() == b"model"
    await files.remove("m")
    assert not pulled.path.exists()
    await files.close()


def test_a_run_folder_goes_with_its_process_and_one_left_behind_with_the_next(tmp_path: Path) -> None:
    """Killed agents leave theirs; those of living ones are not touched."""
    alive = RunDir(tmp_path)
    left = tmp_path / "mesh-pod-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "board").touch()
    strange = tmp_path / "mesh-pod-strange"
    strange.mkdir()
    other = RunDir(tmp_path)
    assert alive.path.exists()
    assert other.path.exists()
    assert not left.exists()
    assert strange.exists()
    assert (other.path.stat().st_mode & 0o777) == 0o700
    other.close()
    alive.close()
    assert not alive.path.exists()


def test_a_folder_left_by_a_former_life_is_shown_to_the_next(tmp_path: Path) -> None:
    """To that of the same pod alone, and not where it was disowned."""
    seen: list[str] = []

    def killed(whose: str, *, disowned: bool = False) -> None:
        run = RunDir(tmp_path, whose=whose)
        (run.path / "board").write_text(whose)
        if disowned:
            run.disown()
        os.close(run._lock)  # as the kernel does

    def note(folder: Path) -> None:
        seen.append((folder / "board").read_text())

    for whose, disowned in (("a", False), ("a", True), ("", False)):
        killed(whose, disowned=disowned)
        RunDir(tmp_path, whose="a", on_left=note).close()
    killed("")
    RunDir(tmp_path, whose="", on_left=note).close()
    assert seen == ["a"]
    assert not list(tmp_path.iterdir())


def test_others_leave_the_folder_to_the_next_life_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its models, which are large; and not for ever, as no next life may come."""
    seen: list[str] = []

    def killed() -> Path:
        run = RunDir(tmp_path, whose="a")
        (run.path / "board").touch()
        (run.path / "models").mkdir()
        (run.path / "models" / "model.onnx").touch()
        os.close(run._lock)
        return run.path

    left = killed()
    for whose in ("b", "", "b"):
        RunDir(tmp_path, whose=whose, on_left=lambda folder: seen.append(f"theirs: {folder}")).close()
    assert not (left / "models").exists()
    RunDir(tmp_path, whose="a", on_left=lambda folder: seen.append(str(folder / "board"))).close()
    assert seen == [str(left / "board")]
    assert not list(tmp_path.iterdir())

    left = killed()
    looks = os.open(left / "lock", os.O_RDWR)
    fcntl.flock(looks, fcntl.LOCK_EX)
    other = threading.Timer(0.05, os.close, [looks])
    other.start()
    RunDir(tmp_path, whose="a", on_left=lambda folder: seen.append("waited for")).close()
    other.join()
    assert seen[1:] == ["waited for"]

    killed()
    monkeypatch.setattr(rundir, "KEPT", 0.0)
    RunDir(tmp_path, whose="b").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("looks", "blamed"),
    [
        pytest.param([3 << 30, 3 << 30], False, id="memory-to-spare"),
        pytest.param([3 << 30, 1 << 30], True, id="memory-going-fast"),
        pytest.param([1 << 26], True, id="no-memory-left"),
        pytest.param([], False, id="nobody-looked"),
    ],
)
def test_a_pod_that_was_killed_whole_blames_models_only_for_its_memory(
    looks: list[int], blamed: bool, tmp_path: Path
) -> None:
    """By the last looks of the former life, which outlive it."""
    board = Board.create(tmp_path / earlier.BOARD, 4)
    board.row(0).loading(77, 1)
    left = iter(looks)
    trace = LastLooks(tmp_path, lambda: next(left), 4 << 30)
    for _ in looks:
        trace.look()
    trace.close()
    lives = earlier.Earlier("pod")
    lives.read(tmp_path)
    assert lives.suspects == ({77: "loading"} if blamed else {})
    board.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_life_that_was_stopped_from_outside_blames_nobody(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever killed it for that says so to the next life."""
    board = Board.create(tmp_path / earlier.BOARD, 4)
    row = board.row(0)
    row.loading(77, 1)
    trace = LastLooks(tmp_path, lambda: 0, 1 << 30)
    trace.look()
    trace.close()
    if stopped:
        monkeypatch.setenv(process.STOPPED_BEFORE, "1")
    lives = earlier.Earlier("pod")
    lives.read(tmp_path)
    assert lives.suspects == ({} if stopped else {77: "loading"})
    board.close()


# --- the model server's start


async def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board", 4)
    plan = Plan((sys.executable, "-c", "print('no such device'); raise SystemExit(3)"), tmp_path, 1.0)
    deaths: list[serverprocess.Death] = []
    server = a_server(plan, board, on_death=deaths.append)
    with pytest.raises(ServerFailed, match=r"ended with status 3.*no such device"):
        await server.start()
    assert await server.ready(0.0) is None
    await server.stop(0.0)
    assert not deaths


async def test_a_server_that_starts_no_more_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has served, and finds something gone in its next lives."""
    monkeypatch.setattr(serverprocess, "PAUSE_FIRST", 0.001)
    monkeypatch.setattr(serverprocess, "GIVE_UP", 3)
    board = Board.create(tmp_path / "board", 4, incarnation="life")
    argv = serverprocess.argv(
        module="mesh.runtime.server",
        data=f"127.0.0.1:{process.free_port('127.0.0.1')}",
        incarnation="life",
        board=tmp_path / "board",
        capacity=1 << 30,
        threads=1,
        load_timeout=10.0,
        load_concurrency=1,
        device="cpu",
        max_message=1 << 20,
        max_body_bytes=4 << 20,
        internal_tls=None,
        memory_limit=0,
        log_format="json",
        log_level="info",
    )
    given_up: list[str] = []
    server = a_server(Plan(argv, tmp_path, 5.0), board, on_given_up=given_up.append)
    await server.start()
    assert server.down_for == 0
    try:
        server.plan = Plan((sys.executable, "-c", "raise SystemExit('no such device')"), tmp_path, 1.0)
        server.kill("the test wants it")
        await until(lambda: given_up, why="it is given up")
        assert "no such device" in given_up[0]
        assert (server.lives, server.deaths) == (1 + 3, 1)
        assert "no such device" in server.why_down
        assert server.down_for > 0
    finally:
        await server.stop(1.0)


@pytest.mark.parametrize(("down_for", "live"), [(0.0, True), (170.0, True), (190.0, False)])
def test_a_pod_without_a_server_for_minutes_is_not_live(down_for: float, live: bool) -> None:
    """Others are started all the while, so seconds without one are nothing."""
    server = SimpleNamespace(down_for=down_for, why_down="the model server ended with status 3")
    why = Agent._why_not_live(SimpleNamespace(server=server))  # type: ignore[arg-type]
    assert why is None if live else "no model server could be had: the model server ended with status 3" in str(why)


def a_server(plan: Plan, board: Board, **callbacks: Any) -> ServerProcess:
    silent: dict[str, Any] = {"on_death": str, "on_ready": int, "on_given_up": str, "on_line": str}
    return ServerProcess(plan, board, **{**silent, **callbacks})


# --- options


def test_addresses_that_others_can_reach() -> None:
    settings = RuntimeSettings("pod", data="127.0.0.1:0")
    assert settings.reachable("127.0.0.1:5") == "127.0.0.1"
    assert settings.reachable("0.0.0.0:5") not in ("", "0.0.0.0")
    assert replace(settings, advertise="pod-1.svc").reachable("0.0.0.0:5") == "pod-1.svc"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--capacity", "lots", "is not a size"),
        ("--data", "nowhere", "is not an address"),
        ("--device", "tpu", "neither auto, cpu nor cuda"),
        ("--lease-ttl", "1", "greater than or equal"),
        ("--etcd-ca", "/no/such/file", "No such file"),
        ("--log-level", "loud", "not a log level"),
    ],
)
def test_wrong_options_are_refused_with_a_text(option: str, value: str, says: str) -> None:
    result = CliRunner().invoke(app, [option, value], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_slots_follow_the_capacity() -> None:
    """Enough for the smallest models, bounded at both ends."""
    assert RuntimeSettings("pod", capacity=1 << 20).slots == 1024
    assert RuntimeSettings("pod", capacity=256 << 20).slots == 8192
    assert RuntimeSettings("pod", capacity=1 << 40).slots == 32768


def test_the_run_folder_is_short() -> None:
    """A unix socket's path has at most 107 bytes."""
    run = RunDir()
    assert len(os.fsencode(run.path / "spi-1000")) < 100
    run.close()


def test_an_idle_pod_does_not_tell_its_age_every_minute() -> None:
    """To the minute while a rollout may be going on, to the hour afterwards."""
    assert [coarse_age_ms(seconds) for seconds in (0, 59, 61, 3599)] == [0, 0, 60_000, 59 * 60_000]
    assert [coarse_age_ms(seconds) for seconds in (3600, 7199, 90_000)] == [3_600_000, 3_600_000, 90_000_000]
