"""What a router process knows of the mesh.

| module | knows |
| --- | --- |
| `feed` | what etcd holds, as named ranges, for all processes of the router pod |
| `view` | which pods and copies there are: of the range `presence` (`published`), and of what calls teach since |
| `pods` | the view's nouns: a pod, and the copies in it |
| `lives` | of the view, what the fence rests on: lives of pods, tombstones of models |
| `candidates` | the view's pods as placement looks at them |
| `dynamic` | the settings that change while the mesh runs: of the range `config` |
| `registry` | the models' records, read on demand |
"""
