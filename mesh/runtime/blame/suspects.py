"""What was going on in a model server when it ended, read from the use board, which outlives it.

The board says of each copy whether it was loading, running or being freed, and `atwork` of each thread which copy it
was in and for which request. Who is suspect for that is decided in `placement.suspects`.
"""

from collections.abc import Iterable
from typing import TypeVar

from mesh.runtime.cache.ledger import Entry, Ledger
from mesh.runtime.sharedmemory.atwork import AtWork
from mesh.runtime.sharedmemory.board import State, Use
from placement.suspects import Doing, Work

T = TypeVar("T")


def work(ledger: Ledger, entries: Iterable[Entry], at_work: AtWork) -> list[Work[Entry]]:
    """Returns what each of `entries` that was at work was doing. Call it before the board is reset."""
    found: list[Work[Entry]] = []
    unaccounted: list[Entry] = []  # run once more than threads say
    threads = at_work.threads()
    for entry in entries:
        use = ledger.use(entry)
        if use is None or (doing := _doing(use)) is None:
            continue
        own = [thread for thread in threads if thread.slot == entry.slot]
        found += [
            Work(entry, Doing.RUNNING if one.digest else Doing.LOADING, one.thread, digest=one.digest.hex())
            for one in own
        ]
        if use.running > sum(bool(one.digest) for one in own):
            unaccounted.append(entry)
        elif not own:
            found.append(Work(entry, doing))
    if len(unaccounted) == 1:  # the event loop runs one at a time
        last = at_work.loop()
        return [*found, Work(unaccounted[0], Doing.RUNNING, last.thread, in_loop=True, digest=last.digest.hex())]
    return found + [Work(entry, Doing.RUNNING) for entry in unaccounted]


def working(uses: Iterable[tuple[T, Use]]) -> list[Work[T]]:
    """Returns the same where nothing is known about threads."""
    return [Work(whose, doing) for whose, use in uses if (doing := _doing(use)) is not None]


def _doing(use: Use) -> Doing | None:
    if use.state is State.LOADING:
        return Doing.LOADING
    if use.running:
        return Doing.RUNNING
    return Doing.FREEING if use.state is State.UNLOADING else None
