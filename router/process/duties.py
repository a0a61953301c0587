"""The long-lived tasks of a router pod and its workers, and the consequence if one of them ends.

Nearly all of them are essential, because a restarted router recovers its state within seconds.
"""

from mesh.envoy.duties import EDGE, EDGE_CERTIFICATE
from mesh.process.tasks import Duty

FOLLOW_ETCD = Duty("follow etcd", "its workers go on with outdated state")  # changes may be hours apart
TICK = Duty("tick", "suspect pods stay suspect, and its readiness is outdated", turns=15)
TAKE_PART = Duty("take part in the mesh", "it never leads, or leads for as long as it lives")
ROSTER = Duty("roster", "other routers do not see this one")
POD_CERTIFICATES = Duty("follow certificates", "its certificate for the mesh expires", turns=30)
GRANTS = Duty("follow the file with grants", "changes of that file have no effect", essential=False, turns=60)
DATAPLANE = Duty("follow the data-plane file", "changes of that file have no effect", essential=False, turns=60)
WORKER = Duty("keep worker", "a worker that dies or hangs is not replaced", turns=60)

POD = (TAKE_PART, FOLLOW_ETCD, TICK, ROSTER, POD_CERTIFICATES, DATAPLANE, GRANTS, WORKER, EDGE, EDGE_CERTIFICATE)

ROUNDS = Duty("rounds", "copies are neither added nor trimmed, and leaving pods are not emptied", turns=300)
LIVES = Duty("lives", "unregistered ids stay blocked, and dead pods' lives stay open", turns=300)

LEADER = (ROUNDS, LIVES)
"""The duties of the leader. If one of them ends, the router stops leading and becomes a candidate again."""

FEED = Duty("follow the feed", "it goes on with outdated state", turns=60)
WORKER_TICK = Duty("tick", "suspect pods stay suspect, and the pod does not learn whether it is ready", turns=15)
WORKER_CERTIFICATES = Duty("follow certificates", "its certificate for pods expires", turns=30)

WORKERS = (FEED, WORKER_TICK, WORKER_CERTIFICATES)
