"""Sample models: several hundred real ones, as a dense fleet has them, and requests with known answers.

    fleet = build(Path(".mesh/fleet"), 300, with_wheels=True, progress=True)
    inputs = sample_inputs(fleet.models[0], np.random.default_rng(0))

`recipes` says what each model is, `training` makes it, `building` makes all of them in worker processes, `wheels`
brings two larger ones that others made. `catalogue` is the fleet on disk, `requests` draws inputs from real rows, and
`reference` says what the answers must be. Serving them is what the rest of the mesh is for.
"""

from mesh.demo.fleet.building import BuildError, build
from mesh.demo.fleet.catalogue import Fleet, Sample, Tensor
from mesh.demo.fleet.requests import sample_inputs

__all__ = ["BuildError", "Fleet", "Sample", "Tensor", "build", "sample_inputs"]
