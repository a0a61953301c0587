"""Model servers of others that Mesh can install and start by itself.

- `kinds` is the table of the kinds of servers: their model types, and how each is started;
- `environments` makes an environment of its own for a server, from a lock file with hashes;
- `machines` knows on which machines a server can run;
- `torchserve` finds a TorchServe that users have installed, and `availability` says what is missing to start a server;
- `ovms` writes the configuration file of OpenVINO Model Server;
- `locks/` has these lock files, and `launchers/` a program for each server, which runs in the server's environment and
  imports nothing of Mesh, with the runtime by which MLServer serves Python code of users;
- `handlers/` has modules that are copied beside models, where a server imports them.
"""
