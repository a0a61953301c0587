"""Writes of virtual models, for management and for the leader. `placement.vmodels` decides; `store` carries out."""
