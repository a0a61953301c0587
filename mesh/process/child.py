"""Child processes that never outlive their parent.

A parent that is killed with SIGKILL cannot clean up, so each child asks the kernel to be killed together with its
parent (PR_SET_PDEATHSIG). A *tether* asks: a small interpreter that becomes the program by `exec`, so that the child
keeps its pid and no process remains in between. `preexec_fn` would need no tether, but it runs Python between fork and
exec, when gRPC's threads may hold any lock. The tether costs 13 ms (11 of them the interpreter's own start).

The kernel sends that signal when the *thread* that started the child ends. So start children from a thread that lives
as long as the process, as the event loop's thread does.

Each child leads its own session: Ctrl-C in a terminal reaches only the top process, which ends the rest in order; and
processes that a child leaves in its session are killed when it ends.

The event loops' own subprocess support is not used: uvloop forks and runs Python in the child, and asyncio in Python
3.11 keeps a thread for each child. `subprocess` does neither, and a pidfd reports the end.

Callers decide what to start, when to start it again, and what its lines mean.
"""

import asyncio
import codecs
import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from mesh.process import heartbeat
from mesh.telemetry import logs

log = logs.get(__name__)

MAX_LINE = 16 * 1024
"""Number of characters of a line of output that are passed on. The number of dropped characters replaces the rest of
the line."""

_TAIL = 30  # last lines kept, to say why a child ended
_OUTPUT_GRACE = 0.5  # seconds to wait for the remaining output of a child that has ended

# `_ctypes` and `_signal` instead of their public wrappers: the whole start takes 12.5 ms instead of 20.8. SIGPIPE is
# reset because the interpreter ignores it, and the program would inherit that.
_TETHER = """
import _ctypes, _signal, os, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")
if _ctypes.call_function(prctl, (1, 9, 0, 0, 0)):
    os.write(2, b"prctl(PR_SET_PDEATHSIG) failed: this process would outlive its parent\\n")
    os._exit(126)
if os.getppid() != parent:
    os._exit(125)
_signal.signal(_signal.SIGPIPE, 0)
try:
    os.execvp(argv[0], argv)
except OSError as error:
    os.write(2, f"cannot start {argv[0]}: {error.strerror}\\n".encode("utf-8", "replace"))
    os._exit(127)
"""


def tethered(argv: Sequence[str]) -> list[str]:
    """Returns a command line that runs `argv` as a process which is killed when the thread that starts it ends. That
    must be a thread of this process. Returns `argv` itself on systems other than Linux."""
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *argv]


class Process:
    """A running child. Made by `spawn()`."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        child: "subprocess.Popen[bytes]",
        on_line: Callable[[str], None] | None,
        on_exit: Callable[[int], None] | None,
        beats: heartbeat.Heartbeat | None = None,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.pid = child.pid
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._output = _Output(name, on_line, self._output_ended)
        self._on_exit = on_exit
        self._beats = beats
        self._exited = False  # the child has ended, though perhaps not its output
        self._ended: asyncio.Future[int] = self._loop.create_future()  # the child and its output have ended
        self._transport: asyncio.BaseTransport | None = None
        self._pidfd = -1

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else describe_exit(self.returncode)
        return f"<Process {self.name} pid {self.pid}: {state}>"

    @property
    def returncode(self) -> int | None:
        """The exit status: None while the child runs, -N if signal N ended it."""
        return self._child.returncode if self._exited else None

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines of the child's output, to say why it ended."""
        return tuple(self._output.tail)

    def heard(self) -> float:
        """Returns the time at which the child's event loop last gave a sign of life, in seconds of the monotonic clock,
        or 0 if it has not given one yet, or was spawned without `beats`."""
        return self._beats.last() if self._beats is not None else 0.0

    async def wait(self, timeout: float | None = None) -> int:
        """Waits until the child has ended and its output is read. Returns the exit status. Raises TimeoutError after
        `timeout` seconds.

        If the wait is cancelled, the child continues.
        """
        done, _ = await asyncio.wait({self._ended}, timeout=timeout)
        if not done:
            raise TimeoutError(f"{self.name} (pid {self.pid}) did not end within {timeout:g} s")
        return self._ended.result()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the child only. Does nothing if the child has ended."""
        if not self._exited:  # before `_reap()` the pid still belongs to the child
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL to the child and everything it started in its own session."""
        if not self._exited:
            os.killpg(self.pid, signal.SIGKILL)

    async def terminate(self, grace: float) -> int:
        """Ends the child: SIGTERM first, SIGKILL to its whole session `grace` seconds later. Returns its exit status.

        SIGTERM is sent only to the child, which ends its own children in the right order. If the caller is cancelled,
        sends SIGKILL immediately.
        """
        self.send_signal(signal.SIGTERM)
        try:
            return await self.wait(grace)
        except TimeoutError:
            log.warning("process did not end in time, killing it", process_name=self.name, pid=self.pid, grace=grace)
        finally:
            self.kill()
        return await self.wait(10.0)  # only a process that is blocked in the kernel takes longer

    async def _start(self) -> None:
        """Begins to read the child's output and to wait for its end."""
        assert self._child.stdout is not None
        self._transport, _ = await self._loop.connect_read_pipe(lambda: self._output, self._child.stdout)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # a kernel before 5.3, or a sandbox without them
            threading.Thread(target=self._watch, name=f"end of {self.name}", daemon=True).start()
        else:
            self._loop.add_reader(self._pidfd, self._reap)

    def _watch(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is left to notify
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        """Kills the rest of the ended child's session, then reaps the child. Until then, its pid and session id cannot
        belong to another process."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._child.wait()
        self._exited = True
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        # A grandchild in a session of its own may hold the pipe open: only the child's end counts.
        self._loop.call_later(_OUTPUT_GRACE, self._finish)
        if self._output.ended:
            self._finish()

    def _output_ended(self) -> None:
        if self._exited:
            self._finish()

    def _finish(self) -> None:
        if self._ended.done():
            return
        self._output.flush()
        if self._transport is not None:
            self._transport.close()
        self._ended.set_result(self._child.returncode)
        if self._on_exit is not None:
            try:
                self._on_exit(self._child.returncode)
            except Exception:
                log.exception("handling the end of a process failed", process_name=self.name)


async def spawn(
    argv: Sequence[str],
    *,
    name: str,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    tether: bool = True,
    pass_fds: Sequence[int] = (),
    beats: bool = False,
    on_line: Callable[[str], None] | None = None,
    on_exit: Callable[[int], None] | None = None,
) -> Process:
    """Starts a child with an empty standard input and both its outputs passed line by line to `on_line`.

    `argv[0]` is a path or a name on PATH. `env` is the child's complete environment; None means a copy of this
    process's. `on_exit` is called once, with the exit status, after the last line. The event loop calls the callbacks,
    which must be quick. If a callback raises, the error is logged. A program that cannot be executed ends with status
    127 and a line that says why; without the tether, this function raises OSError. A cancelled call leaves no child.
    With `beats`, the child gets a page for signs of life (`heartbeat`).
    """
    page = heartbeat.Heartbeat() if beats else None
    if page is not None:
        env = {**(os.environ if env is None else env), heartbeat.VARIABLE: str(page.descriptor)}
        pass_fds = (*pass_fds, page.descriptor)
    try:
        child = _popen(argv, tether=tether, env=env, cwd=cwd, pass_fds=pass_fds)  # vfork and exec take 1 ms
    finally:
        if page is not None:
            page.release()
    process = Process(name, argv, child, on_line, on_exit, page)
    try:
        await process._start()
    except BaseException:
        child.kill()
        child.wait()
        raise
    return process


def _popen(
    argv: Sequence[str],
    *,
    tether: bool,
    env: Mapping[str, str] | None,
    cwd: str | os.PathLike[str] | None,
    pass_fds: Sequence[int],
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        tethered(argv) if tether else list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=None if env is None else dict(env),
        cwd=cwd,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )


def describe_exit(returncode: int) -> str:
    """Describes an exit status for people, as a predicate: `ended with status 1`, `was killed by SIGKILL`."""
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


class _Output(asyncio.Protocol):
    """Splits a child's output into lines."""

    def __init__(self, name: str, on_line: Callable[[str], None] | None, on_end: Callable[[], None]) -> None:
        self.tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
        self.ended = False
        self._name = name
        self._on_line = on_line
        self._on_end = on_end
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._dropped = 0  # characters of the current line that were not kept

    def data_received(self, data: bytes) -> None:
        *lines, rest = self._decoder.decode(data).split("\n")
        for line in lines:
            self._append(line)
            self._give()
        self._append(rest)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._on_end()

    def flush(self) -> None:
        """Passes on a last line without a newline."""
        if self._line:
            self._give()

    def _append(self, text: str) -> None:
        room = MAX_LINE - len(self._line)
        self._line += text[:room]
        self._dropped += max(0, len(text) - room)

    def _give(self) -> None:
        line = self._line.rstrip("\r")
        if self._dropped:
            line += f" ...[{self._dropped} more characters]"
        self._line, self._dropped = "", 0
        self.tail.append(line)
        if self._on_line is not None:
            try:
                self._on_line(line)
            except Exception:
                log.exception("handling a line of output failed", process_name=self._name)
