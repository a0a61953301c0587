"""CPUs and memory that this process may use, on its machine and in its container."""
