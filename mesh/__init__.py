"""What every process of a mesh shares, the runtime pod, the command line, and a whole mesh on one machine."""
