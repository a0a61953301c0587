"""Virtual models (aliases): their record, and the pure decisions about it.

| module | holds |
| --- | --- |
| `record` | the record of a virtual model |
| `changes` | the changes by a request, or by the end of a move |
"""
