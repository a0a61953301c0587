"""V2 inference as functions of its messages: what gRPC services and REST have in common.

No transport is known here. A `Caller` says who calls; a failure is a `MeshError`, or the answer of a model server.
"""
