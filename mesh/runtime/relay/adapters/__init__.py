"""Adapters: the management of model servers that do not speak the SPI, one module for each kind of server.

An adapter is a `Control` (mesh.runtime.relay.control) that turns the SPI's requests into those of its server. `choice`
finds the adapter for a kind of server:

- `mlserver`, `torchserve`;
- `triton`, with the layout of its repository (`tritonlayout`) and of `config.pbtxt` (`tritonconfig`);
- `ovms`, with its configuration file and REST API (`ovmsconfig`).

The adapters share these modules:

- `repository` calls the repository extension of V2, which MLServer and Triton have;
- `devicemetrics` adds the memory of a server's GPUs, from the server's metrics, to any control;
- `keys` and `schemas` read what a load request says about the model's type, inputs and outputs;
- `readiness` makes the status of a ready server, `refusals` the errors of loads;
- `sizes` predicts the size of a model from that of its files;
- `folders` keeps the folder that a server reads its models from, and `contents` finds a model's files.

No adapter changes the files that the agent has pulled. It makes a folder for each model with links to them, and with
the description that the server wants. As most servers do not know the sizes of their models, the agent observes the
server's memory.
"""
