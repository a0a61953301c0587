"""V2 inference as functions of its messages, shared by gRPC services and REST.

Nothing here depends on a transport. A `Caller` says who calls. A failure is a `MeshError` or a model server's answer.
"""
