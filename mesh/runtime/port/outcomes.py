"""The exit statuses with which a relay reports to its agent what happened to the model server."""

GONE = 70
"""The server ended, or a new one replaced it, so its models are lost."""

HUNG = 71
"""The server does not answer, so it may hang."""
