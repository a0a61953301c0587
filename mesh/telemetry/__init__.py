"""Telemetry of a process: log lines, metrics, and the HTTP port for probes."""
