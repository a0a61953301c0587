"""Tokens of service accounts, which Kubernetes verifies (TokenReview).

A verdict is fresh for a minute. An older verdict still serves while the next review runs in the background, so that
calls with a token in regular use do not wait for Kubernetes. If that review refuses the token, its caller is forgotten
immediately. While Kubernetes does not answer, the last verdict is valid for ten minutes.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import LRUCache

from mesh.access.principals import Principal
from mesh.process.tasks import Tasks
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.tokens import identities, verification
from mesh.tokens.kubernetes import Review
from mesh.tokens.locations import LocationError
from mesh.tokens.verification import TokenError, Unverified
from router.access.credentials import Identified, Later
from router.access.pace import Failures

log = logs.get(__name__)

FRESH = 60.0
"""Seconds for which a verdict is fresh."""

STALE = 600.0
"""Seconds for which a verdict is valid while Kubernetes does not answer."""

FAILURES = (10.0, 40.0)
"""Number of tokens that Kubernetes may refuse per second, and in a burst. Once it has refused more, no unknown token is
reviewed for a while."""

MAX_WAITING = 256
"""Largest number of concurrent reviews."""

_AGAIN = 5.0  # seconds until the next call with an old verdict begins another review
_MAX_VERDICTS = 4096
_SKEW = 60.0  # seconds; Kubernetes' own clock decides


class Reviews(Protocol):
    """A client of TokenReview."""

    async def review(self, token: bytes) -> Review:
        """Returns the verdict on a token. Raises LocationError if Kubernetes cannot be asked."""

    async def close(self) -> None:
        """Closes the connections."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A verdict that a token is valid. Times are by the wall clock."""

    principal: Principal
    at: float
    until: float  # the end of the token; 0: none

    def holds(self, now: float) -> bool:
        """Returns whether the verdict still counts."""
        return now < self.at + STALE and (not self.until or now < self.until)


class ReviewedTokens:
    """The tokens of the service accounts of one cluster."""

    def __init__(
        self,
        reviews: Reviews,
        *,
        audiences: tuple[str, ...],
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the source. If `audiences` is not empty, a token must be for one of them."""
        self.changed: Callable[[], None] = lambda: None
        self.failures = Failures(*FAILURES, clock=clock)
        self._reviews = reviews
        self._audiences = audiences
        self._wall = wall
        self._tasks = Tasks(awaited=(TokenError, LocationError))
        self._verdicts: LRUCache[bytes, _Verdict] = LRUCache(_MAX_VERDICTS)
        self._asked: dict[bytes, asyncio.Task[_Verdict]] = {}
        self._trouble = ""

    def takes(self, unverified: Unverified) -> bool:
        """Returns whether a token claims to be one of a service account."""
        return identities.is_account(unverified.claims.get("sub"))

    def identify(self, token: bytes, unverified: Unverified) -> Identified | Later:
        """Returns the caller by the last verdict, or a function that asks Kubernetes for a verdict. Raises TokenError,
        MeshError."""
        digest = hashlib.sha256(token).digest()
        now = self._wall()
        verdict = self._verdicts.get(digest)
        if verdict is not None and verdict.holds(now):
            if now >= verdict.at + FRESH and len(self._asked) < MAX_WAITING:
                self._ask(digest, token, unverified)
            return _identified(verdict, max(verdict.at + FRESH, now + _AGAIN))
        # What is certainly wrong is refused without asking: the claims are not proven, but Kubernetes would say so too.
        verification.check_times(unverified.claims, skew=_SKEW, now=now, endless=True)
        if self._audiences and "aud" in unverified.claims:
            verification.check_audience(unverified.claims, self._audiences)
        if digest not in self._asked and (len(self._asked) >= MAX_WAITING or not self.failures.allow()):
            why = "too many are being reviewed" if len(self._asked) >= MAX_WAITING else "too many were invalid"
            text = f"this router does not ask Kubernetes about further tokens now, because {why}: try again"
            raise MeshError(Reason.OVERLOADED, text, retry_after=1.0)
        return lambda: self._later(digest, token, unverified)

    def look(self) -> None:
        """Does nothing, because calls begin the reviews."""

    async def close(self) -> None:
        """Ends the reviews that are under way, and closes the connections."""
        await self._tasks.close()
        await self._reviews.close()

    def statistics(self) -> Mapping[str, Any]:
        """Returns the state of the reviews."""
        return {
            "issuer": "kubernetes",
            "audiences": list(self._audiences),
            "trouble": self._trouble,
            "verdicts": len(self._verdicts),
        }

    async def _later(self, digest: bytes, token: bytes, unverified: Unverified) -> Identified:
        try:
            verdict = await asyncio.shield(self._ask(digest, token, unverified))
        except LocationError:
            text = "this router cannot ask Kubernetes about the token now: try again; the router's log says why"
            raise MeshError(Reason.UNAVAILABLE, text, retry_after=2.0) from None
        return _identified(verdict, verdict.at + FRESH)

    def _ask(self, digest: bytes, token: bytes, unverified: Unverified) -> "asyncio.Task[_Verdict]":
        """Returns the review of a token that is under way, or begins one."""
        task = self._asked.get(digest)
        if task is None:
            task = self._asked[digest] = self._tasks.start(self._review(digest, token, unverified), "review a token")
        return task

    async def _review(self, digest: bytes, token: bytes, unverified: Unverified) -> _Verdict:
        try:
            review = await self._reviews.review(token)
            self._works("")
            if not review.authenticated:
                raise TokenError(f"Kubernetes refuses the token: {review.error or 'it is not authenticated'}"[:300])
            principal = self._same(digest, identities.account(review.username, review.groups))
            ends = unverified.claims.get("exp")  # verified by Kubernetes
            verdict = _Verdict(principal, self._wall(), float(ends) if isinstance(ends, int | float) else 0.0)
            self._verdicts[digest] = verdict
            return verdict
        except LocationError as error:
            self._works(str(error))
            raise
        except TokenError:
            self.failures.failed()
            if self._verdicts.pop(digest, None) is not None:
                self.changed()
            raise
        finally:
            del self._asked[digest]

    def _same(self, digest: bytes, principal: Principal) -> Principal:
        """Returns the principal of the former verdict if it is equal, because decisions about that object are
        cached."""
        former = self._verdicts.get(digest)
        return principal if former is None or former.principal.subjects != principal.subjects else former.principal

    def _works(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.error("Kubernetes cannot be asked about tokens; known tokens stay valid for ten minutes", why=trouble)
        self._trouble = trouble


def _identified(verdict: _Verdict, until: float) -> Identified:
    return Identified(verdict.principal, min(until, verdict.until) if verdict.until else until)
