"""Other model servers, measured in the same run, each in its own environment, with the same models.

Modules whose names end in `_app` run in a peer's environment and import nothing of Mesh.
"""
