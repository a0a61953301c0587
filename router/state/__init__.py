"""The knowledge that a router process has of the mesh.

| module | knows |
| --- | --- |
| `feed` | the content of etcd, in named ranges, for all processes of the router pod |
| `view` | pods and copies, from the range `presence` (`published`) and from later calls |
| `pods` | the view's objects: a pod, and the copies in it |
| `lives` | the view's data for the fence: lives of pods, tombstones of models |
| `candidates` | the view's pods, in the form that placement needs |
| `dynamic` | the settings that change while the mesh runs, from the range `config` |
| `registry` | the models' records, read on demand |
| `differing` | which attributes of a registered model differ from those of a request |
| `vmodels` | the vmodels' records, from the range `vmodels` |
"""
