"""The etcd server that Mesh starts: as a member of the chart's cluster, and for a local mesh."""
