"""What the machine and the container grant this process: CPUs, memory, and how the kernel accounts for them."""
