"""Cost of the functions that every call passes through, in numbers that do not depend on the machine's load.

Times depend on how busy a machine is. The number of bytecode instructions that an operation executes and its peak
memory do not. They are stored in `figures.json`, with which `make check` compares them.
"""
