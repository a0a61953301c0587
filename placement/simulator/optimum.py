"""The clairvoyant bound: the hit rate that a policy with knowledge of the future would reach.

It assumes one cache with the capacity of all pods, in which loads take no time and every called model must be loaded.
If sizes are equal, the best victim is the model whose next use is farthest away (Belady, "A study of replacement
algorithms", 1966). Otherwise the problem is NP-hard, and the usual heuristic evicts the model with the largest product
of size and time to the next use. Both are tried, and the better result is reported.
"""

import heapq
import random
from collections.abc import Callable, Sequence

from placement.simulator.cluster import Counts
from placement.simulator.fleet import SimulatedModel

_NEVER = 1 << 62
_SAMPLE = 48  # of the residents, of which the largest product is evicted; more only change the third digit


def clairvoyant(
    models: Sequence[str], capacity_bytes: int, model: Callable[[str], SimulatedModel], *, since: int = 0
) -> Counts:
    """Returns the better result of both ways to evict, for calls of these models in this order. A model larger than the
    cache is refused. Only requests from number `since` on are counted."""
    next_use = _next_uses(models)
    found = [way(models, next_use, capacity_bytes, model, since) for way in (_farthest, _largest)]
    return max(found, key=lambda counts: counts.hits)


def _next_uses(models: Sequence[str]) -> list[int]:
    """Returns for each request the index of the next request for the same model."""
    later: dict[str, int] = {}
    found = [0] * len(models)
    for index in range(len(models) - 1, -1, -1):
        found[index] = later.get(models[index], _NEVER)
        later[models[index]] = index
    return found


def _farthest(
    models: Sequence[str], next_use: Sequence[int], capacity: int, model: Callable[[str], SimulatedModel], since: int
) -> Counts:
    counts = Counts()
    resident: dict[str, tuple[int, SimulatedModel]] = {}  # with the next use
    order: list[tuple[int, str]] = []  # (-next use, model); outdated if the resident's differs
    free = capacity
    for index, model_id in enumerate(models):
        if index == since:
            counts = Counts(requests=len(models) - since)
        known = resident.get(model_id)
        if known is not None:
            counts.hits += 1
            one = known[1]
        else:
            one = model(model_id)
            if one.bytes > capacity:
                counts.refused += 1
                continue
            _count(counts, one)
            while free < one.bytes:
                negative, victim = heapq.heappop(order)
                standing = resident.get(victim)
                if standing is not None and standing[0] == -negative:
                    free += standing[1].bytes
                    del resident[victim]
                    counts.evictions += 1
            free -= one.bytes
        resident[model_id] = (next_use[index], one)
        heapq.heappush(order, (-next_use[index], model_id))
    return counts


def _largest(
    models: Sequence[str], next_use: Sequence[int], capacity: int, model: Callable[[str], SimulatedModel], since: int
) -> Counts:
    counts = Counts()
    random_number = random.Random(0).random
    ids: list[str] = []  # of the residents, in no order; the same places in the other two
    uses: list[int] = []
    sizes: list[int] = []
    place: dict[str, int] = {}
    never = 2 * len(models)
    free = capacity
    for index, model_id in enumerate(models):
        if index == since:
            counts = Counts(requests=len(models) - since)
        at = place.get(model_id)
        if at is not None:
            counts.hits += 1
            uses[at] = min(next_use[index], never)
            continue
        one = model(model_id)
        if one.bytes > capacity:
            counts.refused += 1
            continue
        _count(counts, one)
        while free < one.bytes:
            count, victim, most = len(ids), 0, -1
            for _ in range(_SAMPLE):
                drawn = int(random_number() * count)
                if (worth := (uses[drawn] - index) * sizes[drawn]) > most:
                    victim, most = drawn, worth
            free += sizes[victim]
            counts.evictions += 1
            del place[ids[victim]]
            last = ids.pop(), uses.pop(), sizes.pop()
            if victim < len(ids):
                ids[victim], uses[victim], sizes[victim] = last
                place[ids[victim]] = victim
        free -= one.bytes
        place[model_id] = len(ids)
        ids.append(model_id)
        uses.append(min(next_use[index], never))
        sizes.append(one.bytes)
    return counts


def _count(counts: Counts, model: SimulatedModel) -> None:
    counts.misses += 1
    counts.loads += 1
    counts.load_ms += model.load_ms
    counts.loaded_bytes += model.bytes
