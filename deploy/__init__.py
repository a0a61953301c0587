"""Deployment of Mesh: the image, and a Kubernetes on this machine for tests. Not part of an installation."""
