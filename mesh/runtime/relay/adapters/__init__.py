"""Adapters: the management of model servers that do not speak the SPI, one module for each kind of server.

An adapter is a `Control` (mesh.runtime.relay.control) that turns the SPI's requests into those of its server. What the
server wants is one table at the top of its module.

- `choice` names the adapters;
- `mlserver` manages MLServer;
- `repository` calls the repository extension of V2, which MLServer and Triton have;
- `devicemetrics` adds the memory of a server's GPUs to any control, by the server's metrics;
- `sizes` predicts the size of a model from that of its files;
- `folders` keeps the folder that a server reads its models from, and `contents` finds a model's files.

What all adapters share: the files that the agent has pulled stay as they are. The adapter makes a folder for each model
with links to them, and with the description that the server wants. Sizes are left to the observation of the server's
memory.
"""
