"""The table of operations, from which every interface takes its names."""

from collections import defaultdict

from mesh.access.verbs import Verb
from mesh.pb import modelmesh_pb2 as pb
from mesh.schema.modelstatus import ModelStatus
from router.access import operations
from router.access.operations import Operation
from router.rest import access as accessapi
from router.rest.access import AccessApi
from router.rest.management import ROUTES as MANAGEMENT
from router.rest.management import ManagementApi
from router.services import modelmesh

ROUTES = MANAGEMENT + accessapi.ROUTES
DOORS = {operations.INFER, operations.SERVER, operations.HEALTH, operations.METRICS}
"""The operations that are not management."""

OPERATIONS = {name: value for name, value in vars(operations).items() if isinstance(value, Operation)}


def test_every_operation_has_one_name_and_a_door():
    """Each operation has a name of its own. The interfaces offer all operations of management, and no others."""
    assert len({operation.name for operation in OPERATIONS.values()}) == len(OPERATIONS)
    reached = [route.operation for route in ROUTES] + list(modelmesh.OPERATIONS.values())
    assert set(reached) == set(OPERATIONS.values()) - DOORS


def test_what_reads_changes_nothing_by_its_method():
    """A route of management uses GET exactly if its operation only reads. Each route has a handler."""
    assert all((route.method == "GET") == (route.operation.verb is Verb.READ) for route in MANAGEMENT)
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    assert all(callable(getattr(ManagementApi, route.handler)) for route in MANAGEMENT)
    assert all(callable(getattr(AccessApi, route.handler)) for route in accessapi.ROUTES)


def test_a_name_in_the_path_is_of_the_operations_noun():
    """The paths of operations on the mesh and on many models contain no name."""
    nouns = defaultdict(set)
    for route in ROUTES:
        if "{id" in route.path:
            nouns[route.path.split("/")[3]].add(route.operation.noun)
    assert nouns == {
        "models": {operations.Noun.MODEL},
        "aliases": {operations.Noun.VMODEL},
        "pods": {operations.Noun.POD},
        "settings": {operations.Noun.SETTING},
        "keys": {operations.Noun.KEY},
        "grants": {operations.Noun.GRANT},
    }
    assert not any(
        "{id" in r.path for r in ROUTES if r.operation.noun in (operations.Noun.MESH, operations.Noun.MODELS)
    )


def test_every_method_of_the_service_is_in_the_table():
    """The table contains every method of the service, and those of the older service by their own names."""
    by_name = modelmesh.OPERATIONS
    assert {method.name for method in pb.DESCRIPTOR.services_by_name["ModelMesh"].methods} <= by_name.keys()
    assert by_name["addModel"] is by_name["registerModel"] is operations.REGISTER
    assert by_name["deleteModel"] is by_name["unregisterModel"] is operations.UNREGISTER


def test_statuses_are_those_of_modelmesh():
    """Each status can be written into ModelMesh's messages under its name."""
    known = pb.ModelStatusInfo.ModelStatus.keys()
    for status in ModelStatus:
        assert status in known
        assert pb.ModelStatusInfo(status=status).status == pb.ModelStatusInfo.ModelStatus.Value(status)
