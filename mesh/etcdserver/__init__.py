"""The etcd server that Mesh starts, as a member of the chart's cluster or for a local mesh."""
