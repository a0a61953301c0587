"""Shared memory of an agent and its model server: use of copies, calls at work, and the permission to serve."""
