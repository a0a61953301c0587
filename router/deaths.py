"""Which models' calls lost their servers lately: a model that kills servers must not get a third one.

The agents know better which model it was (their use board survives the server), and write it into the model's record;
two deaths there are its quarantine. But that takes a moment, and callers retry at once. So after the second server lost
in calls of a model, this says so: no retry is made, and for a while each call of it looks into the record first.

A model that merely shared a server with a killer is counted too; it loses a retry and some microseconds.
"""

from cachetools import TTLCache

from router.view import Pod

REMEMBER = 60.0
"""Seconds that a loss counts."""

_SAME_MOMENT = 0.5  # seconds: losses of one pod so close together are one death seen by several calls


class Deaths:
    """The losses of the last minute. Times in seconds on any clock that does not go back."""

    __slots__ = ("_lost", "watched")

    def __init__(self, *, size: int = 10_000) -> None:
        self._lost: TTLCache[str, frozenset[tuple[str, int]]] = TTLCache(size, REMEMBER)
        self.watched: set[str] = set()
        """The models whose calls lost two servers or more. Empty but for trouble, so looking into it costs nothing."""

    def lost(self, model_id: str, pod: Pod, now: float) -> int:
        """A connection broke in the middle of a call; returns how many servers calls of this model have lost so."""
        if now - pod.lost_at > _SAME_MOMENT:
            pod.losses += 1
        pod.lost_at = now
        servers = self._lost.get(model_id, frozenset()) | {(pod.name, pod.losses)}
        self._lost[model_id] = servers
        if len(servers) >= 2:
            self.watched.add(model_id)
        return len(servers)

    def settle(self) -> None:
        """To be called every second or so: losses that no longer count are forgotten."""
        if self.watched:
            self._lost.expire()
            self.watched = {model_id for model_id in self.watched if model_id in self._lost}
