"""Who may have brought the model server down: what the use board says was at work at that moment.

The board outlives the server, so it shows what was loading and what was running when it died. All of them are suspects;
which one it was nobody can tell, and an innocent one is rarely there twice. Freeing a model has crashed servers too,
but copies come and go all the time, so it is a suspicion only where nothing else was going on.
"""

from collections.abc import Iterable
from typing import TypeVar

from mesh.runtime.board import State, Use
from mesh.runtime.ledger import Entry, Ledger

T = TypeVar("T")


def suspects(ledger: Ledger, entries: Iterable[Entry]) -> list[tuple[Entry, str]]:
    """Those of `entries` that were at work, and what at: loading, running or freeing. Before the board is reset."""
    uses = ((entry, ledger.use(entry)) for entry in entries)
    return list(working_first((entry, use) for entry, use in uses if use is not None).items())


def working_first(uses: Iterable[tuple[T, Use]]) -> dict[T, str]:
    """What each of them was at, those that were at nothing left out."""
    working, freeing = {}, {}
    for whose, use in uses:
        if use.state is State.LOADING:
            working[whose] = "loading"
        elif use.running:
            working[whose] = "running"
        elif use.state is State.UNLOADING:
            freeing[whose] = "freeing"
    return working or freeing
