"""The processes of a router pod: the pod itself, its workers, and what they are composed of."""
