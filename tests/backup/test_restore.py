"""Backup and restore with a real etcd: what is restored, what stays unchanged, what is printed."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from mesh.schema.keys import Keys
from mesh.schema.lives import Tombstone
from mesh.schema.records import ModelRecord
from placement.copies import CopyLimits
from tests.backup.conftest import Admin

LIMITED = ModelRecord(type="onnx", path="s3://b/two", key="minio", limits=CopyLimits(minimum=2)).encode()
FIRST = ModelRecord(type="onnx", path="s3://b/one", key='{"storage_key": "minio"}', refs=1).encode()


def content(keys: Keys) -> dict[bytes, bytes]:
    """Returns a small registry, and keys that do not belong in a backup."""
    return {
        keys.model("one"): FIRST,
        keys.model("two/ü"): LIMITED,
        keys.want("two/ü"): b"",
        keys.vmodel("alias"): b'{"o":"me","amid":"one","tmid":"one"}',
        keys.setting("type_limits"): b'{"_default": {"max": 3}}',
        keys.pod("pod-1"): b"{}",
        keys.copy("one", "pod-1"): b"{}",
        keys.leader: b"router-1",
        keys.owner: b'{"install":"a/mesh","schema":1}',
        keys.recent_piece(0): b"one",
    }


@pytest.fixture
def saved(admin: Admin, keys: Keys, tmp_path: Path) -> Path:
    """A backup of the small registry."""
    admin.put(content(keys))
    target = tmp_path / "registry.backup"
    result = admin.run("backup", str(target), "--base", keys.base)
    assert result.exit_code == 0, result.stderr
    assert "2 models, 1 vmodel, 1 setting" in result.stdout
    return target


@pytest.fixture
def other(keys: Keys) -> Keys:
    """An empty mesh in the same etcd."""
    return Keys(keys.base + "-other")


def restored(admin: Admin, saved: Path, keys: Keys, *arguments: str):
    return admin.run("restore", str(saved), "--base", keys.base, "--wait", "0", *arguments)


def test_an_empty_mesh_gets_all_that_was_registered(admin: Admin, saved: Path, other: Keys) -> None:
    """Restoring into an empty mesh under another prefix creates all registrations, and the keys that follow from them.
    Keys of running processes are not restored."""
    result = restored(admin, saved, other)
    assert result.exit_code == 0, result.stderr
    assert "created: 2 models, 1 vmodel, 1 setting" in result.stdout
    found = admin.all(other)
    assert found.keys() == {
        b"registry/one",
        "registry/two/ü".encode(),
        b"wanted/two%2F%C3%BC",
        b"vmodels/alias",
        b"config/type_limits",
    }
    assert ModelRecord.decode(found[b"registry/one"]) == ModelRecord.decode(FIRST)
    assert found["registry/two/ü".encode()] == LIMITED
    assert found[b"config/type_limits"] == b'{"_default": {"max": 3}}'


def test_again_changes_nothing(admin: Admin, saved: Path, other: Keys) -> None:
    """If a failed restore is repeated, the missing records are created and the existing ones stay unchanged."""
    restored(admin, saved, other)
    admin.delete(other.model("two/ü"))
    before = admin.all(other)
    result = restored(admin, saved, other)
    assert result.exit_code == 0
    assert "created: 1 model\n" in result.stdout
    assert "already registered: 1 model, 1 vmodel, 1 setting" in result.stdout
    assert admin.all(other) == before | {"registry/two/ü".encode(): LIMITED}


def test_what_was_measured_since_is_kept(admin: Admin, saved: Path, other: Keys) -> None:
    """A record that differs only in the mesh's own notes, such as measured sizes, is the same registration. The mesh's
    notes stay."""
    used = ModelRecord(
        type="onnx", path="s3://b/one", key='{"storage_key": "minio"}', host_bytes=5, last_used_ms=9, killed=("x",)
    ).encode()
    admin.put({other.model("one"): used})
    result = restored(admin, saved, other, "--overwrite")
    assert result.exit_code == 0, result.stderr
    record = ModelRecord.decode(admin.all(other)[b"registry/one"])
    assert (record.host_bytes, record.last_used_ms, record.killed) == (5, 9, ("x",))
    assert record.refs == 1, "the restored vmodel counts as a reference"


def test_a_vmodel_counts_once_in_each_model_that_it_names_in_any_role(admin: Admin, keys: Keys, tmp_path: Path) -> None:
    """A restored vmodel adds one reference to each model that it names as target, version, weight or mirror, so none of
    them can be unregistered while in use."""
    more = {"versions": {"1": "one", "2": "two"}, "weights": {"one": 9, "three": 1}, "mirror": {"target": "four"}}
    records = {
        keys.model(name): ModelRecord(type="onnx", path=name).encode() for name in ("one", "two", "three", "four")
    }
    admin.put(records | {keys.vmodel("alias"): json.dumps({"amid": "one", "tmid": "one", "mesh": more}).encode()})
    saved, there = tmp_path / "registry.backup", Keys(keys.base + "-other")
    assert admin.run("backup", str(saved), "--base", keys.base).exit_code == 0
    assert restored(admin, saved, there).exit_code == 0
    found = admin.all(there)
    counts = {
        name: ModelRecord.decode(found[b"registry/" + name.encode()]).refs for name in ("one", "two", "three", "four")
    }
    assert counts == {"one": 1, "two": 1, "three": 1, "four": 1}
    assert json.loads(found[b"vmodels/alias"])["mesh"] == more


def test_a_model_that_is_created_again_keeps_its_references(admin: Admin, saved: Path, other: Keys) -> None:
    """The references of an overwritten model are counted from all vmodels that name it, even those that are not in the
    backup."""
    theirs = {
        other.model("one"): ModelRecord(type="onnx", path="s3://b/theirs", refs=2).encode(),
        other.vmodel("alias"): b'{"o":"me","amid":"one","tmid":"one"}',
        other.vmodel("theirs"): b'{"amid":"one","tmid":"one"}',
    }
    admin.put(theirs)
    result = restored(admin, saved, other, "--overwrite", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recounted"] == 1
    record = ModelRecord.decode(admin.all(other)[b"registry/one"])
    assert (record.path, record.refs) == ("s3://b/one", 2)


def test_what_differs_is_named_and_left(admin: Admin, saved: Path, other: Keys) -> None:
    """Records that differ are named and left unchanged. The others are restored, and the command reports that some were
    not."""
    theirs = {
        other.model("one"): ModelRecord(type="onnx", path="s3://b/theirs").encode(),
        other.vmodel("alias"): b'{"o":"them","amid":"x","tmid":"x"}',
        other.setting("type_limits"): b"{}",
    }
    admin.put(theirs)
    result = restored(admin, saved, other, "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["created"] == {"registry": 1}
    assert answer["differing"] == [
        {"kind": "registry", "id": "one"},
        {"kind": "vmodels", "id": "alias"},
        {"kind": "config", "id": "type_limits"},
    ]
    assert theirs.items() <= {other.base.encode() + b"/" + k: v for k, v in admin.all(other).items()}.items()
    assert "model one" in restored(admin, saved, other).stderr


def test_overwriting_makes_a_new_registration(admin: Admin, saved: Path, other: Keys) -> None:
    """Overwriting makes a new registration with its own create revision, because copies belong to one registration.
    References are counted for the models that vmodels name now."""
    admin.put(
        {
            other.model("one"): ModelRecord(type="onnx", path="s3://b/theirs").encode(),
            other.model("x"): ModelRecord(type="onnx", path="s3://b/x", refs=1).encode(),
            other.vmodel("alias"): b'{"o":"me","amid":"x","tmid":"x"}',
            other.setting("type_limits"): b"{}",
        }
    )
    result = restored(admin, saved, other, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert "overwritten: 1 model, 1 vmodel, 1 setting" in result.stdout
    found = admin.all(other)
    assert ModelRecord.decode(found[b"registry/one"]).path == "s3://b/one"
    assert ModelRecord.decode(found[b"registry/one"]).refs == 1
    assert ModelRecord.decode(found[b"registry/x"]).refs == 0
    versions = json.loads(admin.server.etcdctl("get", other.model("one").decode(), "-w", "json"))["kvs"][0]
    assert versions["version"] == 2, "the record was created again, and its reference counted once"


def test_limits_are_changed_in_place(admin: Admin, saved: Path, other: Keys) -> None:
    """Limits are changed without a new registration, while the model is served."""
    admin.put({other.model("two/ü"): ModelRecord(type="onnx", path="s3://b/two", key="minio", host_bytes=7).encode()})
    admin.put({other.copy("two/ü", "pod-1"): b"{}"})
    assert restored(admin, saved, other).exit_code == 1
    result = restored(admin, saved, other, "--overwrite")
    assert result.exit_code == 0, result.stderr
    found = admin.all(other)
    record = ModelRecord.decode(found["registry/two/ü".encode()])
    assert (record.limits, record.host_bytes) == (CopyLimits(minimum=2), 7)
    assert b"wanted/two%2F%C3%BC" in found


def test_a_model_waits_for_copies_of_its_former_life(admin: Admin, saved: Path, other: Keys) -> None:
    """A model is not restored while a pod still has a copy of an earlier registration with the same id. With --wait,
    the model is restored once the copy is gone."""
    admin.put(
        {
            other.model("one"): ModelRecord(type="onnx", path="s3://b/theirs").encode(),
            other.copy("one", "pod-1"): b"{}",
        }
    )
    result = restored(admin, saved, other, "--overwrite")
    assert result.exit_code == 1
    assert "model one: pods still have copies" in result.stderr
    assert b"registry/one" not in admin.all(other)

    done = []
    thread = threading.Thread(
        target=lambda: done.append(
            admin.run("restore", str(saved), "--base", other.base, "--overwrite", "--wait", "60")
        )
    )
    thread.start()
    admin.delete(other.copy("one", "pod-1"))
    thread.join(90)
    assert done
    assert done[0].exit_code == 0, done[0].stderr
    assert b"registry/one" in admin.all(other)


@pytest.mark.parametrize("holder", ["a copy", "a pod that is cut off"])
def test_a_model_waits_for_pods_that_may_answer_for_its_former_life(
    admin: Admin, saved: Path, other: Keys, holder: str
) -> None:
    """A model is not restored while a pod may still answer for its former registration, because the pod has a copy, or
    because it is cut off and its other keys have expired. Meanwhile, a tombstone marks the id."""
    life = {other.life("pod-1", "i"): b'{"data":"h:1","control":"h:2"}'}
    copy = {other.copy("one", "pod-1"): b"{}", other.pod("pod-1"): b"{}"}
    admin.put({other.model("one"): ModelRecord(type="onnx", path="s3://b/theirs").encode(), **life})
    if holder == "a copy":
        admin.put(copy)
    tombstone = b"copies/one/~"
    for _ in range(2):
        result = restored(admin, saved, other, "--overwrite")
        assert result.exit_code == 1
        assert "model one: pods still have copies" in result.stderr
        found = admin.all(other)
        assert b"registry/one" not in found
        assert Tombstone.decode(found[tombstone]).path == "s3://b/theirs"
    for key in (*copy, *life):
        admin.delete(key)
    result = restored(admin, saved, other, "--overwrite")
    assert result.exit_code == 0, result.stderr
    found = admin.all(other)
    assert ModelRecord.decode(found[b"registry/one"]).path == "s3://b/one"
    assert tombstone not in found


def test_what_nobody_holds_leaves_no_tombstone(admin: Admin, saved: Path, other: Keys) -> None:
    """Overwriting models without copies leaves neither tombstones nor requested reloads, even for more models than fit
    into one transaction."""
    names = [f"many-{number}" for number in range(100)]
    admin.put({other.model(name): ModelRecord(type="onnx", path="s3://b/new").encode() for name in names})
    target = saved.with_name("many.backup")
    assert admin.run("backup", str(target), "--base", other.base).exit_code == 0
    admin.put({other.model(name): ModelRecord(type="onnx", path="s3://b/old").encode() for name in names})
    admin.put({other.reload("many-7"): b"{}"})
    result = restored(admin, target, other, "--overwrite")
    assert result.exit_code == 0, result.stderr
    found = admin.all(other)
    assert found.keys() == {f"registry/{name}".encode() for name in names}
    assert all(ModelRecord.decode(value).path == "s3://b/new" for value in found.values())


def test_a_dry_run_says_all_and_does_nothing(admin: Admin, saved: Path, other: Keys) -> None:
    admin.put({other.model("one"): ModelRecord(type="onnx", path="s3://b/theirs").encode()})
    before = admin.all(other)
    result = restored(admin, saved, other, "--dry-run")
    assert result.exit_code == 0
    assert "would be created: 1 model, 1 vmodel, 1 setting" in result.stdout
    assert "model one" in result.stderr
    assert "would be overwritten: 1 model" in restored(admin, saved, other, "--dry-run", "--overwrite").stdout
    assert admin.all(other) == before


def test_it_goes_through_pipes(admin: Admin, saved: Path, keys: Keys, other: Keys) -> None:
    """`mesh backup -` writes only the backup to standard output, and `mesh restore -` reads it from standard input."""
    result = admin.run("backup", "-", "--base", keys.base)
    assert result.exit_code == 0, result.stderr
    assert "saved 2 models" in result.stderr
    done = admin.run("restore", "-", "--base", other.base, stdin=result.stdout_bytes)
    assert done.exit_code == 0, done.stderr
    assert b"registry/one" in admin.all(other)


def test_only_its_owner_may_read_it(saved: Path) -> None:
    """Only the backup's owner may read the file, because registrations may contain credentials. No partial file is left
    beside the backup."""
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert os.listdir(saved.parent) == [saved.name]


def test_a_backup_that_fails_leaves_the_former_one(own_etcd, saved: Path, keys: Keys) -> None:
    before = saved.read_bytes()
    own_etcd.kill9()
    result = Admin(own_etcd).run("backup", str(saved), "--base", keys.base)
    assert result.exit_code == 4
    assert "etcd does not answer" in result.stderr
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent).count(saved.name) == 1


def test_nothing_to_save_is_remarked(admin: Admin, keys: Keys, tmp_path: Path) -> None:
    """If a backup is empty, the command says so, because the prefix is most likely wrong."""
    result = admin.run("backup", str(tmp_path / "b"), "--base", keys.base + "-no")
    assert result.exit_code == 0
    assert "check that --base" in result.stderr


def test_a_damaged_file_touches_nothing(admin: Admin, saved: Path, other: Keys) -> None:
    raw = saved.read_bytes()
    saved.write_bytes(raw[:-20])
    result = restored(admin, saved, other)
    assert result.exit_code == 1
    assert "truncated" in result.stderr
    assert admin.all(other) == {}


def test_another_installations_prefix_is_refused(admin: Admin, saved: Path, other: Keys) -> None:
    admin.put({other.owner: b'{"install":"b/mesh","schema":1}'})
    result = restored(admin, saved, other, "--install-id", "a/mesh")
    assert result.exit_code == 1
    assert "'b/mesh'" in result.stderr
    assert restored(admin, saved, other, "--install-id", "b/mesh").exit_code == 0


def test_a_mesh_of_a_later_schema_is_refused(admin: Admin, saved: Path, other: Keys) -> None:
    admin.put({other.owner: b'{"install":"b/mesh","schema":99}'})
    result = restored(admin, saved, other)
    assert result.exit_code == 1
    assert "use a newer program" in result.stderr


@pytest.mark.parametrize("source", ["/no/such/file", "/"])
def test_what_cannot_be_read_is_said(admin: Admin, source: str) -> None:
    result = admin.run("restore", source)
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_a_folder_that_is_not_there_is_said(admin: Admin) -> None:
    result = admin.run("backup", "/no/such/folder/file")
    assert result.exit_code == 1
    assert "cannot be written: No such file" in result.stderr


# --- from a snapshot


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_snapshot_is_restored_from(admin: Admin, keys: Keys, other: Keys, tmp_path: Path, named: str) -> None:
    """Only registrations are restored from a snapshot. If a folder is given, the newest snapshot in the folder is used.
    No temporary files are left."""
    folder = tmp_path / "snapshots"
    admin.put(content(keys))
    assert admin.run("snapshot", "--dir", str(folder)).exit_code == 0
    (made,) = folder.iterdir()
    if named == "folder":
        (folder / "etcd-1-1-20200101T000000Z.db").write_bytes(b"older")
    source = made if named == "file" else folder
    result = restored(admin, source, other, "--from-base", keys.base)
    assert result.exit_code == 0, result.stderr
    assert "created: 2 models, 1 vmodel, 1 setting" in result.stdout
    assert f"made {made.name.split('-')[3].removesuffix('.db')} (a snapshot)" in result.stdout
    assert other.pod("pod-1") not in admin.all(other)
    assert len(admin.all(other)) == 5
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_snapshot_that_is_damaged_or_of_another_mesh(admin: Admin, keys: Keys, other: Keys, tmp_path: Path) -> None:
    """A damaged snapshot, or a snapshot of another mesh, is reported, and nothing is written."""
    admin.put(content(keys))
    assert admin.run("snapshot", "--dir", str(tmp_path / "snapshots")).exit_code == 0
    (made,) = (tmp_path / "snapshots").iterdir()
    strange = restored(admin, made, other)
    assert strange.exit_code == 2
    assert f"has no registrations below {other.base}" in strange.stderr
    assert "--from-base" in strange.stderr
    raw = bytearray(made.read_bytes())
    raw[len(raw) // 2] ^= 1
    made.write_bytes(raw)
    damaged = restored(admin, made, other, "--from-base", keys.base)
    assert damaged.exit_code == 1
    assert "cannot be restored" in damaged.stderr
    (tmp_path / "empty").mkdir()
    assert "without snapshots" in restored(admin, tmp_path / "empty", other).stderr
    assert admin.all(other) == {}


def test_the_content_of_a_registration_is_restored_with_it(admin: Admin, keys: Keys, tmp_path: Path) -> None:
    """A registration is restored with its digest and generation. A later generation in the mesh does not count as a
    difference, and is kept."""
    loaded = ModelRecord(type="onnx", path="/m", digest="ab" * 32, digest_ms=5, generation=2)
    admin.put({keys.model("m"): loaded.encode()})
    target = tmp_path / "registry.backup"
    assert admin.run("backup", str(target), "--base", keys.base).exit_code == 0
    admin.delete(keys.model("m"))
    assert restored(admin, target, keys).exit_code == 0
    assert ModelRecord.decode(admin.all(keys)[b"registry/m"]) == loaded
    later = loaded.reloaded()
    admin.put({keys.model("m"): later.encode()})
    assert restored(admin, target, keys).exit_code == 0
    assert ModelRecord.decode(admin.all(keys)[b"registry/m"]) == later
