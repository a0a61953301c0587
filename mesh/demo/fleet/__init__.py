"""Sample models: several hundred real models, like those of a dense fleet, and requests with known answers.

    fleet = build(Path(".mesh/fleet"), 300, with_wheels=True, progress=True)
    inputs = sample_inputs(fleet.models[0], np.random.default_rng(0))

`recipes` defines each model, `training` trains one, `building` trains all of them in worker processes, and `wheels`
fetches two larger models made by others. `catalogue` is the fleet on disk, `requests` draws inputs from the data sets'
rows, and `reference` computes the right answers.
"""

from mesh.demo.fleet.building import BuildError, build
from mesh.demo.fleet.catalogue import Fleet, Sample, Tensor
from mesh.demo.fleet.requests import sample_inputs

__all__ = ["BuildError", "Fleet", "Sample", "Tensor", "build", "sample_inputs"]
