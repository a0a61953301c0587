"""The memory that an agent shares with its model server or relay: use of copies, calls at work, and the permission to
serve."""
