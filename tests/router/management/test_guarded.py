"""Management over gRPC in a mesh that identifies its callers: every method and every role."""

import json
import types

import pytest

from mesh.access.grants import decide
from mesh.access.verbs import Role
from mesh.pb import modelmesh_pb2 as pb
from mesh.schema.modelstatus import ModelStatus
from mesh.statuses import Code
from mesh.wire import framing
from placement.vmodels.record import VModelRecord
from router.access.audit import Audit
from router.access.operations import Noun
from router.management.status import CopyInfo, StatusInfo
from router.management.vmodels import VModelInfo
from router.services import health, modelmesh, reflection, v2server
from router.services.methods import for_known
from tests.support.access import guard_of, open_guard
from tests.support.fakecalls import FakeCall
from tests.support.waiting import until

ROLES = {role.value: "mesh_" + role.value.ljust(43, "x") for role in Role}
KEYS = {**ROLES, "scoped": "mesh_" + "s" * 43, "nobody": "mesh_" + "n" * 43}
GRANTS = {role: (role, ["*"], [f"key:{role}"]) for role in ROLES} | {
    "scoped": ("register", ["team/*"], ["key:scoped"]),
}
MESSAGES = {
    "registerModel": pb.RegisterModelRequest(modelId="team/x"),
    "addModel": pb.RegisterModelRequest(modelId="team/x"),
    "unregisterModel": pb.UnregisterModelRequest(modelId="team/x"),
    "deleteModel": pb.UnregisterModelRequest(modelId="team/x"),
    "getModelStatus": pb.GetStatusRequest(modelId="team/x"),
    "ensureLoaded": pb.EnsureLoadedRequest(modelId="team/x"),
    "setVModel": pb.SetVModelRequest(vModelId="team/live", targetModelId="team/x"),
    "deleteVModel": pb.DeleteVModelRequest(vModelId="team/live"),
    "getVModelStatus": pb.GetVModelStatusRequest(vModelId="team/live"),
}


class Reached(Exception):
    """The sign that a request has reached its handler."""


def refuse(*_, **__):
    raise Reached


HANDLER = types.SimpleNamespace(register=refuse, unregister=refuse, of=refuse, ensure=refuse, set=refuse)
HANDLER.delete = HANDLER.status = refuse
MANAGEMENT = types.SimpleNamespace(
    registration=HANDLER, loading=HANDLER, vmodels=HANDLER, status=types.SimpleNamespace(of=refuse)
)


def served(guard):
    return modelmesh.methods(MANAGEMENT, lambda *_: None, guard, Audit("off"))


async def code_of(handlers, name, message, key):
    """Calls a method and returns its status. INTERNAL shows that the request has reached its handler."""
    headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
    call = FakeCall(name, headers, framing.pack(message.SerializeToString()))
    handlers[name](call)
    await until(lambda: bool(call.answers), interval=0.001, why="the call is answered")
    return call.code


@pytest.mark.parametrize("mode", ["management", "required"])
@pytest.mark.parametrize("service", [b"/mmesh.ModelMesh/", b"/com.ibm.watson.tas.proto.TasRuntime/"])
async def test_every_method_is_decided_for_every_key(mode, service):
    guard = guard_of(mode, KEYS, GRANTS)
    handlers = served(guard)
    assert set(MESSAGES) == set(modelmesh.OPERATIONS)
    for method, operation in modelmesh.OPERATIONS.items():
        name = service + method.encode()
        assert await code_of(handlers, name, MESSAGES[method], None) is Code.UNAUTHENTICATED
        for key in KEYS.values():
            principal = guard.known([(b"authorization", b"Bearer " + key.encode())])
            subject = "team/x" if operation.noun is Noun.MODEL else "team/live"
            allowed = decide(guard.authority.grants, principal, operation.verb, subject).allowed
            expected = Code.INTERNAL if allowed else Code.PERMISSION_DENIED
            assert await code_of(handlers, name, MESSAGES[method], key) is expected, (method, key)


async def test_each_change_has_a_line_in_the_audit_trail(tmp_path):
    file = tmp_path / "audit.log"
    trail = Audit(str(file))
    handlers = modelmesh.methods(MANAGEMENT, lambda *_: None, guard_of("management", KEYS, GRANTS), trail)
    register = b"/mmesh.ModelMesh/registerModel"
    for key in (None, KEYS["nobody"], KEYS["scoped"]):
        await code_of(handlers, register, MESSAGES["registerModel"], key)
    await code_of(handlers, b"/mmesh.ModelMesh/getModelStatus", MESSAGES["getModelStatus"], KEYS["read"])
    trail.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["who"], line["what"], line["name"], line["from"], line["result"]) for line in found] == [
        ("-", "register", "*", "test", "UNAUTHENTICATED"),
        ("key:nobody", "register", "team/x", "test", "FORBIDDEN"),
        ("key:scoped", "register", "team/x", "test", "Reached"),
    ]


async def test_the_target_of_a_vmodel_is_noted(tmp_path):
    file = tmp_path / "audit.log"
    trail = Audit(str(file))
    handlers = modelmesh.methods(MANAGEMENT, lambda *_: None, guard_of("management", KEYS, GRANTS), trail)
    await code_of(handlers, b"/mmesh.ModelMesh/setVModel", MESSAGES["setVModel"], KEYS["scoped"])
    trail.close()
    line = json.loads(file.read_text())
    assert (line["name"], line["models"]) == ("team/live", ["team/x"])


@pytest.mark.parametrize(("holder", "seen"), [("scoped", False), ("read", True)])
async def test_the_status_of_a_vmodel_hides_models_that_the_caller_may_not_read(holder, seen):
    """A caller who may not read a model sees its state in the vmodel's status, but neither its errors nor its
    copies."""
    copy = CopyInfo("pod-1", ModelStatus.LOADED, 5)
    other = StatusInfo(ModelStatus.LOADED, ("a secret path",), (copy,))
    info = VModelInfo("team/live", VModelRecord(owner="", active="other", target="other"), other)

    async def status(*_):
        return info

    management = types.SimpleNamespace(vmodels=types.SimpleNamespace(status=status))
    handlers = modelmesh.methods(management, lambda *_: None, guard_of("management", KEYS, GRANTS), Audit("off"))
    headers = [(b"authorization", b"Bearer " + KEYS[holder].encode())]
    frame = framing.pack(MESSAGES["getVModelStatus"].SerializeToString())
    call = FakeCall(b"/mmesh.ModelMesh/getVModelStatus", headers, frame)
    handlers[call.method](call)
    await until(lambda: bool(call.answers), interval=0.001, why="the call is answered")
    frame = call.answers[0][2]
    assert frame is not None
    answer = pb.VModelStatusInfo.FromString(framing.unpack(frame, limit=1 << 20))
    assert (answer.activeModelId, answer.activeModelStatus.status) == ("other", pb.ModelStatusInfo.LOADED)
    assert bool(answer.activeModelStatus.errors) is bool(answer.activeModelStatus.modelCopyInfos) is seen
    assert not answer.HasField("targetModelStatus")


async def test_a_vmodel_may_only_name_models_that_its_owner_may_register():
    handlers = served(guard_of("management", KEYS, GRANTS))
    message = pb.SetVModelRequest(vModelId="team/live", targetModelId="other")
    code = await code_of(handlers, b"/mmesh.ModelMesh/setVModel", message, KEYS["scoped"])
    assert code is Code.PERMISSION_DENIED


async def test_an_open_mesh_asks_nobody():
    handlers = served(open_guard())
    for method, message in MESSAGES.items():
        assert await code_of(handlers, b"/mmesh.ModelMesh/" + method.encode(), message, None) is Code.INTERNAL


async def test_health_answers_everybody_and_the_rest_only_known_callers():
    server = types.SimpleNamespace(live=refuse, ready=refuse, metadata=refuse)
    for mode, code in (("required", Code.UNAUTHENTICATED), ("management", None)):
        guard = guard_of(mode, KEYS, GRANTS)
        handlers = {**v2server.methods(server, guard), **for_known(guard, reflection.METHODS)}
        for name in (b"ServerLive", b"ServerReady"):
            with pytest.raises(Reached):
                handlers[b"/inference.GRPCInferenceService/" + name](FakeCall(frame=framing.pack(b"")))
        if code is None:
            continue
        for name in (b"/inference.GRPCInferenceService/ServerMetadata", *reflection.METHODS):
            call = FakeCall(name, [], framing.pack(b""))
            handlers[name](call)
            assert call.code is code
    call = FakeCall(b"/grpc.health.v1.Health/Check", [], framing.pack(b""))
    health.Health(lambda: None).methods()[call.method](call)
    await until(lambda: bool(call.answers), interval=0.001, why="the call is answered")
    assert call.code is Code.OK
