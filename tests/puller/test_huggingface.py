"""Pulls from Hugging Face repositories, against a small server that implements the hub's documented API over real HTTP:
revisions, paged trees, paths, and redirects to another host for large files. Tests cannot reach the hub itself."""

import hashlib
import json
import os

import pytest
from aiohttp import web

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.limits import PullLimits
from puller.puller import Puller
from puller.source import Source
from tests.support.once import ONCE

TOKEN = "hf_secret_of_this_test"
SMALL, LARGE = os.urandom(5000), os.urandom(3 * 2**20 + 5)
COMMITS = {"main": "a" * 40, "v1.0": "b" * 40}
PAGE = 7


class Hub:
    """One repository, and the host that serves its large files."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {commit: {} for commit in COMMITS.values()}
        self.private = False
        self.requests: list[tuple[str, str]] = []  # path, Authorization
        self.cdn: list[tuple[str, str, str]] = []  # path, Authorization, Range
        self.port = self.cdn_port = 0

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        authorization = request.headers.get("Authorization", "")
        self.requests.append((request.path, authorization))
        if self.private and authorization != f"Bearer {TOKEN}":
            return web.json_response({"error": "Invalid username or password."}, status=401)
        match request.path.removeprefix("/").split("/"):
            case ["api", "models", "org", "repo", "revision", revision]:
                if revision not in COMMITS:
                    return web.json_response({"error": "Revision not found"}, status=404)
                return web.json_response({"id": "org/repo", "sha": COMMITS[revision]})
            case ["api", "models", "org", "repo", "paths-info", commit]:
                wanted = (await self.body(request))["paths"]
                return web.json_response([item for item in self.items(commit) if item["path"] in wanted])
            case ["api", "models", "org", "repo", "tree", commit, *below]:
                assert request.query.get("recursive") == "true"
                prefix = "/".join(below) + "/" if below else ""
                items = [item for item in self.items(commit) if item["path"].startswith(prefix)]
                start = int(request.query.get("cursor", 0))
                headers = {}
                if start + PAGE < len(items):
                    url = request.url.update_query(cursor=str(start + PAGE))
                    headers["Link"] = f'<{url}>; rel="next"'
                return web.json_response(items[start : start + PAGE], headers=headers)
            case ["org", "repo", "resolve", commit, *path]:
                content = self.files.get(commit, {}).get("/".join(path))
                if content is None:
                    return web.Response(status=404)
                if len(content) > 10_000:
                    url = f"http://localhost:{self.cdn_port}/{commit}/{'/'.join(path)}?signature=x"
                    return web.Response(status=302, headers={"Location": url})
                return web.Response(body=content)
        return web.Response(status=404)

    @staticmethod
    async def body(request: web.BaseRequest) -> dict[str, list[str]]:
        return json.loads(await request.read())

    async def deliver(self, request: web.BaseRequest) -> web.StreamResponse:
        wanted = request.headers.get("Range", "")
        self.cdn.append((request.path, request.headers.get("Authorization", ""), wanted))
        commit, _, path = request.path[1:].partition("/")
        content = self.files[commit][path]
        if not wanted:
            return web.Response(body=content)
        start, end = map(int, wanted.removeprefix("bytes=").split("-"))
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return web.Response(status=206, body=content[start : end + 1], headers=headers)

    def items(self, commit: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = [{"type": "directory", "path": "onnx", "oid": "d" * 40, "size": 0}]
        for path, content in sorted(self.files[commit].items()):
            item: dict[str, object] = {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if len(content) > 10_000:
                item["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            found.append(item)
        return found


@pytest.fixture
async def hub(monkeypatch):
    hub = Hub()
    runners = []
    for handler in (hub.answer, hub.deliver):
        runner = web.ServerRunner(web.Server(handler))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
    hub.port, hub.cdn_port = (runner.addresses[0][1] for runner in runners)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def puller(tmp_path, hub):
    (tmp_path / "secret").mkdir()
    puller = Puller(
        directory=tmp_path / "models",
        secrets=tmp_path / "secret",
        http=HttpPolicy(allow_private=True, connect_timeout=5, read_timeout=5),
        limits=PullLimits(ranges=3, range_bytes=2**20),
        retries=ONCE,
    )
    puller.sweep()
    yield puller
    await puller.close()


async def refused(puller: Puller, path: str, kind: PullErrorKind, key: str = "") -> str:
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(path, key), into="m")
    assert caught.value.kind is kind, caught.value
    assert TOKEN not in str(caught.value)
    return caught.value.text


async def test_one_file_at_a_revision(puller, hub):
    """One file is pulled at a revision: the branch main by default, or a tag after @ or a colon."""
    hub.files[COMMITS["main"]] = {"onnx/model.onnx": SMALL, "README.md": b"x"}
    hub.files[COMMITS["v1.0"]] = {"onnx/model.onnx": b"older"}
    assert (await puller.pull(Source("hf://org/repo/onnx/model.onnx"), into="m")).path.read_bytes() == SMALL
    for path in ("hf://org/repo@v1.0/onnx/model.onnx", "hf://org/repo:v1.0/onnx/model.onnx"):
        assert (await puller.pull(Source(path), into="m")).path.read_bytes() == b"older"


async def test_a_tree_of_many_pages(puller, hub):
    """Every file in and below a folder arrives under its own name, even if the tree has many pages."""
    files = {f"onnx/part-{number:03}": b"%d" % number for number in range(40)}
    hub.files[COMMITS["main"]] = {**files, "other/file": b"x"}
    pulled = await puller.pull(Source("hf://org/repo/onnx"), into="m")
    found = {str(file.relative_to(pulled.path)): file.read_bytes() for file in pulled.path.rglob("*") if file.is_file()}
    assert found == {name.removeprefix("onnx/"): content for name, content in files.items()}
    whole = await puller.pull(Source("hf://org/repo"), into="m")
    assert (whole.path / "other" / "file").read_bytes() == b"x"


async def test_large_files_come_in_parts_from_elsewhere_without_the_token(puller, hub, tmp_path):
    """Large files are fetched in ranges from another host, without the hub's token. Equal contents in another revision
    are not fetched again."""
    hub.private = True
    (tmp_path / "secret" / "default_hf").write_text(json.dumps({"type": "hf", "token": TOKEN}))
    hub.files[COMMITS["main"]] = {"model.onnx": LARGE}
    hub.files[COMMITS["v1.0"]] = {"renamed.onnx": LARGE}
    assert (await puller.pull(Source("hf://org/repo/model.onnx"), into="m")).path.read_bytes() == LARGE
    assert len(hub.cdn) == 4
    assert not any(authorization for _, authorization, _ in hub.cdn)
    assert all(authorization == f"Bearer {TOKEN}" for _, authorization in hub.requests)
    second = await puller.pull(Source("hf://org/repo@v1.0/renamed.onnx"), into="n")
    assert second.path.read_bytes() == LARGE
    assert (second.fetched_bytes, len(hub.cdn)) == (0, 4)


async def test_what_arrives_is_checked_against_the_hubs_digest(puller, hub, monkeypatch):
    hub.files[COMMITS["main"]] = {"model.onnx": LARGE}
    items = Hub.items

    def other(self, commit):
        found = items(self, commit)
        found[-1]["lfs"]["oid"] = "0" * 64
        return found

    monkeypatch.setattr(Hub, "items", other)
    assert "0" * 64 in await refused(puller, "hf://org/repo/model.onnx", PullErrorKind.CHECKSUM)


async def test_what_is_not_there(puller, hub):
    """A missing repository or revision counts as a missing bucket, and a missing path as an empty folder."""
    hub.files[COMMITS["main"]] = {"model.onnx": SMALL}
    assert "org/none" in await refused(puller, "hf://org/none/model.onnx", PullErrorKind.NO_BUCKET)
    await refused(puller, "hf://org/repo@v9/model.onnx", PullErrorKind.NO_BUCKET)
    await refused(puller, "hf://org/repo/other.onnx", PullErrorKind.EMPTY)


async def test_a_private_repository(puller, hub):
    """Without a token, the error for a private repository says that it needs one."""
    hub.private = True
    hub.files[COMMITS["main"]] = {"model.onnx": SMALL}
    assert "token" in await refused(puller, "hf://org/repo/model.onnx", PullErrorKind.CREDENTIALS)


async def test_a_registration_cannot_send_the_operators_token_elsewhere(puller, hub, tmp_path):
    """The operator's token is not sent to an endpoint that a registration chose without a token of its own."""
    (tmp_path / "secret" / "mine").write_text(json.dumps({"type": "hf", "token": TOKEN}))
    key = json.dumps(
        {"storage_key": "mine", "storage_params": {"endpoint_url": "http://127.0.0.1:1", "repository": "org/repo"}}
    )
    await refused(puller, "model.onnx", PullErrorKind.FORBIDDEN, key)


async def test_an_endpoint_that_is_no_hub(puller, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.cdn_port}/x")
    hub.files["x"] = {"api/models/org/repo/revision/main": b"<html>"}
    assert "hub" in await refused(puller, "hf://org/repo/model.onnx", PullErrorKind.UNREACHABLE)


async def test_what_one_hub_says_of_a_file_is_believed_of_that_hub_only(hub, puller, monkeypatch):
    """A hub's claims about a file count for that hub only. git's digest is not checked, so a hub that reports another
    hub's digest must not affect the models of the other hub."""
    content = b"small"
    hub.files[COMMITS["main"]] = {"m.onnx": content}
    source = Source("hf://org/repo/m.onnx")
    await puller.pull(source, into="there")
    before = len(hub.requests)
    again = await puller.pull(source, into="again")
    assert again.fetched_bytes == 0
    monkeypatch.setenv("HF_ENDPOINT", f"http://localhost:{hub.port}")
    elsewhere = await puller.pull(source, into="elsewhere")
    assert elsewhere.fetched_bytes == len(content)
    assert len(hub.requests) > before
