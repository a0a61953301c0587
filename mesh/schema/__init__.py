"""What stands in etcd: keys, records, and the owner of a prefix."""
