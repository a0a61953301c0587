"""The long-lived tasks of whoever keeps an Envoy: what that process is without them."""

from mesh.process.tasks import Duty

EDGE = Duty("keep envoy", "an Envoy that dies or hangs is not replaced", turns=60)
EDGE_CERTIFICATE = Duty("follow the edge's certificate", "clients are shown a certificate until it expires", turns=30)
