"""The order in which a model's copies move to the new content of its registration.

A pod with a copy of the old content loads the new content beside it if there is room for both, so that no call waits.
One pod goes first, so that new content that cannot be loaded costs one failed load and no old copy. Then all other pods
load it at the same time.

A pod without room for both unloads the old copy once another pod has the new content. If no pod has room for both, the
new content goes to a pod without a copy. If there is no such pod either, the old copies stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReloadingCopy:
    """A copy of a model that is being reloaded, or a load in progress."""

    pod: str
    generation: int
    loaded: bool = True
    reachable: bool = True  # its pod takes requests: it is neither draining nor suspect


@dataclass(frozen=True, slots=True)
class ReloadStep:
    """The next step of a reload, and why. A step that has no action and is not `done` means to wait."""

    why: str
    beside: tuple[str, ...] = ()  # pods that load the new content beside the old
    elsewhere: bool = False  # a pod without a copy loads the new content
    unload: tuple[str, ...] = ()  # pods that unload the old copy
    done: bool = False


def step(copies: Sequence[ReloadingCopy], generation: int, no_room: Mapping[str, str]) -> ReloadStep:
    """Returns the next step towards `generation`. `no_room` maps pods that cannot hold both to the reason."""
    old = [copy for copy in copies if copy.generation < generation]
    if not old:
        return ReloadStep("no copy of older content is left", done=True)
    new = [copy.pod for copy in copies if copy.generation >= generation and copy.loaded and copy.reachable]
    movable = sorted(copy.pod for copy in old if copy.loaded and copy.reachable)
    able = [pod for pod in movable if pod not in no_room]
    unable = tuple(pod for pod in movable if pod in no_room)
    if new:
        if not movable:
            return ReloadStep(_waits(old))
        return ReloadStep(f"{new[0]} has the new content", beside=tuple(able), unload=unable)
    if able:
        return ReloadStep("the first copy of the new content", beside=(able[0],))
    if any(copy.generation >= generation for copy in copies):
        return ReloadStep("waits for a load of the new content that is under way")
    if unable:
        return ReloadStep(f"no pod has room for both: {no_room[unable[0]]}", elsewhere=True)
    return ReloadStep(_waits(old))


def _waits(old: Sequence[ReloadingCopy]) -> str:
    return f"waits for {', '.join(sorted(copy.pod for copy in old))}, which are loading, leaving or unreachable"
