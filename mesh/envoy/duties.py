"""The long-lived tasks of a process that runs Envoy, and the consequence if one of them ends."""

from mesh.process.tasks import Duty

EDGE = Duty("keep envoy", "an Envoy that dies or hangs is not replaced", turns=60)
EDGE_CERTIFICATE = Duty("follow the edge's certificate", "a renewed certificate is not presented to clients", turns=30)
EGRESS = Duty("keep the egress", "an egress that dies or hangs is not replaced", turns=60)
