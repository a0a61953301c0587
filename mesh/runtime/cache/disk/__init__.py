"""The files of the pod's models."""
