"""Telemetry of a process: log lines, metrics, and the probes that serve them."""
