"""The schema of the data in etcd: keys, records, and the owner of a prefix."""
