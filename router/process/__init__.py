"""The processes of a router pod: the pod itself, its workers, and their parts."""
