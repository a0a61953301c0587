"""The code that all processes of a mesh share, the runtime pod, the command line, and a mesh on one machine."""

import os

# gRPC's C core writes lines of its own to standard error (each refused handshake, each connection that goes), between
# our JSON and in the middle of a command's answer. What it has to say about a call stands in the call's error. It reads
# this when it is loaded, so it is set before anything of ours can load it, and for the processes that ours start.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
