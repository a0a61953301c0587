"""What a router process knows of the mesh: models, pods, copies, and the configuration in etcd."""
