"""The router's side of the fence: what must be verified before a pod that is cut off may answer."""
