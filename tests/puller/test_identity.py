"""The identity of a file is its bytes: whatever stores claim, no caller gets the bytes of another caller's file."""

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.puller import Pulled, Puller
from puller.source import Source
from tests.support.liars import OLD, File, Liar, liars, recent, unique
from tests.support.once import ONCE

SIZE = 3000
CALLERS = ("alice", "bob")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Pod:
    """A puller with a storage secret that has a key for each endpoint and caller."""

    def __init__(self, folder: Path, stores: list[Liar]) -> None:
        self._folder = folder
        self.secrets = folder / "secrets"
        self.secrets.mkdir(exist_ok=True)
        for number, store in enumerate(stores):
            for who in CALLERS:
                base = {"endpoint_url": f"{store.origin}/s3", "region": "us-east-1"}
                key = {"access_key_id": who, "secret_access_key": "x"}
                self.write(f"s3-{number}-{who}", {"type": "s3", **base, **key})
                self.write(f"hf-{number}-{who}", {"type": "hf", "endpoint_url": f"{store.origin}/hub", "token": who})
        self.puller = self._puller()

    def write(self, name: str, settings: dict[str, str]) -> None:
        (self.secrets / name).write_text(json.dumps(settings))

    def _puller(self) -> Puller:
        policy = HttpPolicy(allow_private=True, connect_timeout=5, read_timeout=5)
        puller = Puller(directory=self._folder / "models", http=policy, retries=ONCE, secrets=self.secrets)
        puller.sweep()
        return puller

    async def pull(self, store: int, port: int, who: str, place: str, into: str = "m", sha256: str = "") -> Pulled:
        """Pulls the file at a place of a `Liar`, as the given caller."""
        _, kind, *rest = place.split("/")
        match kind:
            case "s3":
                source = Source(f"s3://{'/'.join(rest)}", f'{{"storage_key": "s3-{store}-{who}"}}', sha256)
            case "hub":
                source = Source(f"hf://{'/'.join(rest)}", f'{{"storage_key": "hf-{store}-{who}"}}', sha256)
            case _:
                source = Source(f"http://{who}:x@127.0.0.1:{port}{place}", "", sha256)
        return await self.puller.pull(source, into=into)

    async def restart(self) -> None:
        await self.puller.close()
        self.puller = self._puller()


@pytest.fixture
async def stores():
    async with liars(2) as made:
        yield made


@pytest.fixture
async def pod(tmp_path, stores):
    pod = Pod(tmp_path, stores)
    yield pod
    await pod.puller.close()


@pytest.mark.parametrize("changed", [OLD, "now"], ids=["settled", "fresh"])
@pytest.mark.parametrize("etag", ['"d41d8cd98f00b204e9800998ecf8427e"', '"d41d8cd98f00b204e9800998ecf8427e-1"', '"x"'])
async def test_a_store_with_one_etag_for_all(pod, stores, etag, changed):
    """Every model gets its own bytes from a store with one ETag for all: four models of equal size in one bucket, two
    in another, and one that is replaced at equal size."""
    store = stores[0]

    def put(place: str) -> None:
        when = recent() if changed == "now" else OLD
        store.files[place] = File(unique(SIZE), etag=etag, changed=when)

    places = [f"/s3/b/{number}" for number in range(4)] + [f"/s3/other/{number}" for number in range(2)]
    for place in places:
        put(place)
    for _ in range(2):
        for place in places:
            pulled = await pod.pull(0, store.port, "alice", place, place)
            assert pulled.path.read_bytes() == store.files[place].content
    # A replacement within the second of the first write hides its time; one a day later shows it.
    put(places[3])
    if changed is OLD:
        store.files[places[3]] = replace(store.files[places[3]], changed=OLD.replace(day=2))
    pulled = await pod.pull(0, store.port, "alice", places[3], places[3])
    assert pulled.path.read_bytes() == store.files[places[3]].content


@pytest.mark.parametrize("place", ["/s3/b/m", "/www/m", "/hub/org/repo/m"])
async def test_an_unchanged_file_is_not_fetched_again(pod, stores, place):
    """An unchanged file is not fetched again for the same place, version and caller, also after a restart."""
    store = stores[0]
    store.files[place] = File(unique(SIZE))
    first = await pod.pull(0, store.port, "alice", place)
    assert first.fetched_bytes == SIZE
    assert (await pod.pull(0, store.port, "alice", place)).fetched_bytes == 0
    await pod.restart()
    again = await pod.pull(0, store.port, "alice", place)
    assert again.fetched_bytes == 0
    assert again.digest == first.digest == sha256(store.files[place].content)


async def test_a_fresh_file_with_a_true_digest_is_not_fetched_again(pod, stores):
    """A fresh file whose ETag is the MD5 of its bytes is not fetched again, because such an ETag identifies the version
    whenever it was written."""
    content = unique(SIZE)
    stores[0].files["/s3/b/m"] = File(content, etag=f'"{hashlib.md5(content).hexdigest()}"', changed=recent())
    for fetched in (SIZE, 0):
        assert (await pod.pull(0, stores[0].port, "alice", "/s3/b/m")).fetched_bytes == fetched


@pytest.mark.parametrize("place", ["/s3/b/m", "/www/m", "/hub/org/repo/m"])
async def test_another_callers_file_is_asked_for(pod, stores, place):
    """A caller who may not read a file is refused, even if the file is on the disk for another caller."""
    store = stores[0]
    store.files[place] = File(unique(SIZE))
    await pod.pull(0, store.port, "alice", place)
    store.may_read = lambda who, _: who == "alice"
    with pytest.raises(PullError) as caught:
        await pod.pull(0, store.port, "bob", place)
    assert caught.value.kind is PullErrorKind.FORBIDDEN


async def test_a_hub_that_lists_and_does_not_deliver(pod, stores):
    """If a hub lists a file's digest but does not deliver the file, a caller gets its bytes only if this hub has
    delivered them for the caller's own token before."""
    secret = unique(SIZE)
    mine, theirs = stores
    theirs.files["/hub/org/theirs/m"] = File(secret, sha256=sha256(secret))
    mine.files["/hub/org/mine/m"] = File(secret, sha256=sha256(secret))
    mine.may_read = lambda who, place: who == "bob" and place == "/hub/org/mine/m"
    await pod.pull(1, theirs.port, "alice", "/hub/org/theirs/m")
    await pod.pull(0, mine.port, "bob", "/hub/org/mine/m")
    for who in ("alice", "bob"):
        mine.files["/hub/org/gated/m"] = File(secret, sha256=sha256(secret))
        if who == "alice":
            with pytest.raises(PullError) as caught:
                await pod.pull(0, mine.port, who, "/hub/org/gated/m")
            assert caught.value.kind is PullErrorKind.FORBIDDEN
        else:  # this hub has delivered these bytes for this token, from another repository
            assert (await pod.pull(0, mine.port, who, "/hub/org/gated/m")).fetched_bytes == 0


async def test_a_server_that_names_somebody_elses_file(pod, stores):
    """If a server names somebody else's file in Repr-Digest, its own bytes are fetched, and the mismatch is an
    error."""
    mine, theirs = stores
    secret = unique(SIZE)
    theirs.files["/www/secret"] = File(secret, sha256=sha256(secret))
    await pod.pull(1, theirs.port, "alice", "/www/secret")
    mine.files["/www/m"] = File(unique(SIZE), sha256=sha256(secret))
    with pytest.raises(PullError) as caught:
        await pod.pull(0, mine.port, "alice", "/www/m")
    assert caught.value.kind is PullErrorKind.CHECKSUM


@pytest.mark.parametrize("place", ["/s3/b/m", "/www/m", "/hub/org/repo/m"])
async def test_a_registration_that_names_somebody_elses_file(pod, stores, place):
    """A registration with the SHA-256 of somebody else's file gets nothing from the disk: its own store is asked for
    the file, and does not have it."""
    mine, theirs = stores
    secret = unique(SIZE)
    theirs.files["/www/secret"] = File(secret)
    mine.files[place] = File(unique(SIZE))
    await pod.pull(1, theirs.port, "alice", "/www/secret")
    with pytest.raises(PullError) as caught:
        await pod.pull(0, mine.port, "alice", place, sha256=sha256(secret))
    assert caught.value.kind is PullErrorKind.CHECKSUM
    mine.files[place] = File(secret, etag='"new"')
    pulled = await pod.pull(0, mine.port, "alice", place, sha256=sha256(secret))
    assert (pulled.path.read_bytes(), pulled.fetched_bytes) == (secret, SIZE)


async def test_equal_files_are_kept_once(pod, stores):
    """Equal files from a bucket, a web server and a hub are each fetched, but kept once."""
    content = unique(SIZE)
    for place in ("/s3/b/m", "/www/m", "/hub/org/repo/m"):
        stores[0].files[place] = File(content)
    inodes = set()
    for place in stores[0].files:
        pulled = await pod.pull(0, stores[0].port, "alice", place, into=place)
        assert pulled.fetched_bytes == SIZE
        inodes.add(pulled.path.stat().st_ino)
    assert len(inodes) == 1
    assert pod.puller.statistics().cache.bytes == SIZE


async def test_a_server_that_calls_two_versions_alike_but_for_their_time(pod, stores):
    """A server that answers "not modified" to the ETag of another version is not believed if its dates contradict
    that."""
    store = stores[0]
    for day in (1, 2):
        store.files["/www/m"] = File(unique(SIZE), changed=OLD.replace(day=day))
        pulled = await pod.pull(0, store.port, "alice", "/www/m")
        assert pulled.path.read_bytes() == store.files["/www/m"].content


@pytest.mark.parametrize("how", ["overwritten", "truncated", "same time"])
@pytest.mark.parametrize("place", ["/s3/b/m", "/www/m", "/hub/org/repo/m"])
async def test_damage_on_disk_is_fetched_again(pod, stores, place, how):
    """A file that was damaged on disk is fetched again, even if a digest is registered, and also after a restart."""
    store = stores[0]
    content = unique(SIZE)
    store.files[place] = File(content)
    for registered, restart in (("", False), (sha256(content), False), ("", True)):
        if how == "same time" and not registered and not restart:
            continue  # only reading the file would show that
        pulled = await pod.pull(0, store.port, "alice", place, sha256=registered)
        before = pulled.path.stat()
        with pulled.path.open("r+b") as file:
            file.truncate(100) if how == "truncated" else file.write(b"damaged")
        if how == "same time":
            os.utime(pulled.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if restart:
            await pod.restart()
        again = await pod.pull(0, store.port, "alice", place, sha256=registered)
        assert again.path.read_bytes() == content
        assert again.fetched_bytes == SIZE


PLACES = ("/s3/a/1", "/s3/a/2", "/s3/b/1", "/www/1", "/www/2", "/hub/o/r/1", "/hub/o/s/1")
ETAGS = ('"x"', '"x"', '"d41d8cd98f00b204e9800998ecf8427e"', '"d41d8cd98f00b204e9800998ecf8427e-1"', "md5", "")
Claims = tuple[str, str, str, str, int]  # ETag, time of change, announced digest, the hub's oid, size


@dataclass
class Account:
    """A record of files, where they are stored, and who may read them."""

    pod: Pod
    stores: list[Liar]
    forbidden: set[tuple[int, str, str]] = field(default_factory=set)
    history: dict[tuple[int, str], list[File]] = field(default_factory=dict)
    claims: dict[tuple[int, str], Claims] = field(default_factory=dict)
    hits: int = 0
    fetched: int = 0

    def anothers(self, but: tuple[int, str]) -> str:
        """Returns the digest of a file at another place, or "" if there is none."""
        for there, versions in self.history.items():
            if there != but:
                return sha256(versions[-1].content)
        return ""

    def put(self, spot: tuple[int, str], claims: Claims | None, again: bool) -> None:
        """Puts a file, which keeps the claims of the former file unless `claims` is given."""
        store, place = spot
        etag, when, digest, oid, size = self.claims[spot] = claims or self.claims[spot]
        before = self.history.get((store, place), [])
        # Sometimes equal bytes are written again, and sometimes other bytes get the same claims.
        content = before[-1].content if again and before else unique(size)
        file = File(
            content,
            etag=f'"{hashlib.md5(content).hexdigest()}"' if etag == "md5" else etag,
            changed={"old": OLD, "older": OLD.replace(year=2019), "now": recent(), "none": None}[when],
            sha256={"": "", "right": sha256(content), "another's": self.anothers((store, place))}[digest],
            oid=oid,
        )
        if place.startswith("/s3/") and file.changed is None:
            file = replace(file, changed=OLD)
        self.stores[store].files[place] = file
        self.history.setdefault((store, place), []).append(file)

    async def pull(self, spot: tuple[int, str], who: str, registered: str) -> None:
        store, place = spot
        liar = self.stores[store]
        now = liar.files.get(place)
        named = {"": "", "right": sha256(now.content) if now else "", "another's": self.anothers((store, place))}
        try:
            pulled = await self.pod.pull(store, liar.port, who, place, sha256=named[registered])
        except PullError as error:
            allowed = (PullErrorKind.NOT_FOUND, PullErrorKind.NO_BUCKET, PullErrorKind.EMPTY, PullErrorKind.FORBIDDEN)
            assert error.kind in (*allowed, PullErrorKind.CHECKSUM, PullErrorKind.CREDENTIALS), error
            return
        self.hits += not pulled.fetched_bytes
        self.fetched += bool(pulled.fetched_bytes)
        content = pulled.path.read_bytes()
        assert now is not None
        assert pulled.digest == sha256(content)
        to_them = [(there, bytes_) for whom, there, bytes_ in liar.delivered if whom == who]
        assert content in [bytes_ for _, bytes_ in to_them], "bytes that this store has not delivered to this caller"
        if named[registered]:
            assert pulled.digest == named[registered]
        if content == now.content:
            return
        if (place, content) not in to_them:
            # Content from elsewhere in the same store is right only if the registration or the store names its digest.
            assert pulled.digest in (named[registered], now.sha256)
            return
        # Former content of this place is right only if the store made the same claims about both, and not just now.
        said = [file for file in self.history[store, place] if file.content == content]
        assert any(now.says_nothing_else(file, place) for file in said), f"{place} is {now}, the pull had {said}"
        assert now.changed is None or (recent() - now.changed).total_seconds() > 60, "the file was replaced just now"


def _claims(random: Random) -> Claims:
    return (
        random.choice(ETAGS),
        random.choice(("old", "old", "older", "now", "none")),
        random.choice(("", "", "", "right", "another's")),
        random.choice(("", "", "f" * 40)),
        random.choice((SIZE, SIZE, SIZE, SIZE + 1)),
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))])
async def test_no_caller_gets_bytes_of_another(pod, stores, seed):
    """Stores, claims, sizes, callers and replacements are random. A pull returns bytes that the store delivered to this
    caller from this place, or that have the registered digest or the digest that the store announces. They are the
    latest bytes, unless the store makes exactly the same claims about former ones."""
    random = Random(seed)
    account = Account(pod, stores)
    for number, store in enumerate(stores):
        store.may_read = lambda who, place, number=number: (number, place, who) not in account.forbidden
    spots = [(number, place) for number in (0, 1) for place in PLACES]
    for spot in spots:
        account.put(spot, (ETAGS[0], "old", "", "", SIZE), again=False)
    for _ in range(300):
        spot, who = random.choice(spots), random.choice(CALLERS)
        match random.choices(("pull", "replace", "put", "permit", "restart"), (60, 12, 12, 6, 1))[0]:
            case "pull":
                await account.pull(spot, who, random.choice(("", "", "", "right", "another's")))
            case "replace":  # the new content has the same claims as before
                account.put(spot, None, again=random.random() < 0.2)
            case "put":
                account.put(spot, _claims(random), again=random.random() < 0.2)
            case "permit" if (*spot, who) in account.forbidden or len(account.forbidden) < 6:
                account.forbidden ^= {(*spot, who)}
            case "restart":
                await pod.restart()
    assert account.hits > 10, "too few files were found on disk to prove anything"
    assert account.fetched > 10
