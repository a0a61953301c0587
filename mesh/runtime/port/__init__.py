"""The rules of a data port, which our ONNX server and the relay beside a foreign server share.

- `copies`: the copies that are here, and the match between a call and the one that it is meant for;
- `permission`: what a call says about its copy, and whether the fence lets this pod answer it;
- `answers`: *not here*, *verify first*, and errors as routers and clients read them;
- `boards`: the agent's use board, opened by the process that writes it;
- `commandline`: the options that the agent gives to every process with a data port.
"""
