"""Exit statuses by which a relay tells its agent what became of the model server."""

GONE = 70
"""The server ended, or a fresh one stands in its place: its models are gone."""

HUNG = 71
"""The server does not answer."""
