"""The model server's part of a load: one call over the SPI, and the interpretation of the server's failures."""

import time
from dataclasses import replace

from mesh.runtime.blame.history import History
from mesh.runtime.cache.books.account import Account
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.cache.loads.gate import Gate
from mesh.runtime.cache.loads.outcomes import Failed, Refused, Want
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.runtime.servers.spi import Size, SpiError
from mesh.schema import copytoken
from mesh.statuses import Code, Reason
from placement.failures import FailureKind
from puller.puller import Pulled

_WAIT = 5.0  # seconds to wait for a server that died after the load had begun; another pod may be quicker
_SLACK = 15.0  # seconds beyond the limit after which the server must have given up by itself
_DEATH_WAIT = 2.0  # seconds in which a lost connection proves to be a death


class ServerSide:
    """The loads in this pod's server."""

    def __init__(
        self,
        ledger: Ledger,
        server: ServerProcess,
        gate: Gate,
        history: History,
        optimising: Optimising,
        meters: Meters,
        account: Account,
        *,
        incarnation: str,
        load_timeout: float,
    ) -> None:
        """Makes the server's part of loads. `load_timeout` is the model server's own limit for one load, in seconds."""
        self._ledger = ledger
        self._server = server
        self._gate = gate
        self._history = history
        self._optimising = optimising
        self._meters = meters
        self._account = account
        self._incarnation = incarnation
        self.load_timeout = load_timeout
        self.default_bytes = 0
        """The size that a foreign server assumes for models that it knows nothing about; 0 for Mesh's own server, which
        measures all models."""
        self._mute = 0  # life of the server that cannot predict sizes
        self.mean_ms = 0.0  # mean time of the last loads

    @property
    def why_down(self) -> str:
        """The reason why the server is down, or "" if it is up."""
        return self._server.why_down

    async def predicted(self, want: Want, pulled: Pulled) -> int:
        """Returns the number of bytes that a foreign server expects a model to need. Returns 0 if the server does not
        say, or is Mesh's own."""
        if not self.default_bytes or self._mute == self._server.lives:
            return 0
        spi = await self._server.ready(0.0)
        if spi is None:
            return 0
        try:
            return await spi.predict(want.model_id, want.type, str(pulled.path), pulled.key)
        except SpiError as error:
            if error.code is Code.UNIMPLEMENTED:
                self._mute = self._server.lives
            return 0

    async def load(self, want: Want, entry: CacheEntry, pulled: Pulled) -> Size | Refused | Failed:
        """Loads a model whose room is on the books. Returns the size that the server states, and for a foreign server
        also the growth of the server's memory. If Mesh's own server states no size, returns the size on the books. If
        the model was not loaded, returns the reason."""
        ledger = self._ledger
        spi = await self._server.ready(_WAIT)
        if spi is None:
            return Refused(Reason.UNAVAILABLE, self._server.why_down or "the model server is not ready")
        # A pod whose server was down while it had no lease counts as ended: no deletion waits for its later copies.
        if (refused := self._gate.why_refused()) is not None and refused.reason is Reason.REGISTRY_AWAY:
            return refused
        await self._account.prepare()
        if (refused := self._gate.why_full()) is not None:
            return refused
        if not ledger.take_slot(entry):
            return Refused(Reason.NO_ROOM, "this pod holds the largest number of copies that it can have")
        ledger.enter(entry, EntryState.LOADING)
        life = self._server.lives
        began = time.monotonic()
        growth, weighing = None, self._account.begin()
        try:
            size = await spi.load(
                want.model_id,
                want.type,
                str(pulled.path),
                pulled.key,
                copy=copytoken.make(self._incarnation, want.revision, entry.generation),
                slot=entry.slot,
                timeout=self.load_timeout + _SLACK,
                optimised=str(pulled.derived or ""),
            )
        except SpiError as error:
            # The text is for callers, who must not learn where the pod keeps its files.
            error.text = error.text.replace(f"{pulled.path.parent}/", "")
            outcome = await self._not_loaded(entry, error, life)
            if isinstance(outcome, Failed) and pulled.skipped:  # the missing file may be among them
                return replace(outcome, text=f"{outcome.text} (skipped files: {'; '.join(pulled.skipped[:3])})")
            return outcome
        finally:
            growth = self._account.end(weighing)
        if entry not in ledger:  # the server has died since its answer
            return Refused(Reason.UNAVAILABLE, self._server.why_down)
        took_ms = (time.monotonic() - began) * 1000
        self._meters.load_ms.observe(took_ms)
        self.mean_ms += (took_ms - self.mean_ms) / (8 if self.mean_ms else 1)
        self._optimising.loaded(want.model_id, pulled, took_ms)
        if self._account.foreign:
            return replace(size, growth=growth)
        return size if size.footprint.total_bytes else Size(entry.footprint)

    async def _not_loaded(self, entry: CacheEntry, error: SpiError, life: int) -> Refused | Failed:
        if error.lost:
            # The connection shows a death before the process does.
            await self._server.died(life, _DEATH_WAIT)
        if entry not in self._ledger:
            why = self._server.why_down
            if entry.suspect:
                return Failed(Reason.LOAD_FAILED, f"{why} while it loaded this model")
            return Refused(Reason.UNAVAILABLE, f"{why} before it had loaded this model")
        if error.stuck:
            self._history.killed(entry.model_id, entry.revision, error.text, sure=True)
        if error.lost:
            return Refused(Reason.UNAVAILABLE, f"the model server did not load the model: {error.text}")
        if error.code is Code.RESOURCE_EXHAUSTED:
            return Failed(Reason.NO_ROOM, error.text, FailureKind.MEMORY)
        if error.code is Code.FAILED_PRECONDITION:
            return Failed(Reason.LOAD_FAILED, error.text, FailureKind.RULES)
        return Failed(Reason.LOAD_FAILED, error.text)
