"""The cost of the functions that every call passes through, in figures that do not depend on the machine's load.

Times depend on how busy a machine is. The number of bytecode instructions that an operation executes, and the most
memory that it holds at once, are the same in each run. They are stored in `figures.json`, and `make check` compares.
"""
