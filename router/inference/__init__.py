"""V2 inference as functions of its messages, whatever carried them: what gRPC services and REST have in common.

No transport is known here. Who calls is a `Caller`; what fails is a `MeshError`, or the answer of a model server.
"""
