"""The relay's rules for methods, lost models, metadata, and resuming after a relay was killed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.options.servers import target
from mesh.pb import inference_pb2 as pb2
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay import metadata, verdicts
from mesh.runtime.relay.calls import RelayPort
from mesh.runtime.relay.journal import Held, Journal
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.sharedmemory.board import Board
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.statuses import Code, MeshError
from mesh.v2 import SERVICE as V2
from mesh.wire.headers import addressed
from tests.support.fakecalls import FakeCall
from tests.support.waiting import until

STATUS = pb.RuntimeStatusResponse(
    methodInfos={"a.B/c": pb.RuntimeStatusResponse.MethodInfo(idInjectionPath=[3, 1]), "a.B/d": {}}
)


def test_listed_methods_pass_and_get_the_id_where_they_want_it() -> None:
    methods = Methods(STATUS)
    assert methods.path(b"a.B/c") == (3, 1)
    assert methods.path(b"a.B/d") == ()
    with pytest.raises(MeshError, match=r"Method not found or not permitted: a\.B/e"):
        methods.path(b"a.B/e")


@pytest.mark.parametrize("status", [pb.RuntimeStatusResponse(), pb.RuntimeStatusResponse(allowAnyMethod=True)])
def test_any_method_passes_where_the_server_lists_none_or_says_so(status: pb.RuntimeStatusResponse) -> None:
    assert Methods(status).path(b"x.Y/z") == ()


@pytest.mark.parametrize(
    "status",
    [
        pb.RuntimeStatusResponse(),
        pb.RuntimeStatusResponse(allowAnyMethod=True, methodInfos={"a.B/d": {}}),
    ],
    ids=["lists no method", "lists other methods"],
)
def test_a_v2_message_gets_the_id_even_if_the_server_does_not_say_where(status: pb.RuntimeStatusResponse) -> None:
    """No V2 message names another model than the one to which the call was routed. Methods that act on the whole
    server, and methods that this version of Mesh does not know, pass only if the server lists them."""
    methods = Methods(status)
    for request in (pb2.ModelInferRequest, pb2.ModelReadyRequest, pb2.ModelMetadataRequest):
        name = request.DESCRIPTOR.name.removesuffix("Request")
        assert request.DESCRIPTOR.fields_by_number[1].name in ("name", "model_name")
        assert methods.path(f"{V2}/{name}".encode()) == (1,)
    assert methods.path(f"{V2}/ModelStreamInfer".encode()) == (1,)
    assert methods.path(f"{V2}/ServerLive".encode()) == ()
    for name in ("RepositoryModelUnload", "RepositoryIndex", "SystemSharedMemoryRegister", "LogSettings", "New"):
        with pytest.raises(MeshError, match=f"Method not found or not permitted: {V2}/{name}"):
            methods.path(f"{V2}/{name}".encode())


def test_what_a_server_lists_for_a_v2_method_counts() -> None:
    """A server that lists a V2 method determines itself where the id goes. Unlisted methods need `allowAnyMethod`."""
    listed = {f"{V2}/ModelInfer": pb.RuntimeStatusResponse.MethodInfo(), f"{V2}/RepositoryIndex": {}}
    methods = Methods(pb.RuntimeStatusResponse(methodInfos=listed))
    assert methods.path(f"{V2}/ModelInfer".encode()) == ()
    assert methods.path(f"{V2}/RepositoryIndex".encode()) == ()
    with pytest.raises(MeshError):
        methods.path(f"{V2}/ModelReady".encode())


@pytest.mark.parametrize("takes_pieces", [True, False])
async def test_a_message_arrives_in_pieces_if_no_id_is_written_into_it(takes_pieces: bool) -> None:
    """The relay takes a large message in pieces if it writes no id into the message and its egress can write pieces."""
    egress: Any = SimpleNamespace(takes_pieces=takes_pieces)
    board = Board.private(1)
    port = RelayPort(Table(board, Journal(None)), board, None, egress, max_message=1000)  # type: ignore[arg-type]
    assert not port.forwards(FakeCall(b"/a.B/d")), "the methods are not known yet"
    port.methods = Methods(STATUS)
    assert port.forwards(FakeCall(b"/a.B/d")) is takes_pieces
    assert not port.forwards(FakeCall(b"/a.B/c")), "the id is written into it"
    assert not port.forwards(FakeCall(b"/a.B/e")), "it is not allowed"


async def test_a_call_whose_caller_has_gone_before_it_begins_is_counted_as_ended() -> None:
    """A caller may disconnect in the same turn of the event loop in which its call arrives. Such a call does not stay
    in flight, which would keep its copy from ever being unloaded."""
    board = Board.private(1)
    table = Table(board, Journal(None))
    copy = RelayedCopy("m", b"life.7", table.row(None))
    table.copies.add(copy)
    egress: Any = SimpleNamespace(takes_pieces=True)
    link: Any = SimpleNamespace(is_up=False)
    port = RelayPort(table, board, link, egress, max_message=1000)
    port.methods = Methods(STATUS)
    call = FakeCall(b"/a.B/d", list(addressed("m", b"life.7")))
    port.handle(call)
    assert (port.in_flight, len(copy.calls)) == (1, 1)
    call.cancel()
    await until(lambda: not copy.calls, why="the call has ended")
    assert port.in_flight == 0


@pytest.mark.parametrize("service", [b"mmesh.ModelRuntime", b"com.ibm.watson.tas.internal.proto.ModelServer"])
def test_no_client_reaches_the_servers_management(service: bytes) -> None:
    with pytest.raises(MeshError):
        Methods(pb.RuntimeStatusResponse(allowAnyMethod=True)).path(service + b"/unloadModel")


@pytest.mark.parametrize(
    ("code", "text", "lost"),
    [
        (Code.NOT_FOUND, "whatever", True),
        (Code.UNAVAILABLE, "Request for unknown model: 'm' is not found", True),
        (Code.UNAVAILABLE, "Request for unknown model: 'm' has no available versions", True),
        (Code.UNAVAILABLE, "too busy", False),
        (Code.UNAVAILABLE, "the cat is not found", False),
        (Code.INVALID_ARGUMENT, "Model m not found", True),
        (Code.INVALID_ARGUMENT, "Model m has no input x", False),
        (Code.INTERNAL, "Model m not found", False),
        (Code.INTERNAL, "Stub process 'm_0' is not healthy.", False),
        (Code.INTERNAL, "Model not found: m\norg.pytorch.serve.archive.model.ModelNotFoundException", True),
        (Code.INTERNAL, "Model version: 1 does not exist for model: m\na.b.ModelVersionNotFoundException", True),
        (Code.INTERNAL, "Model not found: m", False),
        (Code.INTERNAL, "Prediction failed\norg.pytorch.serve.archive.model.ModelNotFoundException", False),
    ],
)
def test_each_servers_form_of_not_found_says_that_a_model_is_lost(code: Code, text: str, lost: bool) -> None:
    assert verdicts.model_is_lost(code, text) is lost


def test_an_unavailable_server_is_reported_as_modelmesh_reports_it() -> None:
    told = verdicts.to_client(Code.UNAVAILABLE, "too busy", "a.B/c")
    assert told == (Code.INTERNAL, "ModelRuntime UNAVAILABLE: a.B/c: UNAVAILABLE: too busy")
    assert verdicts.to_client(Code.ABORTED, "no", "a.B/c") == (Code.ABORTED, "no")


def test_the_server_gets_the_clients_metadata_and_the_id_and_nothing_of_the_meshs() -> None:
    received = [
        (b"own", b"1"),
        (b"own-bin", b"AP8"),
        (b"mesh-copy", b"x.1"),
        (b"mm-vmodel-id", b"v"),
        (b"mm-model-id", b"other"),
        (b"grpc-trace-bin", b"AA"),
        (b"user-agent", b"u"),
    ]
    sent = metadata.to_server(received, "m")
    assert sent == [(b"mm-model-id-bin", b"bQ"), (b"mm-model-id", b"m"), (b"own", b"1"), (b"own-bin", b"AP8")]
    assert metadata.pairs(sent) == (
        ("mm-model-id-bin", b"m"),
        ("mm-model-id", "m"),
        ("own", "1"),
        ("own-bin", b"\0\xff"),
    )
    assert metadata.pairs(metadata.to_server([], "é")) == (("mm-model-id-bin", "é".encode()),)


def test_no_server_can_claim_that_a_model_is_not_here() -> None:
    received = metadata.from_pairs((("mesh-not-here", "1"), ("own", "2"), ("own-bin", b"\0\xff")))
    assert metadata.to_client(received) == [(b"own", b"2"), (b"own-bin", b"AP8")]


def test_a_later_relay_reads_what_a_killed_one_held(tmp_path: Path) -> None:
    """Loads and unloads are in the journal as soon as they happen. A missing or broken journal is ignored."""
    path = tmp_path / "journal"
    assert Journal(path).read() is None
    writer = Journal(path)
    writer.begin(STATUS, [])
    writer.add(Held("a", "x.1", 3, 2))
    writer.add(Held("b", "x.2", 4))
    writer.remove("a", "x.1")
    assert Journal(path).read() == (STATUS, [Held("b", "x.2", 4)])
    path.write_text(path.read_text() + "{")
    assert Journal(path).read() is None
    writer.discard()
    assert not path.exists()


def test_models_that_were_registered_together_are_told_apart(tmp_path: Path) -> None:
    """Models that were registered in one transaction have copies with equal tokens. Each copy is unloaded, lost and
    recorded by itself."""
    board = Board.private(4)
    path = tmp_path / "journal"
    table = Table(board, Journal(path))
    table.begin(STATUS, former=False)
    copies = {}
    for slot, model_id in enumerate(("a", "b", "c")):
        copies[model_id] = copy = RelayedCopy(model_id, b"x.1", table.row(slot))
        copy.row.loading(1, 5)
        table.loaded(copy, slot=slot, concurrency=0)
    assert table.withdraw("a", b"x.1") is copies["a"]
    assert table.withdraw("b", b"x.1") is copies["b"]
    table.unloaded(copies["b"])
    assert [board.read(slot).state for slot in range(3)] == [SlotState.UNLOADING, SlotState.FREE, SlotState.LOADED]
    assert table.withdraw("a", b"x.1") is copies["a"], "an unload that is asked for again"
    assert table.lose(copies["c"], "the test says so")
    assert table.withdraw("c", b"x.1") is copies["c"]
    table.loaded(RelayedCopy("d", b"x.1", table.row(3)), slot=3, concurrency=0)
    assert Journal(path).read() == (STATUS, [Held("d", "x.1", 3)])


def test_a_resumed_copy_keeps_its_numbers_and_none_of_its_calls(tmp_path: Path) -> None:
    """A resumed copy keeps the counts and times in its slot, but not the calls that were in flight in the killed
    relay."""
    board = Board.create(tmp_path / "board", 4, incarnation="x")
    first = Table(board, Journal(None))
    board.attach(1)
    copy = RelayedCopy("a", b"x.1", first.row(2))
    copy.row.loading(1, 5)
    first.loaded(copy, slot=2, concurrency=0)
    copy.row.begin(10)
    copy.row.end(20, runs=0, busy_ns=7, failed=False)
    copy.row.begin(30, runs=1)

    board.attach(2, keep=[2])
    second = Table(board, Journal(None))
    second.resume(STATUS, [Held("a", "x.1", 2)])
    use = board.read(2)
    assert (use.state, use.revision, use.in_flight, use.running) == (SlotState.LOADED, 1, 0, 0)
    assert (use.calls, use.last_use_ns, use.busy_ns) == (1, 30, 7)
    assert second.copies.find(b"a", b"x.1") is not None


def test_a_lost_copy_answers_no_more_and_its_unload_frees_the_slot() -> None:
    board = Board.private(4)
    table = Table(board, Journal(None))
    copy = RelayedCopy("a", b"x.1", table.row(1))
    copy.row.loading(1, 5)
    table.loaded(copy, slot=1, concurrency=0)
    assert table.lose(copy, "the test says so")
    assert (table.copies.find(b"a", b"x.1"), board.lost, board.read(1).state) == (None, 1, SlotState.LOST)
    assert table.withdraw("a", b"x.1") is copy
    table.unloaded(copy)
    assert board.read(1).state is SlotState.FREE


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/s", "unix:/run/s"),
        ("unix:///run/s", "unix:/run/s"),
        ("tcp://127.0.0.1:8085", "127.0.0.1:8085"),
        ("localhost:8085", "localhost:8085"),
    ],
)
def test_an_address_may_be_written_as_for_modelmesh(text: str, address: str) -> None:
    assert target(text) == address


@pytest.mark.parametrize("text", ["unix:run/s", "unix:", "host:port"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        target(text)
