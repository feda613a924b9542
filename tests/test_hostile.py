"""Files that somebody else has made to do harm: refused, before anything is run or written outside.

Each test builds the real thing. Whatever is unpickled or run in it makes the file `marker`.
"""

import http.server
import io
import json
import os
import pickle
import shutil
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from object_storage import Storage, in_environment, serving
from tiny_raw import content
from trainings import train

from brstnet.config import Settings, read_yaml
from brstnet.data.index import MOST
from brstnet.data.mirror import open_store, push
from brstnet.data.store import Store, sha256
from brstnet.evaluation.evaluate import evaluate
from brstnet.evaluation.predict import load_ensemble
from brstnet.training import checkpoint
from brstnet.training.keep import finished

CPU = torch.device("cpu")
HASH = "0" * 64


class Bomb:
    """Unpickled, it makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.is_dir(), "the payload works"
    marker.rmdir()
    yield marker
    assert not marker.exists(), "the payload was run"


@pytest.fixture
def store(demo_store: Store, tmp_path: Path) -> Path:
    """A copy of the demo store, to be made hostile."""
    folder = tmp_path / "stores" / "demo"
    shutil.copytree(demo_store.path, folder, ignore=shutil.ignore_patterns("derived"))
    return folder


def change_index(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = store / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def first(store: Path) -> str:
    name: str = json.loads((store / "index.json").read_text())["sections"][0]["section"]
    return name


def use_all(store: Store) -> None:
    """Read everything that a training reads."""
    for section in store.sections:
        store.patches(section)
        store.patches(section, 16)
        store.ledger(section)
    store.spots(list(store.sections))
    store.counts(list(store.sections))


# The index ---------------------------------------------------------------------------------------

NAMES = ["../evil", "..", ".", "", "/etc", "a/b", "a\\b", "..\\evil", "a\0b", "a\nb", ".hidden"]
NAMES += ["C:evil", "derived", "index.json", "x" * 300, None, 3, ["a"], {"a": 1}]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_section_names_that_lead_elsewhere(store: Path, name: object) -> None:
    evil = store.parent / "evil"
    shutil.copytree(store / first(store), evil)
    before = content(store.parent)
    change_index(store, lambda index: index["sections"][0].update(section=name))
    with pytest.raises(ValueError, match=r"index\.json: .* nothing of this store is read"):
        Store(store)
    after = content(store.parent)
    assert {n for n in after if after[n] != before.get(n)} == {"demo/index.json"}


ENTRIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file with a path": lambda i: i["sections"][0]["files"].update({"../../x": HASH}),
    "no hash": lambda i: i["sections"][0]["files"].update({"patches.npy": "../../x"}),
    "a hash that is no text": lambda i: i["sections"][0]["files"].update({"patches.npy": [1]}),
    "no files": lambda i: i["sections"][0].pop("files"),
    "other files of the store": lambda i: i["files"].update({"../../etc/passwd": HASH}),
    "files that are a list": lambda i: i.update(files=["genes.parquet"]),
    "twice": lambda i: i["sections"].append(i["sections"][0]),
    "twice on a Mac": lambda i: i["sections"].append(
        {**i["sections"][0], "section": i["sections"][0]["section"].lower()}
    ),
    "more spots than there are": lambda i: i["sections"][0].update(spots_kept=MOST + 1),
    "fewer than none": lambda i: i["sections"][0].update(spots_kept=-1),
    "spots that are no number": lambda i: i["sections"][0].update(spots_raw="10**9"),
    "a section that is a text": lambda i: i["sections"].append("x"),
    "no sections": lambda i: i.update(sections={}),
    "no settings": lambda i: i.update(prepare=[]),
    "a side that is none": lambda i: i["prepare"].update(input_px=-3),
    "a version that is none": lambda i: i.update(version="1; import os"),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_an_index_that_is_wrong(store: Path, what: str) -> None:
    change_index(store, ENTRIES[what])
    with pytest.raises(ValueError, match=r"index\.json: "):
        Store(store)


@pytest.mark.parametrize(
    "text",
    [b"[" * 200_000, b"[1]", b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"\0" * 100],
    ids=["deep", "a list", "a long number", "no text", "zeros"],
)
def test_an_index_that_is_no_index(store: Path, text: bytes) -> None:
    (store / "index.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"index\.json: "):
        Store(store)


@pytest.mark.parametrize("name", ["patches.npy", "spots.h5ad", "ledger.parquet", "genes.parquet"])
def test_links_out_of_the_store(store: Path, tmp_path: Path, name: str) -> None:
    file = store / name if name == "genes.parquet" else store / first(store) / name
    secret = tmp_path / name
    file.rename(secret)
    file.symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name}: leads out of .*: nothing outside is read"):
        Store(store)


def test_a_section_that_is_a_link(store: Path, tmp_path: Path) -> None:
    (store / first(store)).rename(tmp_path / "elsewhere")
    (store / first(store)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        Store(store)


def test_nothing_derived_is_written_outside(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (store / "derived").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        Store(store).patches(first(store), 16)
    assert not list(outside.iterdir())


def test_a_section_that_somebody_else_names(store: Path) -> None:
    """A checkpoint names sections: those of the store are read, and no path."""
    opened = Store(store)
    for read in (opened.patches, opened.ledger, lambda n: opened.spots([n])):
        with pytest.raises(ValueError, match=r"no section '\.\./\.\./evil'"):
            read("../../evil")


# A store's files ---------------------------------------------------------------------------------


def npy(descr: str, shape: str) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def pickled_npy(marker: Path) -> bytes:
    memory = io.BytesIO()
    np.save(memory, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return memory.getvalue()


def zipped(marker: Path) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("../../evil.npy", pickled_npy(marker))
    return memory.getvalue()


ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "objects": pickled_npy,
    "a pickle": lambda marker: pickle.dumps(Bomb(marker)),
    "a torch file": lambda marker: torch_file(marker),
    "an archive": zipped,
    "terabytes": lambda _: npy("'|u1'", "(1099511627776, 32, 32, 3)") + b"\0" * 64,
    "more than can be counted": lambda _: npy("'|u1'", "(9223372036854775807, 32, 32, 3)"),
    "fewer than none": lambda _: npy("'|u1'", "(-1, 32, 32, 3)") + b"\0" * 64,
    "code in the header": lambda marker: npy(f"__import__('os').mkdir('{marker}')", "(1,)"),
    "a deep header": lambda _: npy("'|u1'", "(" * 9000 + ")" * 9000),
    "a huge header": lambda _: b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100,
    "other numbers": lambda _: npy("'<f8'", "(1,)") + b"\0" * 8,
    "nothing": lambda _: b"",
}


def torch_file(marker: Path) -> bytes:
    memory = io.BytesIO()
    torch.save({"main.weight": Bomb(marker)}, memory)
    return memory.getvalue()


@pytest.mark.parametrize("what", ARRAYS)
def test_patches(store: Path, marker: Path, what: str) -> None:
    file = store / first(store) / "patches.npy"
    file.write_bytes(ARRAYS[what](marker))
    with pytest.raises(ValueError, match=rf"{file}: "):
        use_all(Store(store))


@pytest.mark.parametrize("what", ["objects", "a pickle", "an archive", "terabytes"])
def test_what_is_derived(store: Path, marker: Path, what: str) -> None:
    section = first(store)
    Store(store).patches(section, 16)
    (file,) = (store / "derived").iterdir()
    file.write_bytes(ARRAYS[what](marker))
    with pytest.raises(ValueError, match=rf"{file}: "):
        Store(store).patches(section, 16)


def edited(file: Path, change: Callable[[h5py.File], object]) -> None:
    with h5py.File(file, "r+") as opened:
        change(opened)


def replace(opened: h5py.File, name: str, **dataset: Any) -> None:
    attributes = dict(opened[name].attrs)
    del opened[name]
    opened.create_dataset(name, **dataset).attrs.update(attributes)


def outside(opened: h5py.File) -> None:
    del opened["X"]
    opened["X"] = h5py.ExternalLink("/etc/secret.h5", "/X")


def soft(opened: h5py.File) -> None:
    opened["uns/again"] = h5py.SoftLink("/X")


def raw_bytes(opened: h5py.File) -> None:
    replace(opened, "X/data", shape=(16,), dtype="u1", external=[("/etc/hostname", 0, 16)])


def virtual(opened: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(8,), dtype="i8")
    layout[:] = h5py.VirtualSource("/etc/secret.h5", "x", shape=(8,))
    attributes = dict(opened["X/data"].attrs)
    del opened["X/data"]
    opened.create_virtual_dataset("X/data", layout).attrs.update(attributes)


def bomb_of_zeros(opened: h5py.File) -> None:
    replace(opened, "X/data", shape=(1 << 40,), dtype="i8", chunks=(1 << 20,))


def pointers(opened: h5py.File) -> None:
    """SciPy would write wherever these say."""
    rows = opened["X/indptr"][:]
    rows[1:-1] = 1 << 30
    opened["X/indptr"][:] = rows


def columns(opened: h5py.File) -> None:
    opened["X/indices"][:] = 1 << 30


def wide(opened: h5py.File) -> None:
    opened["X"].attrs["shape"] = np.array([24, 1 << 40])


def circle(opened: h5py.File) -> None:
    opened["uns/self"] = opened["uns"]
    opened["X/data"].attrs["encoding-type"] = "no such encoding"


H5AD: dict[str, Callable[[h5py.File], object]] = {
    f.__name__: f
    for f in (outside, soft, raw_bytes, virtual, bomb_of_zeros, pointers, columns, wide, circle)
}


@pytest.mark.parametrize("what", H5AD)
def test_counts(store: Path, what: str) -> None:
    file = store / first(store) / "spots.h5ad"
    edited(file, H5AD[what])
    with pytest.raises(ValueError, match=rf"{file}: "):
        use_all(Store(store))


@pytest.mark.parametrize("what", ["a pickle", "objects", "nothing"])
def test_counts_that_are_something_else(store: Path, marker: Path, what: str) -> None:
    file = store / first(store) / "spots.h5ad"
    file.write_bytes(ARRAYS[what](marker))
    with pytest.raises(ValueError, match=rf"{file}: cannot be read as counts"):
        use_all(Store(store))


def test_objects_in_counts_stay_bytes(store: Path, marker: Path) -> None:
    """A pickle among the unstructured is bytes, and nobody reads them."""
    file = store / first(store) / "spots.h5ad"
    payload = np.frombuffer(pickle.dumps(Bomb(marker)), np.uint8)
    edited(file, lambda opened: opened["uns"].create_dataset("model", data=payload))
    use_all(Store(store))


def test_other_genes_than_the_stores(store: Path) -> None:
    file = store / first(store) / "spots.h5ad"
    adata = anndata.read_h5ad(file)
    adata.var_names = [f"x{n}" for n in range(adata.n_vars)]
    adata.write_h5ad(file)
    with pytest.raises(ValueError, match=r"no genes but the store's"):
        use_all(Store(store))


def extension(file: Path, marker: Path) -> None:
    """What Arrow's Python types were: a pickle in the schema (CVE-2023-47248)."""
    table = pq.read_table(file)
    name = table.column_names[0]
    column = pa.field(
        name,
        table.schema.field(name).type,
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(Bomb(marker)),
        },
    )
    pq.write_table(table.cast(table.schema.set(0, column)), file)


@pytest.mark.parametrize("name", ["genes.parquet", "ledger.parquet"])
def test_tables(store: Path, marker: Path, name: str) -> None:
    file = store / name if name == "genes.parquet" else store / first(store) / name
    extension(file, marker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        try:
            use_all(Store(store))
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017 - either: read as bytes, or refused
    for what in ("a pickle", "objects", "nothing"):
        file.write_bytes(ARRAYS[what](marker))
        with pytest.raises(ValueError, match=rf"{file}: cannot be read as a table"):
            use_all(Store(store))


def test_a_table_of_more_rows_than_fit(store: Path) -> None:
    """A few kilobytes, run-length encoded, that would unpack to gigabytes."""
    nothing = pa.nulls(1 << 24)
    pq.write_table(pa.table({f"c{n}": nothing for n in range(33)}), store / "genes.parquet")
    assert (store / "genes.parquet").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"genes\.parquet: cannot .* claims 16777216 rows of 33"):
        use_all(Store(store))


# A store on object storage -----------------------------------------------------------------------


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Storage]:
    with serving() as server:
        in_environment(monkeypatch, server)
        monkeypatch.setenv("BRSTNET_CACHE", str(tmp_path / "home" / "cache"))
        yield server


def test_an_index_on_object_storage(storage: Storage, store: Path, tmp_path: Path) -> None:
    push(store, storage.uri("evil"))
    index = json.loads(storage.get("evil/index.json"))
    index["sections"][0]["section"] = "../../../outside"
    storage.put("evil/index.json", json.dumps(index).encode())
    for name in ("patches.npy", "spots.h5ad", "ledger.parquet"):
        storage.put(f"outside/{name}", b"evil")
    storage.asked.clear()
    with pytest.raises(ValueError, match="a section must have a plain name"):
        open_store(storage.uri("evil"))
    assert storage.gets() == [], "nothing was fetched"
    assert not list((tmp_path / "home").rglob("outside"))
    with pytest.raises(ValueError, match="a section must have a plain name"):
        push(store, storage.uri("evil"), replace=True)


def test_what_is_hashed_right_but_hostile(storage: Storage, store: Path, marker: Path) -> None:
    """Hashes say that it came as it was sent, not that it is harmless."""
    file = store / first(store) / "patches.npy"
    file.write_bytes(pickled_npy(marker))
    change_index(store, lambda i: i["sections"][0]["files"].update({"patches.npy": sha256(file)}))
    push(store, storage.uri("hashed"))
    opened = open_store(storage.uri("hashed"))
    with pytest.raises(ValueError, match="cannot be mapped as a plain array"):
        use_all(opened)


def test_an_object_larger_than_the_disk_is_not_fetched(
    storage: Storage, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(store, storage.uri("large"))
    monkeypatch.setenv("BRSTNET_CACHE_GB", "0.002")
    storage.put(f"large/{first(store)}/patches.npy", b"\0" * 5_000_000)
    storage.asked.clear()
    with pytest.raises(OSError, match=r"0\.01 GB more are needed .* budget of 0\.00 GB"):
        open_store(storage.uri("large"))
    assert storage.gets() == []


# Checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(demo_store, settings, tmp_path_factory.mktemp("fit")).folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be made hostile."""
    return shutil.copytree(good, tmp_path / "fold_0" / "model")


def change_facts(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "checkpoint.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda marker: pickle.dumps(Bomb(marker)),
    "a torch file": torch_file,
    "an old torch file": lambda marker: old_torch_file(marker),
    "an absurd header": lambda _: struct.pack("<Q", 1 << 62) + b"{}",
    "a header longer than the file": lambda _: struct.pack("<Q", 1 << 20) + b"{}",
    "tensors out of the file": lambda _: safe({"a": tensor([1 << 40], [0, 1 << 42])}),
    "tensors over each other": lambda _: safe({n: tensor([4], [0, 16]) for n in "ab"}) + bytes(16),
    "nothing": lambda _: b"",
}


def tensor(shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def safe(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def old_torch_file(marker: Path) -> bytes:
    memory = io.BytesIO()
    torch.save({"main.weight": Bomb(marker)}, memory, _use_new_zipfile_serialization=False)
    return memory.getvalue()


@pytest.mark.parametrize("name", ["model.safetensors", "backbone.safetensors"])
@pytest.mark.parametrize("what", WEIGHTS)
def test_weights(folder: Path, marker: Path, what: str, name: str) -> None:
    (folder / name).write_bytes(WEIGHTS[what](marker))
    with pytest.raises(ValueError, match=rf"{folder / name}: cannot be read as safetensors"):
        checkpoint.load(folder)


def test_weights_of_another_network(folder: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(10_000)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the weights do not fit the network"):
        checkpoint.load(folder)


FACTS: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "a file to unpickle": lambda f, evil: f["architecture"]["args"].update(
        checkpoint_path=str(evil)
    ),
    "weights from elsewhere": lambda f, evil: f["architecture"]["args"].update(
        pretrained_cfg={"file": str(evil)}
    ),
    "a folder's network": lambda f, evil: f["architecture"].update(name=f"local-dir:{evil}"),
    "a network from the net": lambda f, _: f["architecture"].update(name="hf-hub:evil/model"),
    "no such network": lambda f, _: f["architecture"].update(name="../../evil"),
    "a network that is none": lambda f, _: f["architecture"].update(name=["resnet18"]),
    "other arguments": lambda f, _: f["architecture"]["args"].update(evil=1),
    "an old one's backbone": lambda f, evil: (
        f.pop("architecture"),
        f["settings"]["training"].update(backbone=f"local-dir:{evil}"),
    ),
    "a class": lambda f, _: f["settings"]["training"].update(class_path="os.system"),
    "settings that are none": lambda f, _: f.update(settings=[1]),
    "no fold": lambda f, _: f.pop("fold"),
    "statistics that are none": lambda f, _: f["fitted"].update(image_mean=3),
    "a version that is none": lambda f, _: f.update(version=[]),
}


@pytest.mark.parametrize("what", FACTS)
def test_facts(folder: Path, marker: Path, tmp_path: Path, what: str) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    torch.save({"x": Bomb(marker)}, evil / "pytorch_model.bin")
    (evil / "config.json").write_text('{"architecture": "test_resnet"}')
    change_facts(folder, lambda facts: FACTS[what](facts, evil))
    with pytest.raises(ValueError, match=rf"{folder}"):
        checkpoint.load(folder)


def test_facts_that_are_no_json(folder: Path, marker: Path) -> None:
    for text in (pickle.dumps(Bomb(marker)), b"[" * 200_000, b"[]"):
        (folder / "checkpoint.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"checkpoint\.json: "):
            checkpoint.load(folder)


def test_a_table_of_genes(folder: Path, marker: Path) -> None:
    file = folder / "genes.parquet"
    table = pd.read_parquet(file)
    table.drop(columns="role").to_parquet(file)
    with pytest.raises(ValueError, match="role"):
        checkpoint.load(folder)
    many = np.zeros(5_000_000, np.int8)
    pd.DataFrame({"role": pd.Categorical.from_codes(many, ["main"])}).to_parquet(file)
    with pytest.raises(ValueError, match=r"5000000 genes, but only \d+ weights"):
        checkpoint.load(folder)
    file.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match="cannot be read as a table"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "genes.parquet"])
def test_links_out_of_a_checkpoint(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: leads out of"):
        checkpoint.load(folder)


def test_other_files_in_a_checkpoint_are_not_read(
    folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them what MLflow would unpickle, had it loaded the model."""
    payload, code = pickle.dumps(Bomb(marker)), f"import os; os.mkdir({str(marker)!r})"
    for name in ("python_model.pkl", "model.pkl", "model.pth", "optimizer.safetensors"):
        (folder / name).write_bytes(payload)
    for name in ("sitecustomize.py", "__init__.py", "brstnet.py", "torch.py"):
        (folder / name).write_text(code)
    text = "flavors: {python_function: {loader_module: brstnet, python_model: python_model.pkl}}"
    (folder / "MLmodel").write_text(text)
    (folder / "settings.yaml").write_text(f"!!python/object/apply:os.mkdir ['{marker}']")
    monkeypatch.chdir(folder)
    assert load_ensemble([folder], CPU).members[0].path == folder


@pytest.mark.parametrize("place", ["../../elsewhere", "/etc", "model/../../.."])
def test_a_result_that_names_another_folder(folder: Path, place: str) -> None:
    facts = {"checkpoint": place, "score": 1.0, "epoch": 0, "epochs": 1, "seconds": 1.0}
    (folder.parent / "result.json").write_text(json.dumps(facts))
    for read in (finished, lambda path: load_ensemble([path], CPU)):
        with pytest.raises(ValueError, match="leads out of"):
            read(folder.parent)


def test_a_checkpoint_that_names_other_sections(
    folder: Path, demo_store: Store, tmp_path: Path
) -> None:
    """What a checkpoint says of sections is no path for the store."""
    change_facts(folder, lambda f: f["fold"].update(validation=["../../../evil"]))
    member = checkpoint.load(folder)
    with pytest.raises(ValueError, match="no section"):
        demo_store.spots(member.fold.validation)
    with pytest.raises(ValueError, match="no patient"):
        evaluate([folder], demo_store, ["../../evil"], tmp_path / "out", device=CPU)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir ['{}']",
        "training: !!python/object/new:os.mkdir ['{}']",
        "!!python/name:os.mkdir ''",
        "a: [",
    ],
)
def test_settings_with_python_in_them(marker: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text.format(marker))
    with pytest.raises(ValueError, match=rf"{file}: not valid YAML"):
        read_yaml(file)


# MLflow's artifacts ------------------------------------------------------------------------------


@contextmanager
def mlflow_server(listed: str, body: bytes) -> Iterator[str]:
    """A server that has one model, with one file of this name and content."""
    version = {"name": "brstnet", "version": "1", "run_id": "r", "source": "mlflow-artifacts:/m"}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = urlsplit(self.path)
            text = body
            if where.path.endswith(("/registered-models/alias", "/model-versions/get")):
                text = json.dumps({"model_version": version}).encode()
            elif where.path.endswith("/artifacts"):
                inner = parse_qs(where.query).get("path", [""])[0] not in ("", "m")
                files = [] if inner else [{"path": listed, "is_dir": False, "file_size": 4}]
                text = json.dumps({"files": files}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "name",
    ["../../../evil", "%2e%2e/%2e%2e/evil", "/{}/evil", "model.safetensors", "checkpoint.json"],
)
def test_a_model_of_a_hostile_tracking_server(
    name: str,
    marker: Path,
    demo_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sweeps import evaluate as command

    scratch = tmp_path / "deep" / "scratch"
    scratch.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    payload = pickle.dumps(Bomb(marker))
    with mlflow_server(name.format(tmp_path), payload) as uri:
        words = ["models:/brstnet@champion", str(demo_store.path), "--patients", "BC90006"]
        words += ["--out", str(tmp_path / "out"), "--tracking_uri", uri, "--device", "cpu"]
        assert command.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.rglob("evil"))
    assert not list(scratch.iterdir()), "nothing stays"
