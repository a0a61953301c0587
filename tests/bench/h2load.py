"""The results of h2load, read from its output.

h2load only looks at HTTP's status, which is 200 for gRPC errors too. But the answers of failed calls have no data, so
the data of all answers together show that none has failed.
"""

import re
from typing import NamedTuple


class Counted(NamedTuple):
    """The calls that h2load has made."""

    calls: int
    rate: float  # a second


def counted(text: str, answer: int) -> Counted:
    """Returns the calls of a run with this output. `answer` is the size of the smallest good answer in bytes, with its
    frame. Raises RuntimeError if a call has failed."""
    rate = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", text)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", text)
    traffic = re.search(r"\((\d+)\) data", text)
    bad = counts is None or not int(counts[1]) or any(int(counts[n]) for n in (2, 3, 4))
    if rate is None or counts is None or traffic is None or bad:
        raise RuntimeError(f"h2load: {text[-2000:]}")
    done = int(counts[1])
    if int(traffic[1]) < done * answer:
        raise RuntimeError(f"h2load: answers have {int(traffic[1]) / done:.0f} bytes on average, instead of {answer}")
    return Counted(done, float(rate[1]))
