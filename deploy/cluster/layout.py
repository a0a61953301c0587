"""The cluster's folders and addresses, and the versions of its parts.

Files that take minutes to make stay in `.cache/cluster`. Files that live as long as the cluster are in /run, because
paths of sockets must be short. A machine can run only one cluster, because the addresses are fixed.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent

CACHE = ROOT / ".cache" / "cluster"
BIN = CACHE / "bin"  # kube, kubectl, helm, etcd, etcdctl, coredns, pause
STORAGE = CACHE / "storage"  # buildah's, separate from the machine's own, so that names in it can replace others
CONTAINERS = CACHE / "containerd"  # containerd's: images survive from one start to the next
PKI = CACHE / "pki"
LOGS = CACHE / "log"
KUBECONFIG = CACHE / "admin.kubeconfig"
HOME = CACHE / "home"  # home of kubectl and helm, which would otherwise keep their caches in the current folder

RUN = Path("/run/mesh-cluster")
OWNER = RUN / "owner"  # names the CACHE of the tree that the cluster was started from
CONTAINERD = RUN / "containerd"  # state and socket
CONTAINERD_SOCKET = CONTAINERD / "containerd.sock"
KUBELET = RUN / "kubelet"
ETCD = RUN / "etcd"
IPAM = RUN / "ipam"
NET = RUN / "net.d"
BUILDING = Path("/run/mesh-cluster-build")  # buildah's, while it works
BEFORE = RUN / "sysctl.json"  # former kernel settings, to restore them

# Private addresses. A bridge carries each range, with a route to it, so nothing sent there leaves the machine.
NODE = "node-1"
NODE_IP = "10.200.0.1"
NODE_BRIDGE = "mesh-node"
POD_RANGE = "10.244.0.0/24"
POD_BRIDGE = "mesh-pods"
SERVICE_RANGE = "10.96.0.0/16"
API_IP = "10.96.0.1"  # the first of the range, always
DNS_IP = "10.96.0.10"
DOMAIN = "cluster.local"
API_PORT = 6443
ETCD_PORT = 12379

KUBERNETES = "v1.35.4"  # as in programs/kube/go.mod; kubectl refuses to run without an embedded version
HELM = "v3.19.5"
ETCD_VERSION = "v3.6.16"  # as in programs/etcd/go.mod

PAUSE_IMAGE = "localhost/pause:1"
DNS_IMAGE = "localhost/coredns:1"
# The Containerfile's defaults, so that it is tested unchanged.
BASE_IMAGE = "docker.io/library/python:3.11-slim"
ETCD_IMAGE = f"quay.io/coreos/etcd:{ETCD_VERSION}"
