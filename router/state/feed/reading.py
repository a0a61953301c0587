"""The assembly of the pod's messages about one range, in a worker. Complete changes are passed to the range's
reader."""

from router.state.feed.messages import Message, unpack
from router.state.feed.ranges import Item, Reader


class Reading:
    """The reading of one range in one worker. It outlives the connection."""

    __slots__ = ("_items", "epoch", "reader", "revision")

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.epoch = ""  # "": not seen yet
        self.revision = 0
        self._items: list[Item] = []  # the parts of an incomplete change

    def connect(self) -> list[str | int]:
        """Returns how far this worker has read, so that the pod continues there. Discards incomplete changes."""
        self._items = []
        return [self.epoch, self.revision]

    def take(self, what: str, rest: Message) -> None:
        """Handles a message (delta, items, begin, snapshot). `rest` is the part after the range's name. Raises
        ValueError if it is malformed."""
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
