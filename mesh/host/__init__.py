"""Resources that the machine and the container grant this process: CPUs and memory, as the kernel accounts for them."""
