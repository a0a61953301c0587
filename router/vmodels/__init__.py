"""Writes of virtual models, for management and for the leader. `placement.vmodels` decides them, `store` makes them."""
