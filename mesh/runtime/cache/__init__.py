"""The model cache of a pod: admission, room, loads, evictions, and the memory that they are accounted with."""
