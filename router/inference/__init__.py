"""V2 inference as functions of its messages, shared by gRPC services and REST.

This package does not depend on a transport. A `Caller` identifies the caller. A failure is a `MeshError` or a model
server's answer.
"""
