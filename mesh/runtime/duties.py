"""The long-lived tasks of an agent, its ONNX server and its relay, and the consequence if one of them ends."""

from mesh.envoy.duties import EGRESS
from mesh.process.tasks import Duty

SERVER = Duty("keep the model server", "a server that dies or hangs is not replaced", turns=60)
FOREIGN_SERVER = Duty("keep the server of --server-command", "one that dies is not started again", turns=60)
PRESENCE = Duty("presence", "the mesh's view of this pod is out of date", turns=300)
FENCE = Duty("fence", "the server falls silent once its permission runs out", turns=30)
MEMORY = Duty("memory watch", "models may take more memory than there is", turns=30)
DEVICE_MEMORY = Duty("device memory watch", "models may take more of the device's memory than there is", turns=30)
LOSSES = Duty("lost copies", "copies that the model server has lost look as if they were here", turns=30)
RELIEF = Duty("relief", "a server that has lost all its threads is not replaced", turns=120)
LAST_LOOKS = Duty("last looks at the memory", "a death for lack of memory is blamed on a model", turns=30)
HOUSEKEEPING = Duty("housekeeping", "copies of deleted models stay, and perhaps keys of this pod", turns=300)
CERTIFICATES = Duty("follow certificates", "the pod keeps its certificate until it expires", turns=30)
RATE = Duty("rate", "placement and `mesh top` do not know the pod's rate", essential=False)
ACTIVITY = Duty("activity", "placement does not know the rates of copies", essential=False)
OPTIMISING = Duty("optimising", "models are optimised at each load", essential=False)
LONG_PULLS = Duty("watch pulls", "pulls that take long are not logged", essential=False)

AGENT = (
    SERVER,
    PRESENCE,
    FENCE,
    MEMORY,
    DEVICE_MEMORY,
    LOSSES,
    RELIEF,
    LAST_LOOKS,
    HOUSEKEEPING,
    CERTIFICATES,
    RATE,
    ACTIVITY,
    OPTIMISING,
    LONG_PULLS,
)

BEAT = Duty("beat", "the agent considers the server hung, and replaces it", turns=30)
SERVER_CERTIFICATES = Duty("follow certificates", "the data port keeps its certificate until it expires", turns=30)
TLS_MEMORY = Duty("memory of connections", "TLS connections take memory from models", turns=30)

SERVERS = (BEAT, SERVER_CERTIFICATES, TLS_MEMORY)

LINK = Duty("follow the server", "nobody notices that the model server has gone")
LINK_WATCH = Duty("watch the server", "nobody notices that the model server hangs, or has lost a model", turns=60)
SILENCE = Duty("watch the server's event loop", "a prediction that never ends blocks all models", turns=60)

BESIDE_FOREIGN = (FOREIGN_SERVER,)
"""The additional tasks of an agent that starts a foreign server."""

RELAYS = (BEAT, SERVER_CERTIFICATES, LINK, LINK_WATCH, EGRESS)

RELAYS_TO_ONE_LOOP = (SILENCE,)
"""The additional tasks of a relay to a server whose models run in its event loop."""
