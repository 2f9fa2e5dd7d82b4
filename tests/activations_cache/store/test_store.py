"""A store gives back every row, whole histories, moments, and never a damaged byte."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from activations_cache.copying import Scratch
from activations_cache.formats import largest_magnitude, to_float32, to_stored
from activations_cache.moments import Moments
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.summing import RowSums
from activations_cache.writer import StoreWriter
from sae.errors import StoreError

HOOKS = {"layers.2": 16, "layers.2:in": 5}


def test_what_it_says(stored, rows):
    assert stored.hooks == HOOKS and stored.complete and stored.provenance == {"model": "m"}
    assert stored.splits == {name: int((rows.split == name).sum()) for name in ("confirm", "discover", "fit")}
    assert stored.n_rows == len(rows.entity)
    assert stored.verify() == []


@pytest.mark.parametrize("batch_rows", [1, 77, 65536])
def test_rows_gives_every_row_once(stored, rows, batch_rows):
    batches = list(stored.rows_of(list(HOOKS), "discover", batch_rows=batch_rows))
    entity, position, time = (
        np.concatenate([getattr(b, c) for b in batches]) for c in ("entity", "position", "time")
    )
    order = np.lexsort((position, entity))
    want = rows.where(rows.split == "discover")
    np.testing.assert_array_equal(entity[order], want.entity)
    np.testing.assert_array_equal(time[order], want.time)
    for hook in HOOKS:
        np.testing.assert_array_equal(np.concatenate([b.acts[hook] for b in batches])[order], want.acts[hook])
    for got, told in zip((entity, position, time), stored.coordinates("discover"), strict=True):
        np.testing.assert_array_equal(got, told)
    assert all(len(b.entity) == batch_rows for b in batches[:-1])


def test_histories_are_those_of_the_source(stored, rows):
    for code in (0, 7, 299):
        got, want = stored.entity(code, "layers.2:in"), rows.where(rows.entity == code)
        np.testing.assert_array_equal(got.acts, want.acts["layers.2:in"])
        np.testing.assert_array_equal(got.position, want.position)
    codes = np.random.default_rng(0).permutation(300)[:120]
    got, want = stored.entities(codes, "layers.2"), rows.where(np.isin(rows.entity, codes))
    for name in ("entity", "position", "time"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_array_equal(got.acts, want.acts["layers.2"])
    np.testing.assert_array_equal(stored.entity_codes("fit"), np.unique(rows.entity[rows.split == "fit"]))
    with pytest.raises(StoreError, match="2 entities are not in the store"):
        stored.entities([3, 300, 999], "layers.2")


def test_an_entity_in_two_splits_and_blocks_comes_back_whole(tmp_path, layout):
    n = 2000
    i = np.arange(n)
    with StoreWriter(tmp_path / "a", hooks={"h": 1}, layout=layout, seed=0, provenance={}) as writer:
        for s in np.array_split(i, 9)[::-1]:
            split = np.where(s < 1500, "fit", "out_of_time")
            writer.append(
                {"h": s[:, None].astype(np.float32)}, entity=s * 0, position=s, time=s, split=split, cursor=0
            )
    incomplete = ActivationStore.open(tmp_path / "a", allow_incomplete=True)
    np.testing.assert_array_equal(incomplete.entity(0, "h").acts[:, 0], i)
    assert incomplete.moments("h", "fit").mean == pytest.approx([1499 / 2])
    seal(tmp_path / "a")
    np.testing.assert_array_equal(ActivationStore.open(tmp_path / "a").entity(0, "h").position, i)


def test_unknown_names_are_told(stored, tmp_path):
    calls = [
        lambda: stored.moments("layers.9", "fit"),
        lambda: next(stored.rows("layers.2", "test")),
        lambda: stored.entity(1, "x"),
        lambda: stored.coordinates("x"),
        lambda: ActivationStore.open(tmp_path),
    ]
    for call in calls:
        with pytest.raises(StoreError):
            call()


def test_moments_are_those_of_numpy(stored, rows):
    for hook in HOOKS:
        x = rows.acts[hook][rows.split == "fit"].astype(np.float64)
        m = stored.moments(hook, "fit")
        norms = np.linalg.norm(x, axis=1)
        assert m.count == len(x)
        np.testing.assert_allclose(m.mean, x.mean(0), rtol=0, atol=1e-7)
        np.testing.assert_allclose(m.variance, x.var(0), rtol=1e-6)
        np.testing.assert_array_equal(m.max_abs, np.abs(x).max(0).astype(np.float32))
        assert m.max_norm == pytest.approx(norms.max(), rel=1e-6)
        assert m.scale == pytest.approx(np.sqrt(x.var(0).mean()), rel=1e-6)
        for q in (0.01, 0.25, 0.5, 0.9, 0.99):
            assert m.norm_quantile(q) == pytest.approx(np.quantile(norms, q), rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dimensions", [1, 12])
def test_moments_of_dimensions_that_are_mostly_mean(tmp_path, rows, write, layout, dtype, dimensions):
    acts = {hook: np.clip(x, -8, 8) for hook, x in rows.acts.items()}
    acts["layers.2"][:, :dimensions] += 1000
    for x in acts.values():
        stored = np.empty(x.shape, {"float32": "f4", "float16": "f2", "bfloat16": "u2"}[dtype])
        to_stored(x, stored, dtype)
        x[:] = to_float32(stored, dtype)
    store = write(tmp_path / "a", replace(rows, acts=acts), layout=layout.model_copy(update={"dtype": dtype}))
    x = acts["layers.2"][rows.split == "fit"].astype(np.float64)
    found = store.moments("layers.2", "fit")
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance, x.var(0), rtol=1e-5)
    np.testing.assert_array_equal(found.max_abs, np.abs(x).max(0))


def test_covariance_on_request(tmp_path, rows, write, layout, stored):
    with pytest.raises(StoreError, match="no covariance"):
        _ = stored.moments("layers.2", "fit").covariance
    store = write(tmp_path / "a", rows, layout=layout.model_copy(update={"covariance": True}), writers=2)
    for hook in HOOKS:
        x = rows.acts[hook][rows.split == "fit"].astype(np.float64)
        found = store.moments(hook, "fit")
        np.testing.assert_allclose(found.covariance, np.cov(x.T, bias=True), atol=1e-8)
        np.testing.assert_allclose(found.covariance.diagonal(), found.variance, rtol=1e-6)


def moments_of(x, pieces=1):
    sums = RowSums("float32", x.shape[1], covariance=False, scratch=Scratch())
    for piece in np.array_split(x, pieces):
        sums.add(piece)
    return sums.moments(lambda dimensions: iter(np.array_split(x[:, dimensions], 3)))


def test_moments_merge_in_any_way():
    x = np.random.default_rng(0).normal(1e4, 1.0, size=(1000, 6)).astype(np.float32)
    whole = moments_of(x)
    np.testing.assert_allclose(whole.variance, x.astype(np.float64).var(0), rtol=1e-11)
    for cuts in ([500], [1, 2, 999], [0, 3, 700]):
        parts = [moments_of(p) for p in np.split(x, cuts)]
        for order in (parts, parts[::-1]):
            total = Moments.empty(6)
            for part in order:
                total = total.merge(part)
            assert total.count == 1000 and total.max_norm == whole.max_norm
            np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-12)
            np.testing.assert_allclose(total.squares, whole.squares, rtol=1e-11)
            np.testing.assert_array_equal(total.norm_counts, whole.norm_counts)
    x[:, 1], x[:, 2], x[:, 3], x[:, 4] = 0.1, 0.0, x[:, 0] * np.float32(1e-25), x[:, 0] * np.float32(1e25)
    hard = moments_of(x, pieces=7)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(hard.mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(hard.variance, exact.var(0), rtol=1e-5, atol=1e-60)
    np.testing.assert_array_equal(hard.max_abs, np.abs(x).max(0))
    # finite squares whose sum over a group is not
    large = x[:, [0, 5]] * np.float32(1e15)
    np.testing.assert_allclose(moments_of(large).variance, large.astype(np.float64).var(0), rtol=1e-5)
    assert moments_of(np.full((2, 3), 1e30, np.float32)).max_norm == pytest.approx(3**0.5 * 1e30)
    zero = moments_of(np.zeros((3, 2), np.float32))
    huge = moments_of(np.full((9, 2), 1e30, np.float32))
    assert huge.norm_quantile(0.5) == huge.max_norm == pytest.approx(2**0.5 * 1e30)
    assert zero.norm_quantile(0.5) == 2.0**-32 and np.isnan(Moments.empty(2).norm_quantile(0.5))


@pytest.mark.parametrize("mean", [0.0, 1.0, 2.9, 3.1, 9.0, 300.0])
@pytest.mark.parametrize("width", [1, 3, 256, 300, 5000])
def test_moments_of_narrow_and_wide_rows(width, mean):
    x = np.random.default_rng(width).normal(mean, 1, size=(101, width)).astype(np.float32)
    found, exact = moments_of(x, pieces=4), x.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=0, atol=1e-6 * np.sqrt((exact**2).mean()))
    np.testing.assert_allclose(found.variance, exact.var(0), rtol=1e-5)
    np.testing.assert_array_equal(found.max_abs, np.abs(x).max(0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [0, 1, 11_000])
def test_half_precision_comes_back_exactly(dtype, rows):
    x = np.random.default_rng(0).integers(-128, 128, size=(rows, 3)).astype(np.float32)
    stored = np.empty(x.shape, np.float16 if dtype == "float16" else np.uint16)
    to_stored(x, stored, dtype)
    np.testing.assert_array_equal(to_float32(stored, dtype), x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 5), (3, 5000)])
def test_the_largest_magnitude_by_bits(dtype, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for case in (x, np.abs(x), -np.abs(x), np.zeros_like(x), -np.zeros_like(x), x[::2]):
        assert largest_magnitude(case).view(dtype) == np.abs(case).max()
        assert (largest_magnitude(case, axis=0).view(dtype) == np.abs(case).max(0)).all()
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        x[0, 0] = bad
        assert not float(largest_magnitude(x).view(dtype)) < np.inf


def test_ids_of_entities(tmp_path, rows, layout, feed):
    path = tmp_path / "a.zarr"
    with StoreWriter(path, hooks=HOOKS, layout=layout, seed=0, provenance={}) as writer:
        feed(writer, rows)
    with pytest.raises(StoreError, match="incomplete"):
        ActivationStore.open(path)
    codes = pa.array(np.arange(300))
    ids = pa.array([f"client {i}" for i in range(300)])
    with pytest.raises(StoreError, match="lacks 1 entities"):
        seal(path, entities=pa.table({"entity": codes[:-1], "id": ids[:-1]}))
    seal(path, entities=pa.table({"entity": codes, "id": ids}))
    seal(path)
    assert ActivationStore.open(path).entity_ids().column("id")[17].as_py() == "client 17"


TARGETS = (
    "w0001/fit/acts/layers.2/c.0.0", "w0001/fit/acts/layers.2%3Ain/c.1.0", "w0000/discover/entity/c.0",
    "w0002/confirm/time/c.0", "w0001/commits/00000000.json", "w0001/blocks/00000000.0.safetensors",
    "w0001/fit/zarr.json", "w0001/fit/position/zarr.json", "w0001/fit/acts/layers.2/zarr.json",
    "index.safetensors", "moments.safetensors", "manifest.json", "zarr.json",
)  # fmt: skip


def flip(data: bytes) -> bytes:
    return data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 1]) + data[len(data) // 3 + 1 :]


DAMAGE = {
    "a bit": flip,
    "the last bit": lambda d: d[:-1] + bytes([d[-1] ^ 1]),
    "a page": lambda d: d[:20] + bytes(min(4096, len(d) - 20)) + d[4116:],
    "half": lambda d: d[: len(d) // 2],
    "one byte": lambda d: d[:-1],
    "empty": lambda d: b"",
    "deleted": None,
}


@pytest.fixture(scope="module")
def copy(stored, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "a.zarr"
    shutil.copytree(stored.path, path)
    return path


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_that_names_the_file(copy, target, damage):
    path = copy / target
    whole = path.read_bytes()
    change = DAMAGE[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(whole))
        assert change(whole) != whole
    try:
        try:
            problems = "\n".join(ActivationStore.open(copy).verify())
        except StoreError as error:
            problems = str(error)
        assert str(path) in problems
    finally:
        path.write_bytes(whole)
    assert ActivationStore.open(copy).verify() == []


@pytest.mark.parametrize("damage", ["a bit", "a page"])
def test_damaged_rows_are_never_served(copy, damage):
    path = copy / TARGETS[0]
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    try:
        store = ActivationStore.open(copy)
        with pytest.raises(StoreError, match=r"c\.0\.0 is damaged"):
            list(store.rows("layers.2", "fit"))
        with pytest.raises(StoreError, match=r"c\.0\.0 is damaged"):
            store.entities(store.entity_codes("fit"), "layers.2")
    finally:
        path.write_bytes(whole)


def test_a_file_that_goes_away_while_open_is_named(copy):
    store = ActivationStore.open(copy)
    path = copy / TARGETS[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"c\.0\.0 is too short"):
        list(store.rows("layers.2", "fit"))
    path.unlink()
    with pytest.raises(StoreError, match=r"c\.0\.0 is missing"):
        list(store.rows("layers.2", "fit"))
    path.write_bytes(whole)


def test_another_shard_under_the_name_is_noticed(copy):
    a, b = copy / "w0001/fit/acts/layers.2/c.0.0", copy / "w0001/fit/acts/layers.2/c.1.0"
    whole = a.read_bytes()
    a.write_bytes(b.read_bytes())
    assert any("not the file that was committed" in p for p in ActivationStore.open(copy).verify())
    a.write_bytes(whole)
