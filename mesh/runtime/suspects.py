"""What was going on in a model server when it ended, read from the use board, which outlives it.

The board says of each copy whether it was loading, running or being freed, and `atwork` of each thread which copy it
was in and for which request. Who is suspect for that is decided in `placement.suspects`.
"""

from collections.abc import Iterable
from typing import TypeVar

from mesh.runtime.atwork import AtWork
from mesh.runtime.board import State, Use
from mesh.runtime.ledger import Entry, Ledger
from placement.suspects import Doing, Work

T = TypeVar("T")


def work(ledger: Ledger, entries: Iterable[Entry], at_work: AtWork) -> list[Work[Entry]]:
    """What those of `entries` were at that were at work. Before the board is reset."""
    found = []
    threads = at_work.threads()
    loop = at_work.loop()
    for entry in entries:
        use = ledger.use(entry)
        if use is None or (doing := _doing(use)) is None:
            continue
        own = [thread for thread in threads if thread.slot == entry.slot]
        found += [
            Work(entry, Doing.RUNNING if one.digest else Doing.LOADING, one.thread, digest=one.digest.hex())
            for one in own
        ]
        left = use.running - sum(bool(one.digest) for one in own)
        if left > 0 and loop is not None and loop.slot == entry.slot:
            found.append(Work(entry, Doing.RUNNING, loop.thread, in_loop=True, digest=loop.digest.hex()))
        elif not own or left > 0:
            found.append(Work(entry, doing))
    return found


def working(uses: Iterable[tuple[T, Use]]) -> list[Work[T]]:
    """The same where nothing is known of threads."""
    return [Work(whose, doing) for whose, use in uses if (doing := _doing(use)) is not None]


def _doing(use: Use) -> Doing | None:
    if use.state is State.LOADING:
        return Doing.LOADING
    if use.running:
        return Doing.RUNNING
    return Doing.FREEING if use.state is State.UNLOADING else None
