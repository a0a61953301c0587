"""CPUs, memory and open files that this process may use, on its machine and in its container; memory of others."""
