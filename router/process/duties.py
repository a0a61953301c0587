"""The long-lived tasks of a router pod and of its workers: what each process is without them.

All are essential: a router has nothing to lose that its next life, seconds later, does not have again.
"""

from mesh.envoy.duties import EDGE, EDGE_CERTIFICATE
from mesh.process.tasks import Duty

FOLLOW_ETCD = Duty("follow etcd", "its workers go on with what was known when it ended")  # changes may be hours apart
TICK = Duty("tick", "suspect pods stay suspect, and it no longer says whether it serves", turns=15)
TAKE_PART = Duty("take part in the mesh", "it never leads, or leads for as long as it lives")
ROSTER = Duty("roster", "the mesh does not know of this router")
POD_CERTIFICATES = Duty("follow certificates", "it shows the mesh a certificate until it expires", turns=30)
WORKER = Duty("keep worker", "a worker that dies or hangs is not replaced", turns=60)

POD = (TAKE_PART, FOLLOW_ETCD, TICK, ROSTER, POD_CERTIFICATES, WORKER, EDGE, EDGE_CERTIFICATE)

ROUNDS = Duty("rounds", "copies are neither added nor trimmed, and leaving pods not emptied", turns=300)
LIVES = Duty("lives", "ids that were unregistered stay blocked, and dead pods' lives stand", turns=300)

LEADER = (ROUNDS, LIVES)
"""Of a router that leads. Where one of them ends, it leads no more, and is elected anew."""

FEED = Duty("follow the feed", "it goes on with what was known when it ended", turns=60)
WORKER_TICK = Duty("tick", "suspect pods stay suspect, and the pod does not hear whether it is ready", turns=15)
WORKER_CERTIFICATES = Duty("follow certificates", "it shows pods a certificate until it expires", turns=30)

WORKERS = (FEED, WORKER_TICK, WORKER_CERTIFICATES)
