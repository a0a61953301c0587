"""Changes of virtual models, for management and for the leader. `placement.vmodels` decides on a change, and `store`
writes it."""
