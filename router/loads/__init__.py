"""Loads on demand: single flights from "no copy" to a copy."""
