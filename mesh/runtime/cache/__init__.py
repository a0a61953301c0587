"""What is in the model server's memory, how it gets in, and what goes for it.

- `assembly`: the parts of this room, made of what stands below it
- `housekeeping`: the periodic check against the registry
- `deaths`: what follows from the death of the model server
- `loads/`: models into memory, from the request to the copy that answers
- `evictions/`: copies out of memory: who makes way, for what, and how
- `books/`: what is in memory and what is counted of it
- `disk/`: the files of the pod's models
"""
