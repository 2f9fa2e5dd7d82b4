"""Who is erased leaves no byte behind, the others keep every row, a crash leaves one store or the other."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.numpy import load_file

from activations_cache import sql
from activations_cache.erase import ErasureReport, erase, read_ids
from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.schema import StoreLayout
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.errors import CheckpointError, StoreError
from sae.world import World

ROOT = Path(__file__).parents[3]
HOOKS = {"layers.2": 16, "layers.2:in": 5}
LAYOUT = StoreLayout(chunk_rows=32, shard_rows=128, block_rows=700)


def name(code: int) -> str:
    return base64.b85encode(hashlib.blake2b(str(code).encode(), digest_size=16).digest()).decode()


def ids(n: int = 300) -> pa.Table:
    table = pa.table({"entity": np.arange(n), "id": pa.array([name(i) for i in range(n)])})
    return table.set_column(1, "id", table["id"].dictionary_encode())


@pytest.fixture(scope="module")
def original(tmp_path_factory, rows) -> Path:
    path = tmp_path_factory.mktemp("original") / "a.zarr"
    for w in range(2):
        mine = rows.where(rows.entity % 2 == w)
        with StoreWriter(path, hooks=HOOKS, layout=LAYOUT, seed=0, provenance={}, writer=w) as writer:
            for i in range(0, len(mine.entity), 100):
                p = mine.part(i, i + 100)
                columns = {c: getattr(p, c) for c in ("entity", "position", "time", "split")}
                writer.append(p.acts, **columns, cursor=i)
    seal(path, entities=ids())
    return path


@pytest.fixture
def store(tmp_path, original) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a.zarr"))


def every_row(path: Path) -> tuple[np.ndarray, ...]:
    """Entity, position, both hooks, sorted; read by zarr, which knows nothing of commits."""
    found = []
    for group in (g for _, g in zarr.open_group(path, mode="r").groups()):
        for _, split in group.groups():
            real = split["entity"][:] >= 0
            acts = [split[f"acts/{h}"][:][real] for h in ("layers.2", "layers.2%3Ain")]
            found.append((split["entity"][:][real], split["position"][:][real], *acts))
    entity, position, *acts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((position, entity))
    return entity[order], position[order], *(a[order] for a in acts)


def check(path: Path, rows, gone: list[int]) -> None:
    """The store is whole and holds exactly the rows of the others."""
    want = rows.where(~np.isin(rows.entity, gone))
    opened = ActivationStore.open(path)
    assert opened.verify() == []
    entity, position, *acts = every_row(path)
    np.testing.assert_array_equal(entity, want.entity)
    np.testing.assert_array_equal(position, want.position)
    for got, hook in zip(acts, HOOKS, strict=True):
        np.testing.assert_array_equal(got, want.acts[hook])
    np.testing.assert_array_equal(opened.entity_codes(), np.unique(want.entity))
    np.testing.assert_array_equal(
        opened.entities(opened.entity_codes(), "layers.2").acts, want.acts["layers.2"]
    )
    assert opened.entity_ids()["entity"].to_pylist() == sorted(set(range(300)) - set(gone))
    for split in opened.splits:
        x = want.acts["layers.2"][want.split == split].astype(np.float64)
        moments = opened.moments("layers.2", split)
        assert moments.count == len(x)
        np.testing.assert_allclose(moments.variance, x.var(0), rtol=1e-6)
        np.testing.assert_array_equal(moments.max_abs, np.abs(x).max(0))


def test_no_byte_of_them_is_left_in_any_file(store, rows):
    gone = [3, 4, 17, 150, 299]
    leaving = np.isin(rows.entity, gone)
    traces = [row.tobytes() for hook in HOOKS for row in rows.acts[hook][leaving]]
    # half an id: a compressor may take a whole one apart
    traces += [name(code)[:10].encode() for code in gone]
    before = b"".join(p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file())
    assert all(trace in before for trace in traces)
    report = erase(store, [name(code) for code in gone])
    assert report[:3] == (5, 5, int(leaving.sum())) and not report.completed
    for path in store.parent.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(trace in data for trace in traces), path
    for path in store.rglob("blocks/*"):
        tensors = {k: v for k, v in load_file(path).items() if k.endswith("/entity")}
        assert not any(np.isin(v, gone).any() for v in tensors.values())
    assert not np.isin(load_file(store / "index.safetensors")["entity"], gone).any()
    assert [p.name for p in store.parent.iterdir()] == ["a.zarr"]
    check(store, rows, gone)


def test_only_the_blocks_concerned_are_written(store, rows):
    def files() -> dict[Path, int]:
        return {p: p.stat().st_ino for p in store.rglob("c.*")}

    before = files()
    report = erase(store, [name(8)])
    after = files()
    opened = ActivationStore.open(store)
    assert report.blocks == 1 < sum(len(g.commits) for g in opened.groups)
    kept = {p for p in before if after.get(p) == before[p]}
    assert 0 < len(before) - len(kept) <= len(before) / 3
    revised = [c.block for g in opened.groups for c in g.commits if c.revision]
    assert len(revised) == 1
    check(store, rows, [8])


def test_it_is_noted_when_and_how_many_not_whom(store, rows):
    erase(store, [name(8), name(9)])
    erase(store, [name(10), "nobody", "nobody"])
    noted = ActivationStore.open(store).description.erasures
    assert [e["entities"] for e in noted] == [2, 1]
    assert [set(e) for e in noted] == [{"date", "entities", "rows"}] * 2
    assert abs((date.fromisoformat(noted[0]["date"]) - date.today()).days) <= 1
    assert sum(e["rows"] for e in noted) == int(np.isin(rows.entity, [8, 9, 10]).sum())
    report = erase(store, [name(10), "nobody"])
    assert report == ErasureReport(2, 0, 0, 0, False)
    assert "does not hold the other 2" in report.text
    assert len(ActivationStore.open(store).description.erasures) == 2
    check(store, rows, [8, 9, 10])


def test_whole_splits_and_whole_stores_can_go(store, rows):
    discover = np.unique(rows.entity[rows.split == "discover"]).tolist()
    erase(store, [name(code) for code in discover])
    assert set(ActivationStore.open(store).splits) == {"fit", "confirm"}
    assert not list(store.rglob("discover"))
    check(store, rows, discover)
    erase(store, [name(code) for code in range(300)])
    empty = ActivationStore.open(store)
    assert (empty.n_rows, empty.splits, empty.verify()) == (0, {}, [])
    assert len(empty.entity_ids()) == 0 and not list(store.rglob("c.*"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rows_that_stay_keep_their_bits(tmp_path, rows, write, layout, dtype):
    stored = write(tmp_path / "b.zarr", rows, layout=layout.model_copy(update={"dtype": dtype}), run_length=3)
    before = stored.entities(np.arange(1, 300), "layers.2").acts
    erase(tmp_path / "b.zarr", ["0"])
    after = ActivationStore.open(tmp_path / "b.zarr")
    np.testing.assert_array_equal(after.entities(np.arange(1, 300), "layers.2").acts, before)
    with pytest.raises(StoreError, match="not in the store"):
        after.entity(0, "layers.2")


def test_readers_get_an_error_and_never_other_rows(store, rows):
    opened = ActivationStore.open(store)
    settings = LoaderConfig(window_rows=200, lanes=4)

    def loader() -> ShuffledLoader:
        return ShuffledLoader(
            ActivationStore.open(store),
            "layers.2",
            "fit",
            batch_size=64,
            seed=0,
            world=World(),
            coordinates=True,
            settings=settings,
        )

    reading = loader()
    state = reading.state_dict()
    gone = [3, 4, 150]
    erase(store, [name(code) for code in gone])
    with pytest.raises(StoreError, match="is missing"):
        for _ in opened.rows("layers.2", "fit"):
            pass
    with pytest.raises(StoreError, match="is missing"):
        list(reading.batches(100))
    after = loader()
    with pytest.raises(CheckpointError, match="no longer holds"):
        after.load_state_dict(state)
    served = torch.cat([b.entity for b in after.batches(after.batches_per_epoch)])
    assert set(served.tolist()) == set(rows.entity[rows.split == "fit"].tolist()) - set(gone)


CRASH = """
import os, sys
from pathlib import Path
from activations_cache import durable, erase as module

def end(*_):
    os._exit(9)

def plant(at):
    if at == "exchanged":
        module._remove = lambda folder: end() if folder.exists() else None
    elif at == "linking":
        os.link = end
    elif at.startswith("step"):
        durable.ctypes.CDLL = lambda *_, **__: object()
        replace, left = Path.replace, [int(at[4:])]
        def counted(self, target):
            left[0] -= self.name.startswith("a.zarr")
            return end() if left[0] == 0 else replace(self, target)
        Path.replace = counted
    else:
        fsync, left = os.fsync, [int(at)]
        def counted(fd):
            left[0] -= 1
            return end() if left[0] == 0 else fsync(fd)
        os.fsync = counted

ids = sys.argv[1].split()
for at, path in (given.split("=", 1) for given in sys.argv[2:]):
    child = os.fork()
    if child == 0:
        plant(at)
        module.erase(Path(path), ids)
        os._exit(0)
    print(at, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_crash_leaves_the_old_or_the_new_and_a_second_call_completes_it(original, tmp_path, rows):
    gone = [3, 150]
    done = ("exchanged", "step2", "step3")
    points = ("linking", "25", "60", *done)
    paths = {at: Path(shutil.copytree(original, tmp_path / at / "a.zarr")) for at in points}
    given = [f"{at}={path}" for at, path in paths.items()]
    command = [sys.executable, "-c", CRASH, " ".join(map(name, gone)), *given]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [f"{at} 9" for at in points], ended.stderr
    for at, path in paths.items():
        if at == "step2":
            assert not path.exists()
        else:
            left = ActivationStore.open(path)
            erased = np.isin(rows.entity, gone).sum() if at in done else 0
            assert left.n_rows == len(rows.entity) - erased
            assert any("interrupted erasure" in p for p in left.verify())
        report = erase(path, [name(code) for code in gone])
        assert report.completed and report.entities == (0 if at in done else 2)
        assert [p.name for p in path.parent.iterdir()] == ["a.zarr"]
        check(path, rows, gone)


def test_what_cannot_be_erased_is_told(store, rows, tmp_path, layout, feed):
    with pytest.raises(StoreError, match="not an activation store"):
        erase(tmp_path / "nothing", ["a"])
    with StoreWriter(tmp_path / "b", hooks=HOOKS, layout=layout, seed=0, provenance={}) as writer:
        feed(writer, rows.part(0, 200))
        with pytest.raises(StoreError, match="being written"):
            erase(tmp_path / "b", ["1"])
    with pytest.raises(StoreError, match="incomplete"):
        erase(tmp_path / "b", ["1"])
    damaged = next((store / "w0001/fit/acts/layers.2").glob("c.0.*"))
    data = bytearray(damaged.read_bytes())
    data[70] ^= 1
    damaged.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"c\.0\.0 is damaged"):
        erase(store, [name(code) for code in range(1, 30, 2)])
    assert ActivationStore.open(store).n_rows == len(rows.entity)


def ids_of_panel(file: Path) -> list[str]:
    """As ids become text where a table is read."""
    with sql.connect(threads=1, memory_limit="100MB") as connection:
        sql.load_table(connection, "raw", [file])
        return [row[0] for row in connection.execute(f"SELECT {sql.id_of('id')} FROM raw").fetchall()]


def test_lists_of_ids(tmp_path, store):
    (tmp_path / "a.txt").write_bytes("client-00001\n\n  client-00002 \r\na\u2028b\x85c\rd\n \n".encode())
    (tmp_path / "na.csv").write_text("id\nNA\nnull\nnan\n")
    at = pa.array([0]).cast(pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"id": pa.array([3.0, 1e20])}), tmp_path / "float.parquet")
    pq.write_table(pa.table({"id": at}), tmp_path / "time.parquet")
    (tmp_path / "a.csv").write_text("n,id\n1,007\n2,client-00003\n")
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    (tmp_path / "one.csv").write_text("entity\n5\n")
    (tmp_path / "bare.csv").write_text("00001\n00002\n")
    (tmp_path / "a.tsv").write_text("id\twhy\n007\tasked\n")
    (tmp_path / "bom.txt").write_text("007\n8\n", encoding="utf-8-sig")
    pq.write_table(pa.table({"id": [["a"], ["b"]]}), tmp_path / "list.parquet")
    (tmp_path / "gap.csv").write_text("id,n\n5,1\n,2\n")
    (tmp_path / "empty.txt").write_text("\n")
    pq.write_table(pa.table({"entity_id": pa.array([7, 8]), "x": [0, 1]}), tmp_path / "a.parquet")
    assert read_ids(tmp_path / "a.txt") == ["client-00001", "  client-00002 ", "a\u2028b\x85c\rd"]
    assert read_ids(tmp_path / "na.csv") == ["NA", "null", "nan"]
    for file in ("float.parquet", "time.parquet"):
        assert read_ids(tmp_path / file) == ids_of_panel(tmp_path / file)
    assert read_ids(tmp_path / "a.csv") == ["007", "client-00003"]
    assert read_ids(tmp_path / "b.csv", column="y") == ["2"]
    assert read_ids(tmp_path / "one.csv") == ["5"]
    assert read_ids(tmp_path / "a.tsv") == ["007"]
    assert read_ids(tmp_path / "bom.txt") == ["007", "8"]
    assert read_ids(tmp_path / "a.parquet") == ["7", "8"]
    for file, column in (
        ("b.csv", None), ("b.csv", "z"), ("gap.csv", None), ("empty.txt", None), ("no.txt", None),
        ("no.csv", None), ("no.parquet", None), ("bare.csv", None), ("list.parquet", None),
    ):  # fmt: skip
        with pytest.raises(StoreError):
            read_ids(tmp_path / file, column=column)
    (tmp_path / "b.txt").write_text("\n".join([name(1), name(2), "nobody"]))
    assert erase(store, read_ids(tmp_path / "b.txt"))[:2] == (3, 2)
