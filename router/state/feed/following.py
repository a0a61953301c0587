"""The pod's view of etcd: follows each range that has a reader here or in a worker, and passes on changes.

Each range has its own `Mirror`, which continues from its own revision after a fault. A range that was compacted
meanwhile is read again while the others continue.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from mesh.etcd import Change, Etcd, Mirror, Snapshot
from mesh.schema.keys import Keys
from router.state.feed.rangelog import items_of
from router.state.feed.ranges import Range, Reader


class Following:
    """The followed ranges. `run` starts a duty under a name. `apply` is called with every change."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        *,
        readers: Mapping[Range, Reader],
        apply: Callable[[Range, Change], None],
        run: Callable[[Callable[[], Coroutine[Any, Any, None]], str], object],
    ) -> None:
        """Makes the followed ranges. `readers` are the readers in this process."""
        self._etcd = etcd
        self._keys = keys
        self._readers = readers
        self._apply = apply
        self._run = run
        self._wanted: dict[Range, None] = dict.fromkeys(readers)
        self._mirrors: dict[Range, Mirror] = {}
        self._unread = set(readers)
        self._begun = False
        self.read = asyncio.Event()
        """An event that is set once every range with a reader in this process has been read."""

    def want(self, range: Range) -> None:
        """Starts to follow a range, unless it is followed already. Before `begin`, only notes that the range is
        wanted."""
        self._wanted[range] = None
        if self._begun and range not in self._mirrors:
            self._mirrors[range] = Mirror(self._etcd, *range.bounds(self._keys))
            self._run(functools.partial(self._follow, range), range.name)

    def begin(self) -> None:
        """Begins to follow the wanted ranges. Must be called when their content is known to be this mesh's."""
        self._begun = True
        for range in tuple(self._wanted):
            self.want(range)

    @property
    def stale_for(self) -> float:
        """The seconds for which changes of at least one range have not arrived: 0 while all arrive, and before
        `begin`."""
        return max((mirror.stale_for for mirror in self._mirrors.values()), default=0.0)

    async def _follow(self, range: Range) -> None:
        reader = self._readers.get(range)
        async for change in self._mirrors[range]:
            self._apply(range, change)
            if reader is not None:
                take = reader.snapshot if isinstance(change, Snapshot) else reader.delta
                take(change.revision, items_of(change))
            self._unread.discard(range)
            if not self._unread:
                self.read.set()
