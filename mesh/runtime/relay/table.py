"""The relay's list of the copies in the foreign server: their slots, their calls, and lost copies."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.port.copies import Copies
from mesh.runtime.relay.journal import Held, Journal
from mesh.runtime.sharedmemory.board import Board
from mesh.runtime.sharedmemory.slot import Row, SlotState
from mesh.telemetry import logs

log = logs.get(__name__)

_AGAIN = 60.0
"""Seconds after a loss during which *not found* for the same model counts as the model's own answer, because another
load would not help."""

_MAX_LOSSES = 1000  # models whose losses are kept


class CallInFlight(Protocol):
    """The part of a call in flight that its copy needs."""

    def cancel(self) -> object:
        """Ends the call. It then leaves the copy."""


class RelayedCopy:
    """One copy, from its load until its unload."""

    __slots__ = ("_empty", "calls", "gate", "limited", "model_id", "name", "row", "token")

    def __init__(self, model_id: str, token: bytes, row: Row, *, concurrency: int = 0, name: str = "") -> None:
        """Makes a copy. `name` is the server's name for the model; "" means the id. `concurrency` limits its calls at
        the same time; 0 means no limit."""
        self.model_id = model_id
        self.name = name or model_id
        self.token = token
        self.row = row
        self.gate: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
        self.calls: set[CallInFlight] = set()
        self.limited = False  # calls may have to wait at the gate
        self._empty: asyncio.Event | None = None  # made by `drain`
        self.limit(concurrency)

    def limit(self, concurrency: int) -> None:
        """Limits the number of calls that the server gets at the same time; 0 means no limit."""
        if concurrency:
            self.gate = asyncio.Semaphore(concurrency)
            self.limited = True

    def left(self, call: CallInFlight) -> None:
        """Forgets a call that has ended."""
        self.calls.discard(call)
        if self._empty is not None and not self.calls:
            self._empty.set()

    async def drain(self, grace: float) -> None:
        """Waits for the calls in flight, and ends the calls that remain after `grace` seconds. No call may begin
        meanwhile."""
        if not self.calls:
            return
        self._empty = asyncio.Event()
        for seconds in (grace, 1.0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._empty.wait()
            for call in tuple(self.calls):
                call.cancel()


class Table:
    """All copies. `copies` contains the copies that answer calls."""

    def __init__(self, board: Board, journal: Journal) -> None:
        self.copies: Copies[RelayedCopy] = Copies()
        self.going: dict[tuple[str, bytes], RelayedCopy] = {}  # by id and token: being unloaded, or lost
        self._board = board
        self._journal = journal
        self._losses: dict[str, float] = {}  # monotonic times of losses, by id

    def row(self, slot: int | None) -> Row:
        """Returns the writer of a slot. For None, returns a writer whose counts no process reads."""
        return self._board.row(self._board.nobody if slot is None else slot)

    def resume(
        self,
        status: pb.RuntimeStatusResponse,
        held: list[Held],
        *,
        named: Callable[[str], str] = lambda model_id: model_id,
    ) -> None:
        """Takes over the copies of a relay that died. `named` returns the server's name for a model. Call it after
        `Board.attach`."""
        for one in held:
            row = self.row(one.slot if one.slot >= 0 else None)
            if one.slot >= 0:
                row.resume(self._board.read(one.slot))
            name = named(one.model_id)
            self.copies.add(RelayedCopy(one.model_id, one.token.encode(), row, concurrency=one.concurrency, name=name))
        self._journal.begin(status, held)

    def begin(self, status: pb.RuntimeStatusResponse, *, former: bool) -> None:
        """Begins with a server that has no copies. `former` is recorded for the next relay (`Control.former`)."""
        self._journal.former = former
        self._journal.begin(status, [])

    def loaded(self, copy: RelayedCopy, *, slot: int | None, concurrency: int) -> None:
        """Adds a copy that can serve. `slot` is None if the copy has none. `concurrency` limits its calls; 0 means no
        limit."""
        copy.limit(concurrency)
        copy.row.mark(SlotState.LOADED)
        self.copies.add(copy)
        token = copy.token.decode()
        self._journal.add(Held(copy.model_id, token, -1 if slot is None else slot, concurrency))

    def withdraw(self, model_id: str, token: bytes) -> RelayedCopy | None:
        """Removes a copy before its unload, so that it answers no more calls, and returns the copy, even if it was
        withdrawn before. Returns None for an unknown copy. An empty token matches any copy that answers calls."""
        if (going := self.going.get((model_id, token))) is not None:
            return going
        for copy in self.copies.all_of(model_id):
            if not token or copy.token == token:
                self.copies.remove(copy)
                copy.row.mark(SlotState.UNLOADING)
                self.going[model_id, copy.token] = copy
                self._forget(copy)  # at once, because a later relay must not answer for it again
                return copy
        return None

    def unloaded(self, copy: RelayedCopy) -> None:
        """Frees the slot of a copy that the server has unloaded."""
        self.going.pop((copy.model_id, copy.token), None)
        copy.row.mark(SlotState.FREE)

    def lose(self, copy: RelayedCopy, why: str) -> bool:
        """Withdraws a copy that the server no longer has. Returns False, and keeps the copy, if the model was lost
        within the last minute and this copy has not answered a call with success: the server then says *not found* for
        another reason."""
        if copy not in self.copies.all_of(copy.model_id):
            return True  # several calls find out about one loss
        now = time.monotonic()
        lately = self._losses.get(copy.model_id)
        if lately is not None and now - lately < _AGAIN and not copy.row.succeeded:
            return False
        self._losses.pop(copy.model_id, None)
        self._losses[copy.model_id] = now
        while len(self._losses) > _MAX_LOSSES:
            del self._losses[next(iter(self._losses))]
        self.copies.remove(copy)
        self.going[copy.model_id, copy.token] = copy  # the agent will ask for its unload
        copy.row.mark(SlotState.LOST)
        self._board.lose()
        self._forget(copy)
        log.warning("copy withdrawn", model=copy.model_id, why=why)
        return True

    def _forget(self, copy: RelayedCopy) -> None:
        self._journal.remove(copy.model_id, copy.token.decode())

    # --- for the link

    def ids(self) -> list[str]:
        """Returns the ids of the copies."""
        return [copy.model_id for copy in self.copies]

    def lost(self, model_id: str, why: str) -> None:
        """Withdraws the copies of an id that the server no longer has."""
        for copy in self.copies.all_of(model_id):
            self.lose(copy, why)
