"""Resources that the machine and the container grant this process: CPUs, memory, and the kernel's accounts of them."""
