"""The work that was under way in a model server when it ended, read from the use board, which outlives the server.

For each copy, the board says whether it was loading, running or being freed. For each thread of Mesh's own server,
`atwork` says on which copy and request it worked; a foreign server's threads are not known. `placement.suspects`
decides which models are suspect.
"""

from collections.abc import Iterable
from typing import TypeVar

from mesh.runtime.sharedmemory.atwork import AtWork
from mesh.runtime.sharedmemory.slot import SlotState, Use
from placement.blame import UNKNOWN
from placement.suspects import Work, WorkKind

T = TypeVar("T")


def work(held: Iterable[tuple[T, int, Use]], at_work: AtWork) -> list[Work[T]]:
    """Returns what Mesh's own server was doing with each copy that was loading, running or being freed. `held` has the
    owner, slot and use of each copy in memory. Call this function before the board is reset."""
    found: list[Work[T]] = []
    unaccounted: list[T] = []  # owners of copies with more calls running than the threads show
    threads = at_work.threads()
    for whose, slot, use in held:
        if (doing := _doing(use)) is None:
            continue
        own = [thread for thread in threads if thread.slot == slot]
        found += [
            Work(whose, WorkKind.RUNNING if one.digest else WorkKind.LOADING, one.thread, digest=one.digest.hex())
            for one in own
        ]
        if use.running > sum(bool(one.digest) for one in own):
            unaccounted.append(whose)
        elif not own:
            found.append(Work(whose, doing))
    if len(unaccounted) == 1:  # the event loop runs one call at a time
        last = at_work.loop()
        return [*found, Work(unaccounted[0], WorkKind.RUNNING, last.thread, in_loop=True, digest=last.digest.hex())]
    return found + [Work(whose, WorkKind.RUNNING) for whose in unaccounted]


def behind_a_relay(uses: Iterable[tuple[T, Use]]) -> list[Work[T]]:
    """Returns what a foreign server was doing with each copy that was loading, running or being freed, according to the
    board of its relay. The board shows calls, but neither threads nor requests."""
    return [
        Work(one.model, one.doing, digest=UNKNOWN if one.doing is WorkKind.RUNNING else "") for one in working(uses)
    ]


def working(uses: Iterable[tuple[T, Use]]) -> list[Work[T]]:
    """Returns what a server was doing with each copy that was loading, running or being freed, from the copies' uses
    alone."""
    return [Work(whose, doing) for whose, use in uses if (doing := _doing(use)) is not None]


def _doing(use: Use) -> WorkKind | None:
    if use.state is SlotState.LOADING:
        return WorkKind.LOADING
    if use.running:
        return WorkKind.RUNNING
    return WorkKind.FREEING if use.state is SlotState.UNLOADING else None
