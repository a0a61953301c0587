"""The long-lived tasks of `mesh up`, and the consequence if one of them ends."""

from mesh.process.tasks import Duty

PART = Duty("keep", "a part of the mesh that dies or hangs is not replaced", turns=60)

UP = (PART,)
