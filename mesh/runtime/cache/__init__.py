"""The models in the model server's memory: loads, evictions, and the books of what is in memory.

- `assembly`: the parts of this package, made from those below it
- `housekeeping`: the periodic check against the registry
- `deaths`: clean-up after the death of the model server
- `loads/`: how a model gets into memory, from the request to the copy that answers
- `evictions/`: which copies are evicted, for what, and how copies leave memory
- `books/`: the contents of memory, and figures about them
- `disk/`: the files of the pod's models
"""
