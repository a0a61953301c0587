"""A real one-node Kubernetes on this machine, for tests: control plane, kubelet, containerd, names, Pod Security.

`make cluster` makes what it needs and starts it, `make cluster-down` leaves the machine as it was. It is made from Go
modules and Debian packages alone, and pulls no image: it works where no container registry can be reached. Its
addresses lead nowhere but to this machine, and what its pods send elsewhere is refused.

Where to find what:

- `layout`: folders, addresses, versions; `configs`: what each part is told, as data. Neither does I/O.
- `needs`: what the machine must have; `programs`: what is built here; `images`: what containers are made from.
- `identity`: certificates and kubeconfigs; `network`: bridge, routes, iptables; `parts`: the processes; `node`: what
  containers leave behind; `lifecycle`: up and down, in order.

Nothing but the standard library, since it runs before anything is installed. It enforces no NetworkPolicy.
"""
