"""Rendezvous (highest random weight) hashing: a draw among pods that has the same outcome in every router.

Each (model, pod) pair has a fixed number between 0 and 1; the pod with the best score takes the model. Routers with
equal views therefore agree without communication; models are distributed over the pods in proportion to the pods'
weights; a pod that comes or goes only moves its own share. The weighting is the logarithmic method of Schindelhauer and
Schomaker ("Weighted Distributed Hash Tables", SPAA 2005): with score = weight / -ln(u), the chance to win is weight
over the sum of weights.

The hash is BLAKE2b, because Python's own `hash()` of a string differs between processes.
"""

import hashlib
import math


def score(model_id: str, pod: str, weight: float) -> float:
    """Returns the score of a pod for a model; the largest wins. `weight` must be positive."""
    # The leading length distinguishes ("ab", "c") from ("a", "bc").
    pair = f"{len(model_id)}:{model_id}{pod}".encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest(), "big")
    # 52 bits and a half: never exactly 0 nor, after rounding to a double, exactly 1, whose logarithm is 0.
    return weight / -math.log(((drawn >> 12) + 0.5) / 2**52)
