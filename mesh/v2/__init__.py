"""The Open Inference Protocol, V2: what Mesh's servers and clients of it share beyond the messages."""

SERVICE = "inference.GRPCInferenceService"

PREFIX = f"/{SERVICE}/".encode()
"""Prefix of each method's name on the wire."""
