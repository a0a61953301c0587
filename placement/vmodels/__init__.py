"""Virtual models: the record of one, and the pure decisions about it.

| module | holds |
| --- | --- |
| `record` | what is known of a virtual model |
"""
