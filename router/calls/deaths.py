"""Models whose calls have recently lost their servers, so that no model or request kills one server after another.

Agents know better which model and which request killed a server, because their use board survives it. They write this
into the model's record, and `placement.blame` draws the conclusion. But that takes a moment, and callers retry at once.
After a call has lost its server, the router therefore reads the model's record before each further call of the model.
This lasts for some seconds, or longer after the loss of a second server. Calls that lose a second server are not
retried (`placement.retry`).

A model counts even if its calls were merely running in the server that another model killed. Each of its calls then
takes some milliseconds longer, because the record is read first.
"""

from cachetools import TTLCache

from router.state.pods import Pod

REMEMBER = 60.0
"""Seconds for which the losses of a model count after the last of them."""

BRIEF = 10.0
"""Seconds for which the record is read after a first loss, and again after each call of a model whose record names
requests to refuse."""

_SAME_MOMENT = 0.5  # seconds: losses in one pod within this time are one death, seen by several calls


class Deaths:
    """The losses that still count. Times are in seconds on any monotonic clock."""

    __slots__ = ("_lost", "watched")

    def __init__(self, *, size: int = 10_000) -> None:
        self._lost: TTLCache[str, frozenset[tuple[str, int]]] = TTLCache(size, REMEMBER)
        self.watched: dict[str, float] = {}
        """The models whose records are read before calls, each with the time until which this lasts. Normally empty, so
        that the check costs nothing."""

    def lost(self, model_id: str, pod: Pod, now: float) -> int:
        """Notes that a connection broke in the middle of a call. Returns the number of servers that calls of the model
        have lost recently, including this one."""
        if now - pod.lost_at > _SAME_MOMENT:
            pod.losses += 1
        pod.lost_at = now
        servers = self._lost.get(model_id, frozenset()) | {(pod.name, pod.losses)}
        self._lost[model_id] = servers
        self.watch(model_id, now, REMEMBER if len(servers) >= 2 else BRIEF)
        return len(servers)

    def watch(self, model_id: str, now: float, seconds: float = BRIEF) -> None:
        """Makes each call of this model read the model's record first, for `seconds`."""
        self.watched[model_id] = max(self.watched.get(model_id, 0.0), now + seconds)

    def settle(self, now: float) -> None:
        """Forgets losses that no longer count. Call this about once a second."""
        if self.watched:
            self._lost.expire()
            self.watched = {model_id: until for model_id, until in self.watched.items() if until > now}
