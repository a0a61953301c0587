"""The cost of the functions that every call passes, in figures that a busy machine does not change.

Times say how busy a machine is. The number of bytecode instructions that an operation executes, and the most memory
that it holds at once, are the same in each run: so they are kept in `figures.json`, and `make check` compares.
"""
