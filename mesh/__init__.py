"""The runtime pod, the command line, a mesh on one machine, and the code that all processes of a mesh share."""

import os

# gRPC's C core writes its own lines to standard error (each refused handshake, each lost connection), between our JSON
# and in the middle of a command's answer; the error of a call already says the same. gRPC reads this variable when it
# is loaded, so we set it before any of our modules can load gRPC, and our child processes inherit it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
