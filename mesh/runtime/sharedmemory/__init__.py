"""The memory that an agent and its model server share: use of copies, calls at work, and the permission to serve."""
