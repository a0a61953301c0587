"""The parts of the Open Inference Protocol (V2) that Mesh's servers and clients share, besides its messages."""

SERVICE = "inference.GRPCInferenceService"

PREFIX = f"/{SERVICE}/".encode()
"""Prefix of each method's name on the wire."""
