"""Models into memory: the modules, from the request to the copy that answers.

- `outcomes`: the request for a load, and its possible outcomes
- `flights`: the loads that begin, are joined, or end early
- `gate`: the conditions for any load
- `loading`: the steps of one load: claim, files, admission to memory, publication
- `publication`: the claim before a load, and the copy's key after it
- `fetching`: the files of a load
- `admission`: a load's way into memory: room, a turn, the model server, and room for the measured size
- `rooms`: the loads that wait for room, and the evictions for them
- `serverside`: the model server's part of a load
"""
