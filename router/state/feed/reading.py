"""How far a worker has read one range: what the pod tells of it, put together and handed to its reader."""

from router.state.feed.messages import Message, unpack
from router.state.feed.ranges import Item, Reader


class Reading:
    """One range of one worker. It outlives the connection."""

    __slots__ = ("_items", "epoch", "reader", "revision")

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.epoch = ""  # "": it has not been seen yet
        self.revision = 0
        self._items: list[Item] = []  # what has come of a change that is not complete

    def connect(self) -> list[str | int]:
        """Returns how far it has read, for the pod to go on from there: what came incomplete is void."""
        self._items = []
        return [self.epoch, self.revision]

    def take(self, what: str, rest: Message) -> None:
        """Takes a message (delta, items, begin, snapshot); `rest` is what follows the range's name. Raises ValueError
        where that is not what belongs there."""
        if what == "delta":
            revision, changes = rest
            items = unpack(changes)
            if self._items:
                items, self._items = self._items + items, []
            self.reader.delta(revision, items)
            self.revision = revision
        elif what == "items":
            (portion,) = rest
            self._items += unpack(portion)
        elif what == "begin":
            self._items = []
        else:
            epoch, revision = rest
            items, self._items = self._items, []
            self.reader.snapshot(revision, items)
            self.epoch, self.revision = epoch, revision
