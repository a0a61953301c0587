"""Loads and unloads: from a path to a copy that answers calls, and back to free memory."""
