"""Recipes for the fleet's models."""

import json
from dataclasses import asdict

from mesh.demo.fleet.recipes import CLASSIFIERS, DATASETS, REGRESSORS, Recipe, recipe


def test_a_number_gives_the_same_recipe_always():
    """A number always gives the same recipe, even after the recipe was sent to a worker and back."""
    for number in range(100):
        made = recipe(number)
        assert made == recipe(number)
        assert Recipe(**json.loads(json.dumps(asdict(made)))) == made


def test_a_fleet_is_varied():
    """In a fleet of 400 models, all ids differ, all kinds and data sets occur, every kind of classifier is trained on
    at least four data sets, and settings differ."""
    fleet = [recipe(number) for number in range(400)]
    assert len({made.id for made in fleet}) == 400
    assert {made.kind for made in fleet} == {*CLASSIFIERS, *REGRESSORS}
    assert {made.dataset for made in fleet} == set(DATASETS)
    for kind in CLASSIFIERS:
        assert len({made.dataset for made in fleet if made.kind == kind}) >= 4
    assert len({json.dumps(dict(made.settings)) for made in fleet}) > 100
    assert 20 < sum(made.named_classes for made in fleet) < 150
    assert any(made.doubles for made in fleet)


def test_the_first_six_show_every_data_set():
    """The first six models, which `mesh up` registers, show every data set."""
    assert {recipe(number).dataset for number in range(6)} == set(DATASETS)
