"""Loads and unloads: from a path to a copy that answers, and back to free memory."""
