"""A store on a real S3 server is the store that a disk would hold, whoever is killed or comes back meanwhile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from obstore.store import from_url

from activations_cache.erase import erase
from activations_cache.loader import LoaderConfig, ShuffledLoader
from activations_cache.places import Place, place_of
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from assay.console import Console
from assay.inspect import inspect
from sae.errors import StoreError
from sae.world import World
from tests.activations_cache.store.conftest import store_rows
from tests.activations_cache.store.s3_server import new_bucket

pytestmark = pytest.mark.xdist_group("s3")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/some/a.zarr"


@pytest.fixture
def both(few, blocks, write, url, tmp_path) -> tuple[ActivationStore, ActivationStore]:
    """The same rows on a disk and on the object store."""
    return write(tmp_path / "a.zarr", few, layout=blocks, writers=2), write(
        url, few, layout=blocks, writers=2
    )


@pytest.fixture(scope="module")
def sealed(few, blocks, s3) -> str:
    """A store that nobody changes."""
    address = f"{new_bucket()}/sealed"
    store_rows(address, few, layout=blocks, writers=2, run_length=3)
    return address


def content(place: Place) -> dict[str, bytes]:
    """All that counts, by name: not locks, nor what says that a writer has ended."""
    names = [n for n in place.sizes() if not n.endswith("lock")]
    found = {n: (place / n).read() for n in names}
    return {n: data for n, data in found.items() if b'"ended": true' not in data}


def test_every_object_is_the_file_that_a_disk_would_hold(both) -> None:
    disk, objects = both
    assert content(objects.path) == content(disk.path)
    assert objects.verify() == []


def test_reading_is_the_same(both) -> None:
    disk, objects = both
    for split in disk.splits:
        got, want = (
            list(objects.rows("layers.2", split, batch_rows=333)),
            list(disk.rows("layers.2", split, batch_rows=333)),
        )
        for a, b in zip(got, want, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(
            np.array_equal(a, b)
            for a, b in zip(objects.coordinates(split), disk.coordinates(split), strict=True)
        )
        assert (
            objects.moments("layers.2", split).mean.tolist() == disk.moments("layers.2", split).mean.tolist()
        )
    codes = disk.entity_codes()[::7]
    a, b = objects.entities(codes, "layers.2:in"), disk.entities(codes, "layers.2:in")
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert objects.digest() == disk.digest()


@pytest.mark.parametrize("threads", [0, 1, 32])
def test_batches_are_the_same(both, threads) -> None:
    settings = {"window_rows": 256, "lanes": 4}
    loaders = [
        ShuffledLoader(
            store,
            ["layers.2"],
            "fit",
            batch_size=64,
            seed=1,
            world=World(),
            coordinates=True,
            settings=LoaderConfig(threads=n, **settings),
        )
        for store, n in zip(both, (0, threads), strict=True)
    ]
    for a, b in zip(*(loader.batches(60) for loader in loaders), strict=True):
        assert a.x.equal(b.x) and a.entity.equal(b.entity) and a.time.equal(b.time)
    for loader in loaders:
        loader.close()


def test_zarr_reads_it_bit_for_bit(sealed, few) -> None:
    store = ActivationStore.open(sealed)
    with zarr.config.set({"async.concurrency": 8}):
        root = zarr.open_group(zarr.storage.ObjectStore(from_url(sealed), read_only=True), mode="r")
        entity, position = (
            np.concatenate([root[f"{g.folder.name}/fit/{c}"][:] for g in store.groups])
            for c in ("entity", "position")
        )
        acts = np.concatenate([root[f"{g.folder.name}/fit/acts/layers.2"][:] for g in store.groups])
    there = entity >= 0
    order = np.lexsort((position[there], entity[there]))
    want = few.where(few.split == "fit")
    np.testing.assert_array_equal(entity[there][order], want.entity)
    np.testing.assert_array_equal(acts[there][order].view(np.uint32), want.acts["layers.2"].view(np.uint32))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize(
    "kind", [r"acts/.*/c\.", "blocks/", "commits/", r"index\.", r"^zarr\.json", r"fit/zarr\.json"]
)
def test_damage_names_the_object(sealed, kind, damage) -> None:
    place = place_of(sealed)
    name = next(n for n in sorted(place.sizes()) if re.search(kind, n))
    whole = (place / name).read()
    data = bytearray(whole)
    data[len(data) // 3] ^= 8
    if damage == "gone":
        (place / name).remove()
    else:
        (place / name).write(bytes(data if damage == "flip" else data[:-1]))
    try:
        problems = "; ".join(ActivationStore.open(sealed).verify())
    except StoreError as error:
        problems = str(error)
    (place / name).write(whole)
    assert f"{place}/{name}" in problems
    assert ActivationStore.open(sealed).verify() == []


def test_a_damaged_chunk_is_not_served(sealed) -> None:
    object_ = place_of(sealed) / "w0000/fit/acts/layers.2/c.0.0"
    whole = object_.read()
    object_.write(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    try:
        with pytest.raises(StoreError, match=r"sealed/w0000/fit/acts/layers\.2/c\.0\.0 is damaged"):
            list(ActivationStore.open(sealed).rows("layers.2", "fit"))
    finally:
        object_.write(whole)


def test_a_sealed_store_takes_no_more(sealed, few, blocks) -> None:
    hooks = {h: a.shape[1] for h, a in few.acts.items()}
    with pytest.raises(StoreError, match="is complete"):
        StoreWriter(sealed, hooks=hooks, layout=blocks, seed=5, provenance={"model": "m"})
    seal(sealed)


def test_erasing_says_what_to_do_instead(sealed) -> None:
    before = place_of(sealed).sizes()
    with pytest.raises(StoreError, match=r"(?s)sealed cannot be changed where it is.*copy it into a folder"):
        erase(sealed, ["1"])
    assert place_of(sealed).sizes() == before


def test_commands(tmp_path, bucket, capsys) -> None:
    """Harvest, train and inspect with the store on the object store."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32))
    config = tmp_path / "c.yaml"
    config.write_text(f"""
name: remote
out: {tmp_path / "run"}
source: {{kind: tensors, path: {tmp_path / "x.npy"}}}
harvest: {{store: "{bucket}/runs/1", layout: {{chunk_rows: 64, shard_rows: 128, block_rows: 256}}}}
sae: {{kind: topk, d_sae: 16, k: 2}}
train: {{rows: 2000}}
""")

    def assay(*words: object) -> tuple[int, str]:
        command = [sys.executable, "-c", "from assay.cli import main; main()", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = assay("train", config)
    assert code == 0, text
    address, pointer = f"{bucket}/runs/1/activations.zarr", tmp_path / "run" / "activations.zarr"
    assert pointer.is_file()
    for where in (address, pointer):
        inspect(where, Console(), verify=True)
        text = capsys.readouterr().out
        assert "600 rows" in text and "every checksum is right" in text
    # another run does not take up what is there
    code, text = assay("harvest", config, f"out={tmp_path / 'other'}")
    assert code == 2 and "holds a store already" in text
