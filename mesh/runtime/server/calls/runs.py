"""Calls that run in threads: their order, their deadlines and their cancellation.

There is one thread more than a single model may use, so that a model whose calls do not end leaves a thread for others.
Models with waiting calls take turns. The number and the bytes of waiting calls are limited; further calls are refused.

A run is ended by its RunOptions when its caller cancels, when its deadline passes (one timer checks all runs), and when
its model is unloaded. ONNX Runtime checks the options between operators, and between the rounds of a Loop. A single
endless operator cannot be ended, and its thread is lost. Another thread is then added, but at most as many as there
were at the start.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mesh.runtime.port import answers
from mesh.runtime.server.copies import ServedCopy
from mesh.runtime.server.onnx import session
from mesh.runtime.server.v2.shortcuts import Asked
from mesh.runtime.server.v2.tensors import Raw
from mesh.runtime.server.workers import Workers
from mesh.runtime.sharedmemory.atwork import AtWork
from mesh.runtime.sharedmemory.board import Board
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire.call import Call

log = logs.get(__name__)

MAX_WAITING = 1024
"""Largest number of calls that wait for a thread."""

MAX_WAITING_BYTES = 256 << 20
"""Largest number of bytes of input that all running and waiting calls may have in memory. A single call may have
more."""

MAX_SECONDS = 600.0
"""Time limit of a call without a deadline, in seconds."""

_SWEEP = 0.05  # seconds between two checks of the deadlines
_STUCK = 5.0  # seconds after which a run that was told to end counts as endless


class Run:
    """One call on its way through a thread."""

    __slots__ = (
        "asked", "busy_ns", "call", "copy", "deadline", "ended_by", "error", "held", "line", "options",
        "pieces", "read", "running", "runs", "sent", "size", "started_ns", "stopped_at", "stuck",
    )  # fmt: skip

    def __init__(
        self,
        call: Call,
        copy: ServedCopy,
        *,
        sent: bytes,
        held: int,
        asked: Asked | None = None,
        read: Callable[[], Asked] | None = None,
        started_ns: int,
    ) -> None:
        """Prepares a run of the request whose frame is `sent` and which keeps `held` bytes in memory. `asked` is the
        request's input and wanted outputs. If reading these takes long, `asked` is None, and the thread calls `read`,
        which returns them."""
        self.call = call
        self.copy = copy
        self.sent = sent
        self.held = held
        self.asked = asked
        self.read = read
        self.size = 0 if asked is None else asked[1]  # bytes of the model's input
        self.started_ns = started_ns
        self.deadline = 0.0
        self.options: Any = None
        self.running = False
        self.ended_by: MeshError | None = None  # why it must not continue
        self.stopped_at = 0.0  # when it was told to end while it ran
        self.stuck = False
        self.runs: Runs | None = None
        self.line: Line | None = None  # the line in which it waits, or has waited
        # Results of the thread.
        self.pieces: list[Raw] = []  # of the reply's frame
        self.error: MeshError | None = None
        self.busy_ns = 0

    def work(
        self, clock: Callable[[], int], at_work: AtWork, failed: Callable[[ServedCopy, Exception], MeshError]
    ) -> int:
        """Runs the model and writes the reply, in the thread. Returns the duration of the run by `clock`, in ns."""
        started, busy = time.monotonic_ns(), 0
        noted = at_work.begin(self.copy.row.slot, self.sent)
        self.sent = b""
        before = clock()
        try:
            asked = self.asked
            if asked is None:
                assert self.read is not None
                asked = self.read()
                self.read = None  # and with it, the last reference to the request's bytes
                before = clock()
            feed, self.size, answer, raw, request_id = asked
            arrays = self.copy.session.run(answer.names, feed, self.options)
            busy = clock() - before
            self.busy_ns = time.monotonic_ns() - started
            self.pieces = answer.pieces(arrays, request_id, raw=raw)
        except Exception as error:
            self.busy_ns = time.monotonic_ns() - started
            busy = busy or clock() - before
            self.error = failed(self.copy, error)
        finally:
            at_work.end(noted)
        return busy

    def cancel(self) -> None:
        """Ends the call because its caller has cancelled."""
        if self.runs is not None:
            self.runs.stop(self, MeshError(Reason.CANCELLED, "cancelled by the caller"))


class Line:
    """The calls of one copy that wait for a thread."""

    __slots__ = ("copy", "threads", "waiting")

    def __init__(self, copy: ServedCopy) -> None:
        self.copy = copy
        self.waiting: deque[Run] = deque()
        self.threads = 0  # those that run the copy now


class Runs:
    """The threads and the calls in them. Used only in the event loop's thread."""

    def __init__(
        self, board: Board, *, threads: int, clock: Callable[[], int] = time.thread_time_ns, device: str = "cpu"
    ) -> None:
        """Starts the threads. One model uses at most `threads` of them. `clock` measures the processor time of the
        calling thread, in ns. `device` is the device on which models run."""
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._board = board
        self.clock = clock
        """The clock by which runs are measured."""
        self._each = threads
        self._idle = threads + 1
        self._most = 2 * (threads + 1)
        self._workers = Workers("run", threads + 1)
        self._lines: dict[ServedCopy, Line] = {}  # of copies with calls here
        self._ring: deque[Line] = deque()  # lines with waiting calls, each once
        self._live: set[Run] = set()
        self._waiting = 0
        self._bytes = 0
        self._endless = 0  # calls that were told to end and still run
        self._spare = 0  # threads that came back after they were replaced
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """Number of calls, running and waiting."""
        return len(self._live)

    def error(self, copy: ServedCopy, error: Exception) -> MeshError:
        """Returns the error with which to answer a failed run of that copy."""
        return session.run_error(error, proven=copy.proven, device=self._device)

    @property
    def stuck(self) -> int:
        """Number of calls that cannot be ended."""
        return self._endless

    def refuse(self, size: int) -> MeshError | None:
        """Returns the error if a call with this many bytes of input is refused now, or None if it is accepted. While no
        call is under way, a call of any size is accepted."""
        if self._waiting >= MAX_WAITING or (self._live and self._bytes + size > MAX_WAITING_BYTES):
            what = f"{self._waiting} calls are waiting for a thread"
            if self._waiting < MAX_WAITING:
                what = f"its calls already hold {self._bytes} bytes of input, of at most {MAX_WAITING_BYTES}"
            return MeshError(Reason.OVERLOADED, f"this pod is overloaded, because {what}: try again", retry_after=1.0)
        return None

    def submit(self, run: Run) -> None:
        """Accepts a call that the board counts as in flight but not running. The call will be answered in any case."""
        deadline = run.call.deadline
        run.deadline = self._loop.time() + MAX_SECONDS if deadline is None else deadline
        run.runs = self
        line = self._lines.get(run.copy)
        if line is None:
            line = self._lines[run.copy] = Line(run.copy)
        run.line = line
        if not line.waiting:
            self._ring.append(line)
        line.waiting.append(run)
        self._live.add(run)
        self._waiting += 1
        self._bytes += run.held
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP, self._sweep)
        run.call.on_cancel(run.cancel)
        self._pump()

    def stop(self, run: Run, why: MeshError) -> None:
        """Answers one call with the error `why`, unless it has been answered. If it is running, ONNX Runtime is told to
        end it, and the call counts as in flight until ONNX Runtime returns."""
        if run.ended_by is not None or run not in self._live:
            return
        run.ended_by = why
        if run.running:  # the caller need not wait for onnxruntime, but the copy is freed only afterwards
            run.stopped_at = self._loop.time()
            run.options.terminate = True
            run.call.on_cancel(None)
            answers.fail(run.call, why)
        else:  # it stays in its queue as an empty shell, which is skipped
            self._waiting -= 1
            self._finish(run, ran=0)

    def stop_copy(self, copy: ServedCopy) -> None:
        """Ends all calls of a copy that is being unloaded."""
        for run in [run for run in self._live if run.copy is copy]:
            if run.running:
                self.stop(
                    run,
                    MeshError(
                        Reason.UNAVAILABLE, "the model was unloaded, and the call did not end in time: call again"
                    ),
                )
            else:  # the model never saw the call, so the router may send it elsewhere
                self.stop(run, MeshError(Reason.NOT_HERE, "the model was unloaded before the call could run"))

    async def close(self) -> None:
        """Answers all calls with an error, without waiting for ONNX Runtime, and ends each thread once it is idle."""
        for run in list(self._live):
            self.stop(run, MeshError(Reason.UNAVAILABLE, "the model server is shutting down"))
        if self._timer is not None:
            self._timer.cancel()
        self._workers.close()

    def _pump(self) -> None:
        """Gives idle threads to waiting calls, one model after the other."""
        skipped = 0
        while self._idle and skipped < len(self._ring):
            line = self._ring.popleft()
            waiting = line.waiting
            while waiting and waiting[0].ended_by is not None:
                waiting.popleft()
            if not waiting:
                self._leave(line)
                continue
            if line.threads >= self._each:
                self._ring.append(line)
                skipped += 1
                continue
            run = waiting.popleft()
            if waiting:
                self._ring.append(line)
            self._start(run, line)

    def _leave(self, line: Line) -> None:
        """Forgets a line if it has no calls left."""
        if not line.threads and not line.waiting:
            self._lines.pop(line.copy, None)

    def _start(self, run: Run, line: Line) -> None:
        self._idle -= 1
        self._waiting -= 1
        line.threads += 1
        run.running = True
        run.call.forget()
        run.options = session.run_options()
        run.copy.row.run()

        def work() -> None:
            busy = run.work(self.clock, self._board.at_work, self.error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._done, run, busy)

        self._workers.put(work)

    def _done(self, run: Run, busy_ns: int) -> None:
        self._idle += 1
        copy, line = run.copy, run.line
        assert line is not None
        line.threads -= 1
        self._leave(line)
        if run.stopped_at == math.inf:
            self._endless -= 1
        if run.stuck:
            self._idle -= 1
            self._spare += 1
        if run.error is None or run.ended_by is not None:
            copy.pace.note(run.size, busy_ns)
        self._finish(run, ran=1)
        self._pump()

    def _finish(self, run: Run, *, ran: int) -> None:
        """Answers a call unless it was answered already, and forgets it."""
        self._live.discard(run)
        self._bytes -= run.held
        run.asked = run.read = None
        run.sent = b""
        error = run.ended_by or run.error
        if not (ran and run.ended_by):
            run.call.on_cancel(None)
            if error is None:
                run.call.reply_in_pieces(run.pieces, answers.load(len(self._live)))
            else:
                answers.fail(run.call, error)
        now = time.monotonic_ns()
        code = 0 if error is None else int(error.reason.code)
        run.copy.row.end(now, runs=ran, busy_ns=run.busy_ns, failed=code != 0)
        self._board.observe(0, code, now - run.started_ns)
        run.copy.answered()
        run.pieces = []

    def _sweep(self) -> None:
        """Ends calls whose deadline has passed, and finds those that do not end."""
        now = self._loop.time()
        try:
            for run in list(self._live):
                if run.ended_by is None:
                    if run.deadline <= now:
                        took = (time.monotonic_ns() - run.started_ns) / 1e9
                        what = "the model was still running" if run.running else "the call still waited for a thread"
                        self.stop(run, MeshError(Reason.DEADLINE, f"{what} after {took:.3g} s"))
                elif not run.stuck and now - run.stopped_at > _STUCK:
                    self._give_up(run)
        finally:
            self._timer = self._loop.call_later(_SWEEP, self._sweep) if self._live else None

    def _give_up(self, run: Run) -> None:
        run.stopped_at = math.inf
        self._endless += 1
        log.error("a call cannot be ended", model=run.copy.model_id, seconds=_STUCK, threads=self._workers.count)
        if self._spare:
            self._spare -= 1
        elif self._workers.count < self._most:
            self._workers.grow()
        else:
            return
        run.stuck = True
        self._idle += 1
        self._pump()
