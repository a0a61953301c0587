"""The sizes of loaded models: measured by Mesh's own server, or settled by `placement.account` for a foreign one.

This module also decides how many loads the server runs at once. A server whose memory is observed gets one load at a
time if it has not stated the size of its last model, or if its memory contradicts the sizes that it states. Only then
does the growth of its memory belong to one model.
"""

from dataclasses import replace

from mesh.runtime.cache.books.account import Account
from mesh.runtime.cache.books.entries import CacheEntry
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.loads.outcomes import Want
from mesh.runtime.cache.loads.serverside import ServerSide
from mesh.runtime.servers.spi import Size
from mesh.runtime.turns import Turns
from mesh.telemetry import logs
from placement.account import plausible, settle
from placement.footprint import Footprint
from placement.sizes import Prediction, Source
from puller.puller import Pulled

log = logs.get(__name__)


class Sizing:
    """The sizes of one pod's loads, and the number of loads at once."""

    def __init__(self, ledger: Ledger, server: ServerSide, account: Account, turns: Turns) -> None:
        self._ledger = ledger
        self._server = server
        self._account = account
        self._turns = turns
        self._concurrency = turns.count  # as the server declares it
        self._states = not account.foreign  # the server states its models' sizes

    def resize(self, concurrency: int) -> None:
        """Sets the number of concurrent loads that the server declares."""
        self._concurrency = concurrency
        self.pace()

    def pace(self) -> None:
        """Sets the number of concurrent loads: one if sizes follow from the growth of the server's memory, otherwise
        the number that the server declares."""
        states = self._states and self._ledger.factor.believed
        self._turns.resize(1 if self._account.observes and not states else self._concurrency)

    def counted(self, prediction: Prediction, most_bytes: int) -> Prediction:
        """Returns a prediction as the books count it: with the pod's factor, but of the host's memory not more than
        `most_bytes`, unless the prediction itself is more."""
        guess = prediction.source is not Source.MEASURED
        counted = self._ledger.factor.scaled(prediction.footprint, guessed=guess, least_bytes=prediction.file_bytes)
        host = min(counted.host_bytes, max(most_bytes, prediction.footprint.host_bytes))
        return prediction.of(Footprint(host, counted.device_bytes))

    async def settle(self, want: Want, entry: CacheEntry, pulled: Pulled, prediction: Prediction, size: Size) -> Size:
        """Settles the size of a model that the server has loaded, and notes it in its entry."""
        ledger = self._ledger
        if self._account.foreign and not size.footprint.device_bytes:
            size = await self._of_foreign(want, entry, pulled, prediction, size)
        entry.size = size.footprint if ledger.has_device else Footprint(size.footprint.total_bytes)
        return size

    async def _of_foreign(
        self, want: Want, entry: CacheEntry, pulled: Pulled, prediction: Prediction, size: Size
    ) -> Size:
        ledger, said = self._ledger, size.footprint.host_bytes
        self._states = bool(plausible(said, ledger.capacity.host_bytes))
        self.pace()
        predicted = 0
        if not (self._states and ledger.factor.believed):
            learned = prediction.footprint.total_bytes if prediction.source is Source.TYPE else 0
            predicted = await self._server.predicted(want, pulled) or learned or self._server.default_bytes
        factor = max(1.0, ledger.factor.value)
        settled = settle(
            said=said,
            predicted=predicted,
            remembered=want.footprint.total_bytes,
            reserved=int(entry.footprint.host_bytes / factor),
            free=int(ledger.free.positive.host_bytes / factor),
            capacity=ledger.capacity.host_bytes,
            growth=size.growth,
            believed=ledger.factor.believed,
        )
        entry.guessed = settled.guessed and size.growth is not None
        entry.least_bytes = settled.least_bytes
        log.debug("size settled", model=want.model_id, bytes=settled.bytes, why=settled.why, factor=factor)
        return replace(size, footprint=Footprint(settled.bytes))
