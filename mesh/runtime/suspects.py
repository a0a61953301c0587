"""Who may have brought the model server down: what the use board says was at work at that moment.

The board outlives the server, so it shows what was loading and what was running when it died. All of them are suspects;
which one it was nobody can tell, and an innocent one is rarely there twice. Freeing a model has crashed servers too,
but copies come and go all the time, so it is a suspicion only where nothing else was going on.
"""

from collections.abc import Iterable

from mesh.runtime.board import State
from mesh.runtime.ledger import Entry, Ledger


def suspects(ledger: Ledger, entries: Iterable[Entry]) -> list[tuple[Entry, str]]:
    """Those of `entries` that were at work, and what at: loading, running or freeing. Before the board is reset."""
    working, freeing = [], []
    for entry in entries:
        use = ledger.use(entry)
        if use is None:
            continue
        if use.state is State.LOADING:
            working.append((entry, "loading"))
        elif use.running:
            working.append((entry, "running"))
        elif use.state is State.UNLOADING:
            freeing.append((entry, "freeing"))
    return working or freeing
