"""Virtual models: the record of one, and the pure decisions about it.

| module | holds |
| --- | --- |
| `record` | what is known of a virtual model |
| `changes` | what a request, or the end of a move, changes |
"""
