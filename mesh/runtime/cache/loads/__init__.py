"""Models into memory, from the request to the copy that answers, in this order:

- `outcomes`: what is asked of a load, and what may come of it
- `flights`: which loads begin, are joined, end early
- `gate`: whether loads are taken at all
- `loading`: the steps of one load: its claim, its files, its way into memory, its publication
- `publication`: its claim before, and its key after
- `fetching`: its files
- `admission`: its way into memory: room, a turn, the model server, and room for what was measured
- `rooms`: who waits for room, and what makes way for whom
- `serverside`: the model server's part
"""
