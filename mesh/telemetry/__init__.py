"""What a process tells about itself: log lines, metrics, and the probes that serve them."""
