"""The way of a model into memory. The modules, from the request to the copy that answers:

- `outcomes`: the request for a load, and its possible outcomes
- `flights`: the loads under way: how they begin, are joined, and end early
- `gate`: the conditions for any load
- `loading`: the steps of one load: claim, files, admission to memory, publication
- `publication`: the claim before a load, and the copy's key after it
- `fetching`: the files of a load
- `admission`: the way of a load into memory: room, a turn, the model server, and room for the measured size
- `rooms`: the loads that wait for room, and the evictions for them
- `serverside`: the model server's part of a load
- `sizing`: the sizes of loaded models, and the number of loads at once
"""
