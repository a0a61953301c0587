"""The Open Inference Protocol, V2: what its servers and its clients here have in common beyond the messages."""

SERVICE = "inference.GRPCInferenceService"

PREFIX = f"/{SERVICE}/".encode()
"""Before the name of each method, as it travels."""
