"""Stores on object storage: a real S3 server on loopback, and all that goes wrong with one."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from object_storage import BUCKET, Storage, in_environment, serving
from tiny_raw import content

from brstnet import __main__ as cli
from brstnet.config import Settings
from brstnet.data import cache, mirror, remote
from brstnet.data.index import SECTION_FILES, hashes
from brstnet.data.mirror import open_store, push
from brstnet.data.store import Store, sha256
from sweeps.plan import check_folds, describe
from sweeps.record import describe_store
from sweeps.run import open_stores
from sweeps.space import Asked, Sweep
from sweeps.trial import Job, train_folds

pytestmark = pytest.mark.slow  # all of it, together


@pytest.fixture(scope="module")
def server() -> Iterator[Storage]:
    with serving() as storage:
        yield storage


@pytest.fixture
def storage(server: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """Object storage by environment alone, and an empty cache."""
    in_environment(monkeypatch, server)
    monkeypatch.setenv("BRSTNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BRSTNET_CACHE_GB", raising=False)
    server.asked.clear()
    yield server
    server.fail, server.seconds = lambda _method, _path: 0, 0.0


@pytest.fixture(scope="module")
def there(server: Storage, demo_store: Store) -> str:
    """The demo store on object storage; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        in_environment(patch, server)
        push(demo_store.path, server.uri("team/demo"))
    return server.uri("team/demo")


def changed(store: Store, folder: Path, byte: int = 7) -> Path:
    """Another store: the same but for a pixel, its index right about it."""
    shutil.copytree(store.path, folder, ignore=shutil.ignore_patterns("derived"))
    index = json.loads((folder / "index.json").read_text())
    entry = index["sections"][0]
    file = folder / entry["section"] / "patches.npy"
    patches = np.load(file)
    patches.flat[0] = (int(patches.flat[0]) + byte) % 256
    np.save(file, patches)
    entry["files"]["patches.npy"] = sha256(file)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def command(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "brstnet", *map(str, words)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


OPEN = (
    "import sys; from brstnet.data.mirror import open_store; s = open_store(sys.argv[1]);"
    "print(s.digest, [int(s.patches(n).sum()) for n in s.sections])"
)


def opener(uri: str) -> subprocess.Popen[str]:
    """Another process that opens a store."""
    words = [sys.executable, "-c", OPEN, uri]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def copies(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "cache" / "stores").iterdir() if p.is_dir())


# Copies ------------------------------------------------------------------------------------------


def test_a_copy_is_the_store(
    storage: Storage, there: str, demo_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(there)
    named = (*hashes(demo_store.index), "index.json")
    original = {name: (demo_store.path / name).read_bytes() for name in named}
    copy = content(store.path)
    sizes = json.loads(copy.pop("copy.json"))
    assert copy == original
    assert sizes == {n: len(c) for n, c in original.items() if n != "index.json"}
    assert (store.digest, store.name, store.origin) == (demo_store.digest, "demo", there)
    assert store.verify() == []
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == ["copying", "copied"]
    assert "MB/s" in told[1]
    assert there in told[1]


def test_it_is_copied_once(storage: Storage, there: str) -> None:
    first = open_store(there)
    files = storage.gets()
    assert len(files) == len(set(files)) == len(hashes(first.index))
    second = open_store(there)
    assert second.path == first.path
    assert storage.gets() == files
    storage.asked.clear()
    assert open_store(first.address).path == first.path, "as a sweep's trials open it"
    assert storage.asked == [], "nothing is asked of storage for what is here"


def test_a_path_is_opened_as_it_is(storage: Storage, demo_store: Store) -> None:
    for where in (demo_store.path, str(demo_store.path)):
        store = open_store(where)
        assert (store.path, store.address) == (demo_store.path, str(demo_store.path.resolve()))
    assert storage.asked == []


def test_a_folder_by_address_is_copied_too(
    storage: Storage, demo_store: Store, tmp_path: Path
) -> None:
    uri = (tmp_path / "shared" / "store").as_uri()
    assert "uploaded" in push(demo_store.path, uri)
    assert open_store(uri).path.parent == tmp_path / "cache" / "stores"
    assert open_store(uri).digest == demo_store.digest


def test_metadata_alone_then_a_section_then_all(
    storage: Storage, there: str, demo_store: Store
) -> None:
    """A head without room reads counts; patches come when somebody asks for them."""
    store = open_store(there, patches=False)
    assert storage.gets("patches.npy") == []
    assert len(storage.gets("spots.h5ad")) == len(store.sections)
    section, other = list(store.sections)[:2]
    assert store.counts([section]).sum() == demo_store.counts([section]).sum()
    with pytest.raises(FileNotFoundError, match=r"patches\.npy: missing from the store"):
        Store(store.path)
    np.testing.assert_array_equal(store.patches(section), demo_store.patches(section))
    np.testing.assert_array_equal(store.patches(other, 16), demo_store.patches(other, 16))
    assert len(storage.gets("patches.npy")) == 2
    whole = open_store(there)
    assert whole.path == store.path
    files = storage.gets()
    assert len(files) == len(set(files)) == len(hashes(store.index)), "nothing was fetched twice"


def test_another_store_at_the_same_address_is_another_copy(
    storage: Storage, demo_store: Store, tmp_path: Path
) -> None:
    uri = storage.uri("moving")
    push(demo_store.path, uri)
    before = open_store(uri)
    push(changed(demo_store, tmp_path / "other"), uri, replace=True)
    after = open_store(uri)
    assert after.path != before.path
    assert after.digest != before.digest
    assert open_store(before.address).path == before.path, "the sweep that began with it goes on"
    shutil.rmtree(before.path)  # on a node that joins late
    with pytest.raises(ValueError, match=r"here lies store .* now, but .* was asked for"):
        open_store(before.address)


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("s3://stores/none", FileNotFoundError),
        ("s3://no-such-bucket/none", FileNotFoundError),
        ("s3://me:secret@stores/none", ValueError),
        ("gopher://stores/none", ValueError),
        ("s3://stores/none#../../../etc", ValueError),
    ],
)
def test_what_is_no_store_is_refused(
    storage: Storage, where: str, fault: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(fault, match="none") as caught:
        open_store(where)
    assert "secret" not in str(caught.value)
    assert cli.main(["info", where]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_commands_take_addresses(
    storage: Storage, there: str, demo_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", there]) == 0
    assert demo_store.digest in capsys.readouterr().out
    assert storage.gets("patches.npy") == []
    assert cli.main(["info", there, "--verify"]) == 0
    assert "every file has the hash" in capsys.readouterr().out


# Several processes -------------------------------------------------------------------------------


def test_processes_at_once_copy_once(storage: Storage, there: str, demo_store: Store) -> None:
    storage.seconds = 0.2
    several = [opener(there) for _ in range(2)]
    ended = [(p.communicate(timeout=120), p.returncode) for p in several]
    assert [code for _, code in ended] == [0, 0], ended
    files = storage.gets()
    assert len(files) == len(set(files)) == len(hashes(demo_store.index))
    (one, told), (other, told_other) = (outputs for outputs, _ in ended)
    assert one == other
    assert (told + told_other).count("waiting for another process that copies") == 1
    assert (told + told_other).count("copied ") == 1


@pytest.mark.slow
def test_killed_in_the_middle_and_gone_on_with(
    storage: Storage, there: str, demo_store: Store, tmp_path: Path
) -> None:
    storage.seconds = 0.4
    process = opener(there)
    while len(storage.gets()) < mirror.THREADS + 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = copies(tmp_path)
    names = list(hashes(demo_store.index))
    done = {name for name in names if (folder / name).is_file()}
    assert 0 < len(done) < len(names)
    time.sleep(0.5)  # what it had asked for is answered
    storage.seconds = 0.0
    storage.asked.clear()
    assert open_store(there).verify() == []
    fetched = {path.removeprefix(f"/{BUCKET}/team/demo/") for path in storage.gets()}
    assert fetched == set(names) - done
    assert not list(folder.rglob("*.part"))


def test_a_late_node_needs_nobodys_help(
    storage: Storage, there: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a trial gets is the address; the node has an empty disk."""
    address = open_store(there, patches=False).address
    monkeypatch.setenv("BRSTNET_CACHE", str(tmp_path / "late"))
    process = opener(address)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert out.split()[0] == open_store(there).digest


@pytest.mark.slow
def test_a_sweep_on_an_address(
    storage: Storage,
    there: str,
    demo_store: Store,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver copies no patches; a trial on another node does, and scores as from a folder."""
    plan = Sweep(
        name="demo",
        trials=1,
        protocol=settings.protocol,
        training=dataclasses.replace(settings.training, epochs=1),
        space={"genes": [60], "store": ["other"]},
        stores={"other": there},
    )
    stores = open_stores(plan, there)
    assert there in describe(plan, stores[""])
    check_folds(plan, stores)
    assert storage.gets("patches.npy") == []
    assert describe_store(stores[""])["name"] == "demo"
    assert json.loads(describe_store(stores[""])["source"])["path"] == there

    monkeypatch.setenv("BRSTNET_CACHE", str(tmp_path / "node"))
    asked, scores = Asked(number=0, point={"genes": 60, "store": "other"}), []
    for place in (stores["other"].address, str(demo_store.path)):
        out = tmp_path / f"out{len(scores)}"
        job = Job(
            sweep=plan, stores={"": place, "other": place}, out=out, gpus_per_worker=0, session="1"
        )
        notes: list[dict[str, object]] = []
        train_folds(asked, job, notes.append)
        scores.append(notes[-1]["scores"])
    assert scores[0] == scores[1]
    assert len(storage.gets("patches.npy")) == len(demo_store.sections)


# Failing storage ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_storage_that_is_away_for_a_while(
    storage: Storage, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left = {"index.json": 50, "genes.parquet": 5}  # the SDK makes 31 requests of a try

    def fail(_: str, path: str) -> int:
        name = path.rpartition("/")[2]
        if left.get(name, 0) == 0:
            return 0
        left[name] -= 1
        return 503

    storage.fail = fail
    assert open_store(there).verify() == []
    assert "storage is away, trying for" in capsys.readouterr().err
    assert not any(left.values())


@pytest.mark.slow
def test_storage_that_stays_away_is_told_by_its_address(
    storage: Storage, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 2.0)
    storage.fail = lambda _, path: 503 if path.endswith("patches.npy") else 0
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"{there}: storage was away for 2 s; .* goes on where"):
        open_store(there)
    assert time.monotonic() - began < 30
    storage.fail = lambda _method, _path: 0
    store = open_store(there)
    assert store.verify() == []
    assert len(storage.gets("spots.h5ad")) == len(store.sections), "those were not fetched again"


@pytest.mark.slow
def test_no_server_at_all(storage: Storage, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=f"{there}: storage was away"):
        open_store(there)


def test_what_is_forbidden_is_told_at_once(storage: Storage, there: str) -> None:
    storage.fail = lambda _method, _path: 403
    began = time.monotonic()
    with pytest.raises(OSError, match=there):
        open_store(there)
    assert time.monotonic() - began < 10


def test_a_damaged_object_is_fetched_once_more_then_refused(
    storage: Storage, demo_store: Store, tmp_path: Path
) -> None:
    uri, section = storage.uri("damaged"), next(iter(demo_store.sections))
    push(demo_store.path, uri)
    name = f"{section}/spots.h5ad"
    right = storage.get(f"damaged/{name}")
    storage.put(f"damaged/{name}", right[:-1] + b"!")
    storage.asked.clear()
    expected = demo_store.sections[section]["files"]["spots.h5ad"]
    with pytest.raises(ValueError, match=f"{uri}/{name}: damaged: .* must be {expected}, but it"):
        open_store(uri)
    assert len(storage.gets(name)) == 2
    (folder,) = copies(tmp_path)
    assert not (folder / name).exists()
    assert not list(folder.rglob("*.part"))
    storage.put(f"damaged/{name}", right[:-10])
    with pytest.raises(ValueError, match=f"{uri}/{name}: damaged"):
        open_store(uri)
    assert "uploaded 1 of" in push(demo_store.path, uri), "its size differs"
    assert open_store(uri).verify() == []


def test_half_a_copy_of_what_is_no_longer_there(
    storage: Storage, demo_store: Store, tmp_path: Path
) -> None:
    uri = storage.uri("gone")
    push(demo_store.path, uri)
    store = open_store(uri, patches=False)
    push(changed(demo_store, tmp_path / "other"), uri, replace=True)
    with pytest.raises(ValueError, match=r"here lies store .* now, so that the copy of"):
        store.patches(next(iter(store.sections)))
    with pytest.raises(ValueError, match=r"here lies store .* now, so that the copy of"):
        open_store(store.address)


def test_an_object_that_is_missing(storage: Storage, demo_store: Store) -> None:
    uri = storage.uri("lacking")
    push(demo_store.path, uri)
    storage.client.delete_object(Bucket=BUCKET, Key="lacking/genes.parquet")
    with pytest.raises(FileNotFoundError, match=r"lacking/genes\.parquet: the index names it, but"):
        open_store(uri)


# Disk --------------------------------------------------------------------------------------------


def gb(store: Store) -> float:
    return sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file()) / 1e9


def test_what_does_not_fit_is_refused_before_it_is_fetched(
    storage: Storage, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRSTNET_CACHE_GB", "0.00001")
    with pytest.raises(
        OSError, match=r"GB more are needed .* budget of 0\.00 GB .* set BRSTNET_"
    ) as e:
        open_store(there)
    assert e.value.errno == errno.ENOSPC
    assert storage.gets() == []
    monkeypatch.setenv("BRSTNET_CACHE_GB", "much")
    with pytest.raises(ValueError, match="BRSTNET_CACHE_GB must be a number of GB, got 'much'"):
        open_store(there)
    monkeypatch.delenv("BRSTNET_CACHE_GB")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(OSError, match=r"GB more are needed"):
        open_store(there)


def test_the_copy_that_was_used_longest_ago_goes_first(
    storage: Storage,
    demo_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(3):
        push(changed(demo_store, tmp_path / f"s{number}", number + 1), storage.uri(f"s{number}"))
    oldest, newer = open_store(storage.uri("s0")), open_store(storage.uri("s1"))
    paths = [oldest.path, newer.path]
    os.utime(paths[1].with_name(f"{paths[1].name}.use"), (1e9, 1e9))
    os.utime(paths[0].with_name(f"{paths[0].name}.use"), (1e9 + 5, 1e9 + 5))
    monkeypatch.setenv("BRSTNET_CACHE_GB", str(gb(oldest) * 2.5))
    with pytest.raises(OSError, match="other copies in use"):
        open_store(storage.uri("s2"))
    assert all(p.is_dir() for p in paths), "nobody loses a copy that is in use"

    mapped = newer.patches(next(iter(newer.sections)))
    before = int(mapped.sum())
    del newer
    third = open_store(storage.uri("s2"))
    assert [p.is_dir() for p in paths] == [True, False], "the one that is in use stays"
    assert f"{paths[1]}: removed to make room" in capsys.readouterr().err
    assert int(mapped.sum()) == before, "a map stays valid"
    assert sorted(copies(tmp_path)) == sorted([paths[0], third.path])
    del oldest
    again = open_store(storage.uri("s1"))
    assert again.verify() == []
    assert not paths[0].is_dir()


def test_two_copies_in_the_making_share_the_budget(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    with pytest.MonkeyPatch.context() as patch, cache.copying(first, "first") as lock:
        patch.setenv("BRSTNET_CACHE_GB", "1")
        held = cache.use(first)
        cache.make_room(first, 700_000_000, lock)
        with cache.copying(second, "second") as other:
            with pytest.raises(OSError, match=r"0\.70 GB more are needed .* but 0\.30 GB are left"):
                cache.make_room(second, 700_000_000, other)
            cache.make_room(second, 200_000_000, other)
        held.close()


# Push --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_push_is_whole_or_does_not_open(
    storage: Storage, demo_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(mirror, "THREADS", 1)
    uri, names = storage.uri("half"), list(hashes(demo_store.index))
    refused = names[len(names) // 2]
    storage.fail = lambda method, path: 503 if method == "PUT" and path.endswith(refused) else 0
    with pytest.raises(OSError, match="storage was away"):
        push(demo_store.path, uri)
    done = storage.names("half")
    assert "index.json" not in done
    with pytest.raises(FileNotFoundError):
        open_store(uri)
    with pytest.raises(FileExistsError, match="half of another store is there"):
        push(changed(demo_store, tmp_path / "other"), uri)

    storage.fail = lambda _method, _path: 0
    storage.asked.clear()
    assert "uploaded" in push(demo_store.path, uri)
    put = [p for m, p, _ in storage.asked if m == "PUT" and p.endswith(SECTION_FILES)]
    assert put
    assert not {p.removeprefix(f"/{BUCKET}/half/") for p in put} & set(done), "none sent again"
    marker = ""  # PyArrow makes one of a folder when it removes a file there
    assert set(storage.names("half")) - {marker} == {*names, "index.json"}
    assert open_store(uri).verify() == []
    storage.asked.clear()
    assert "has this store already" in push(demo_store.path, uri)
    assert not [p for m, p, _ in storage.asked if m in ("PUT", "POST")]


def test_push_replaces_only_when_asked(
    storage: Storage, demo_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, other = storage.uri("place"), changed(demo_store, tmp_path / "other")
    assert cli.main(["push", str(demo_store.path), uri]) == 0
    storage.put("place/notes.txt", b"mine")
    capsys.readouterr()
    assert cli.main(["push", str(other), uri]) == 2
    assert "another store is there; choose another address, or say --rep" in capsys.readouterr().err
    assert open_store(uri).digest == demo_store.digest
    assert cli.main(["push", str(other), uri, "--replace"]) == 0
    assert open_store(uri).digest == Store(other).digest
    assert storage.get("place/notes.txt") == b"mine", "what is no store's is left alone"
    storage.put("elsewhere/notes.txt", b"mine")
    with pytest.raises(FileExistsError, match="something else is there"):
        push(other, storage.uri("elsewhere"), replace=True)


def test_a_damaged_store_is_not_pushed(storage: Storage, demo_store: Store, tmp_path: Path) -> None:
    store = changed(demo_store, tmp_path / "store")
    file = store / next(iter(demo_store.sections)) / "patches.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=rf"{file}: damaged: its SHA-256 must be"):
        push(store, storage.uri("never"))
    with pytest.raises(FileNotFoundError):
        open_store(storage.uri("never"))
