"""Traces: requests in the shapes of real traffic. Each is a stream of (milliseconds, model), in the order of time.

Rates are totals for the whole mesh. A cache only sees the order of the models and the time between two uses. All random
numbers come from a seed.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator

Request = tuple[int, str]
Trace = Iterator[Request]

RATE = 200.0
"""Requests a second."""

DAY_MS = 86_400_000


def _names(models: int) -> list[str]:
    width = len(str(models - 1))
    return [f"m{number:0{width}d}" for number in range(models)]


def zipf(models: int, requests: int, *, alpha: float = 0.9, rate: float = RATE, seed: int = 0) -> Trace:
    """Generates Poisson arrivals with a constant popularity that falls with rank as `rank ** -alpha`."""
    draw = random.Random(seed)
    names = _names(models)
    draw.shuffle(names)  # so that popularity does not depend on the name
    weights = list(itertools.accumulate((rank + 1) ** -alpha for rank in range(models)))
    now = 0.0
    for start in range(0, requests, 4096):
        for name in draw.choices(names, cum_weights=weights, k=min(4096, requests - start)):
            now += draw.expovariate(rate) * 1000
            yield int(now), name


def scan(
    models: int, requests: int, *, alpha: float = 0.9, rate: float = RATE, share: float = 0.2, seed: int = 0
) -> Trace:
    """Generates a Zipf trace in which, from time to time, a job calls every model once. The jobs make up about `share`
    of all requests."""
    names = _names(models)
    usual = zipf(models, requests, alpha=alpha, rate=rate, seed=seed)
    jobs = max(1, round(requests * share / models))
    # The jobs begin at equal distances; during one, every second request is the job's.
    every = max(1, round(requests * (1 - share) / jobs))
    made = 0
    scanning: Iterator[str] = iter(())
    for number, (now, name) in enumerate(usual):
        if made >= requests:
            return
        if number % every == every // 2:
            scanning = iter(names)
        yield now, name
        made += 1
        for scanned in itertools.islice(scanning, 1):
            if made < requests:
                yield now, scanned
                made += 1


def diurnal(
    models: int, requests: int, *, alpha: float = 0.9, rate: float = RATE, zones: int = 24, seed: int = 0
) -> Trace:
    """Generates a Zipf trace in which each model is active for about half of the day, in its own time zone, so that the
    hot set moves."""
    draw = random.Random(seed + 1)
    # A day is at most half as long as the trace, because a million requests at 200/s cover a twentieth of a real day.
    length = requests / rate * 1000
    day = min(DAY_MS, length / 2) if requests else DAY_MS
    asleep: dict[str, float] = {}
    made = 0
    for now, name in zipf(models, 4 * requests + 1000, alpha=alpha, rate=2 * rate, seed=seed):
        phase = asleep.get(name)
        if phase is None:
            phase = asleep[name] = draw.randrange(zones) / zones
        # Between 0 and 1, smoothly: on average half of the drawn requests are used.
        if draw.random() < 0.5 + 0.5 * math.sin(2 * math.pi * (now / day + phase)):
            yield now, name
            made += 1
            if made >= requests:
                return


_TIMERS = ((60.0, 0.35), (300.0, 0.30), (900.0, 0.10), (3600.0, 0.20), (86_400.0, 0.05))
"""Periods in seconds, each with the share of timers that have it."""


def azure(models: int, requests: int, *, rate: float = RATE, seed: int = 0) -> Trace:
    """Generates calls like those of functions in a public cloud (Shahrad and others, "Serverless in the Wild", USENIX
    ATC 2020): rates over eight orders of magnitude; about half of the models are called once an hour or less, while a
    hundredth of them gets nearly all calls; almost a third of the models are called by timers with round periods, the
    others in bursts or at random times.

    The shape is taken from the paper; the figures are rough, and scaled to a total of `rate`.
    """
    draw = random.Random(seed)
    kinds: list[tuple[str, float]] = []
    for _ in range(models):
        if draw.random() < 0.29:
            period = draw.choices([p for p, _ in _TIMERS], [w for _, w in _TIMERS])[0]
            kinds.append(("timer", 1.0 / period))
        else:
            # Calls a day, log-normal around a few dozen, with a long tail.
            per_day = math.exp(draw.normalvariate(math.log(24), 3.2))
            kinds.append(("burst" if draw.random() < 0.3 else "poisson", min(per_day, 1e7) / 86_400))
    total = sum(frequency for _, frequency in kinds)
    stretch = rate / total  # scales time so that all requests together arrive at the rate
    due: list[tuple[float, int]] = []
    for number, (_, frequency) in enumerate(kinds):
        due.append((draw.random() / (frequency * stretch), number))
    heapq.heapify(due)
    names = _names(models)
    for _ in range(requests):
        now, number = due[0]
        yield int(now * 1000), names[number]
        kind, frequency = kinds[number]
        frequency *= stretch
        if kind == "timer":
            pause = 1 / frequency
        elif kind == "poisson":
            pause = draw.expovariate(frequency)
        elif draw.random() < 0.9:  # within a burst of ten, on the average
            pause = draw.expovariate(20 * frequency)
        else:
            pause = draw.expovariate(frequency / 5.5)
        heapq.heapreplace(due, (now + pause, number))


SHAPES: dict[str, Callable[..., Trace]] = {"zipf": zipf, "scan": scan, "diurnal": diurnal, "azure": azure}
