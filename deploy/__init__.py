"""Tools to build Mesh's image, and to run a Kubernetes on this machine for tests. They are not part of an
installation."""
