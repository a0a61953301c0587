"""A real one-node Kubernetes on this machine, for tests: control plane, kubelet, containerd, names, Pod Security.

`make cluster` builds and starts it, `make cluster-down` leaves the machine as it was. It is made only from Go modules
and Debian packages and pulls no image, so it works without access to a container registry. Its addresses only lead to
this machine, and its pods' traffic to anywhere else is refused.

Where to find what:

- `layout`: folders, addresses, versions; `configs`: the configuration of each part, as data. Neither does any I/O.
- `needs`: requirements of the machine; `programs`: programs built here; `images`: the bases of containers.
- `identity`: certificates and kubeconfigs; `network`: bridge, routes, iptables; `parts`: the processes; `node`:
  leftovers of containers; `lifecycle`: up and down, in order.

It needs only the standard library, since it runs before anything is installed. It does not enforce NetworkPolicies.
"""
