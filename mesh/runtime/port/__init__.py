"""The rules of a data port, shared by the ONNX server and the relay to a foreign server.

- `copies`: the pod's copies, and the choice of the copy that a call is for;
- `permission`: the copy that a call names, and whether the fence lets this pod answer for it;
- `answers`: *not here*, *verify first*, and errors, for routers and clients;
- `boards`: the agent's use board, opened by the process that writes it;
- `commandline`: the options that the agent gives to every process with a data port.
"""
