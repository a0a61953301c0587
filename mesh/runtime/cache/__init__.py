"""The models in the model server's memory: loads, evictions and their books.

- `assembly`: the parts of this package, made from those below it
- `housekeeping`: the periodic check against the registry
- `deaths`: clean-up after the death of the model server
- `loads/`: models into memory, from the request to the copy that answers
- `evictions/`: copies out of memory: which are evicted, for what, and how
- `books/`: the contents of memory, and counts of them
- `disk/`: the files of the pod's models
"""
