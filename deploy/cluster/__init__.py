"""A real one-node Kubernetes on this machine, for tests: control plane, kubelet, containerd, DNS and Pod Security.

`make cluster` builds and starts the cluster; `make cluster-down` stops it, and restores the machine's network and
kernel settings. The cluster is built only from Go modules and Debian packages, so it needs no container registry. Its
addresses are reachable only from this machine, and its pods cannot reach anything outside it.

Where to find what:

- `layout`: folders, addresses, versions; `configs`: the configuration of each part, as data. Neither does any I/O.
- `needs`: requirements of the machine; `programs`: programs built here; `images`: the bases of containers.
- `identity`: certificates and kubeconfigs; `network`: bridge, routes, iptables; `parts`: the processes; `node`:
  leftovers of containers; `lifecycle`: up and down, in order.

This package needs only the standard library, since it runs before anything is installed. The cluster does not enforce
NetworkPolicies.
"""
