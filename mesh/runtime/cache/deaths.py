"""Clean-up after the death of the model server, with which everything in its memory is gone.

First, the records of models that may be the cause are marked: those that were loading, running or being freed. Then the
books, the keys and the files are cleaned up. If the agent was killed together with its server, the next agent marks the
records (`blame.earlier`).
"""

from mesh.runtime.blame import suspects
from mesh.runtime.blame.history import History
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers.endings import Death
from mesh.runtime.sharedmemory.atwork import AtWork
from mesh.telemetry import logs
from placement.blame import UNKNOWN
from placement.suspects import suspects as judge

log = logs.get(__name__)

_GONE = (EntryState.LOADING, EntryState.LOADED, EntryState.UNLOADING)


class Deaths:
    """The clean-up after the deaths of one pod's servers."""

    def __init__(
        self,
        ledger: Ledger,
        unloads: Unloads,
        space: Space,
        meters: Meters,
        *,
        files: Files,
        presence: Presence,
        history: History,
        foreign: bool = False,
    ) -> None:
        """Makes the clean-up. `foreign` is True if the servers are behind a relay."""
        self._ledger = ledger
        self._unloads = unloads
        self._space = space
        self._meters = meters
        self._files = files
        self._presence = presence
        self._history = history
        self._foreign = foreign

    def happened(self, death: Death, at_work: AtWork) -> None:
        """Cleans up after a death. Call this method while the use board still shows which models were loading and
        running."""
        self._meters.server_deaths.inc()
        gone = [entry for entry in self._ledger.entries.values() if entry.state in _GONE]
        self._accuse(death, gone, at_work)
        self._unloads.clear()
        for entry in gone:
            self._ledger.remove(entry)
            self._presence.drop(entry.model_id)
            if entry.state is EntryState.LOADING:  # a load removes its own files
                self._files.doom(entry.model_id)
            else:
                self._files.discard(entry.model_id)
        self._space.freed()
        self._presence.changed()

    def _accuse(self, death: Death, gone: list[CacheEntry], at_work: AtWork) -> None:
        held = [(one, one.slot, use) for one in gone if one.slot is not None and (use := self._ledger.use(one))]
        if self._foreign:
            work = suspects.behind_a_relay((one, use) for one, _, use in held)
        else:
            work = suspects.work(held, at_work)
        accused = judge(death.cause, work, thread=death.thread)
        for suspect in accused:
            entry, doing = suspect.model, suspect.doing.value
            text = f"the model server {death.how} while it was {doing} this model"
            requests = [digest for digest in suspect.digests if digest != UNKNOWN]
            if requests:
                text += f" (request {', '.join(requests[:3])})"
            log.warning(
                "this model may have killed the model server",
                model=entry.model_id,
                doing=doing,
                sure=suspect.sure,
                why=suspect.why,
                requests=",".join(requests[:10]),
            )
            # If another model may be the cause, waiters for this load learn that this pod could not take it.
            entry.suspect = suspect.sure or len(accused) == 1
            self._history.killed(entry.model_id, entry.revision, text, sure=entry.suspect, digests=suspect.digests)
