"""The router's side of the fence: who may still be there, and what must be verified before a pod cut off may answer."""
