"""Model servers of others for which Mesh has an adapter; some of them Mesh can install and start by itself.

- `kinds` is the table of the kinds of servers: their model types, and how each is started;
- `environments` makes an environment of its own for a server, from a lock file with hashes;
- `machines` knows on which machines a server can run;
- `torchserve` finds a TorchServe that users have installed, and `availability` says what is missing to start a server;
- `ovms` writes the configuration file of OpenVINO Model Server;
- `locks/` has these lock files;
- `launchers/` has a program for each server, and the runtime with which MLServer serves users' Python code. They run in
  the server's environment, and import nothing of Mesh;
- `handlers/` has modules that are copied beside models, where a server imports them.
"""
