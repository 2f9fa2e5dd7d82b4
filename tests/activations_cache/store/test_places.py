"""What a store relies on, on a disk and on a real object store alike."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from activations_cache.places import LockedError, Place, TakenError, place_of, point_to
from activations_cache.places import pieces as reading
from activations_cache.places.lease import Lease
from sae.errors import ConfigError, StoreError

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return place_of(tmp_path / "a")
    return place_of(f"{request.getfixturevalue('bucket')}/some/a%3Ab")


@pytest.fixture
def remote(bucket: str) -> Place:
    return place_of(f"{bucket}/a")


def race(n: int, act: Callable[[int], None]) -> list[int]:
    """Run something in n threads at once; return which of them were not too late."""
    barrier, done = threading.Barrier(n), []

    def one(i: int) -> None:
        barrier.wait()
        try:
            act(i)
            done.append(i)
        except (TakenError, LockedError):
            pass

    with ThreadPoolExecutor(n) as pool:
        list(pool.map(one, range(n)))
    return done


def test_content_is_replaced_as_a_whole(place: Place) -> None:
    file = place / "x/y.json"
    assert file.size() is None
    with pytest.raises(StoreError, match=r"x/y\.json is missing"):
        file.read()
    for data in (b"long enough", b"short", b""):
        file.write(data)
        assert file.read() == data
        assert file.size() == len(data)
    file.remove()
    file.remove()
    assert file.size() is None


def test_nothing_is_written_beside_a_record_that_is_there(tmp_path: Path) -> None:
    file = place_of(tmp_path / "a/record")
    file.create(b"first")
    before = (tmp_path / "a").stat().st_mtime_ns
    time.sleep(0.02)
    file.create(b"first")
    assert (tmp_path / "a").stat().st_mtime_ns == before


def test_what_is_there_is_never_created_again(place: Place) -> None:
    file = place / "record"
    file.create(b"first")
    file.create(b"first")
    with pytest.raises(TakenError, match="record is there already"):
        file.create(b"second")
    assert file.read() == b"first"
    assert place.sizes() == {"record": 5}


def test_of_many_creators_one_succeeds(place: Place) -> None:
    for round_ in range(5):
        file = place / f"record{round_}"
        (winner,) = race(8, lambda i, file=file: file.create(b"%d" % i))
        assert file.read() == b"%d" % winner


def test_a_new_file_appears_whole_or_not_at_all(place: Place) -> None:
    numbers = np.arange(300_000, dtype=np.int32)
    with (place / "d/c.0.0").new_file() as file:
        file.write([b"head", numbers[:1000]])
        assert place.sizes().get("d/c.0.0") is None
        file.write([numbers[1000:], b""])
    (place / "d").sync()
    assert (place / "d/c.0.0").read() == b"head" + numbers.tobytes()

    def stop_half_way() -> None:
        with (place / "d/c.1.0").new_file() as file:
            file.write([b"half"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_half_way()
    assert place.sizes() == {"d/c.0.0": 4 + numbers.nbytes}


def test_ranges_fill_arrays(place: Place) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    (place / "x").write(data.tobytes())
    parts = [np.empty(7, np.uint8), np.empty((3, 5), np.int16), np.empty(0), np.empty(4900, np.uint8)]
    (place / "x").read_into(parts, 60)
    assert b"".join(p.tobytes() for p in parts) == data[60 : 60 + 4937].tobytes()
    for offset in (4999, 5000, 70000):
        with pytest.raises(StoreError, match="x is too short"):
            (place / "x").read_into([np.empty(2, np.uint8)], offset)
    with pytest.raises(StoreError, match="none is missing"):
        (place / "none").read_into([np.empty(2, np.uint8)], 0)


def test_expecting_is_only_advice(place: Place) -> None:
    (place / "x").write(b"12345")
    (place / "x").expect(0, 70000)
    (place / "none").expect(0, 5)
    assert (place / "x").read() == b"12345"


def resident(path: Path) -> int:
    """Return how many pages of a file the kernel holds in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        first = ctypes.c_char.from_buffer(memory)
        pages = np.zeros(-(-len(memory) // mmap.PAGESIZE), np.uint8)
        failed = libc.mincore(ctypes.addressof(first), len(memory), pages.ctypes.data)
        del first
    assert not failed
    return int((pages & 1).sum())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_the_disk_fetches_what_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "x"
    pages = 1024
    with path.open("wb") as file:
        file.write(bytes(pages * mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system keeps files in memory")
    (place_of(tmp_path) / "x").expect(256 * mmap.PAGESIZE, 512 * mmap.PAGESIZE)
    deadline = time.monotonic() + 30
    while (there := resident(path)) < 512 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 512 <= there < pages


def test_lists_say_what_there_is(place: Place) -> None:
    assert (place.sizes(), place.folders()) == ({}, [])
    wanted = {f"w000{i}/fit/acts/layers.2%3Ain/c.{j}.0": i + j for i in range(2) for j in range(3)}
    for name, size in wanted.items():
        (place / name).write(b"x" * size)
    (place / "zarr.json").write(b"{}")
    assert place.sizes() == {**wanted, "zarr.json": 2}
    assert place.folders() == ["w0000", "w0001"]
    acts = place / "w0001" / "fit/acts"
    assert acts.sizes() == {f"layers.2%3Ain/c.{j}.0": 1 + j for j in range(3)}
    assert (acts / "layers.2%3Ain").name == "layers.2%3Ain"
    # a name that begins in the same way is another one
    (place / "w00011/c.0").write(b"")
    assert len((place / "w0001").sizes()) == 3


def test_a_lock_is_held_by_one(place: Place) -> None:
    name = place / "lock"
    held: list[object] = []
    race(6, lambda _: held.append(name.lock()))
    (lock,) = held
    lock.check()
    with pytest.raises(LockedError, match="process"):
        name.lock()
    lock.release()
    lock.release()
    assert lock.released
    with name.lock() as again:
        assert not again.released
    assert again.released


def test_waiting_for_a_lock_ends_when_it_is_free(place: Place) -> None:
    first = (place / "lock").lock()
    threading.Timer(0.3, first.release).start()
    with (place / "lock").lock(wait=True):
        assert first.released


def test_map_keeps_the_order(place: Place) -> None:
    for i in range(40):
        (place / f"{i}").write(b"%d" % i)
    assert place.map(lambda i: int((place / f"{i}").read()), range(40)) == list(range(40))


def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let locks from now on be another machine's."""
    name = uuid.uuid4().hex
    monkeypatch.setattr("activations_cache.places.lease._machine", lambda: name)


def test_a_silent_lock_is_taken_over_and_its_holder_told(
    remote: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    lost = (remote / "lock").lock()
    strange(monkeypatch)
    with pytest.raises(LockedError, match="60 s after its last sign of life"):
        (remote / "lock").lock()
    monkeypatch.setattr(Lease, "seconds", 0.4)
    with (remote / "lock").lock(wait=True) as taken:
        with pytest.raises(LockedError, match="taken over"):
            lost.check()
        # it must not free what is no longer its own
        lost.release()
        taken.check()


def test_a_lock_with_signs_of_life_is_not_taken_over(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "seconds", 0.6)
    with (remote / "lock").lock() as lock:
        strange(monkeypatch)
        for _ in range(12):
            with pytest.raises(LockedError):
                (remote / "lock").lock()
            threading.Event().wait(0.1)
        lock.check()


def test_of_many_that_take_over_one_succeeds(remote: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    (remote / "lock").lock()
    strange(monkeypatch)
    with pytest.raises(LockedError):
        (remote / "lock").lock()
    monkeypatch.setattr(Lease, "seconds", 0.0)
    assert len(race(6, lambda _: (remote / "lock").lock())) == 1


def test_an_object_store_that_is_not_there_is_an_error_with_advice(s3: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="there is no bucket s3://nowhere"):
        place_of("s3://nowhere/a").create(b"")
    with pytest.raises(StoreError, match="there is no bucket s3://nowhere"):
        place_of("s3://nowhere/a").write(b"")
    with pytest.raises(
        StoreError, match=r"s3://nowhere/a: the object store refused(?s:.*)check that the bucket"
    ):
        place_of("s3://nowhere/a").sizes()
    for url in ("s3://", "s3:///key", "s3://bucket/../x", "nonsense://bucket/x"):
        with pytest.raises(ConfigError):
            place_of(url)


def test_a_pointer_stands_for_a_place(tmp_path: Path, bucket: str) -> None:
    point_to(tmp_path / "activations.zarr", place_of(f"{bucket}/here"))
    (place_of(tmp_path / "activations.zarr") / "x").write(b"1")
    assert place_of(f"{bucket}/here/x").read() == b"1"
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    with pytest.raises(StoreError, match=r"notes\.txt is not an activation store"):
        place_of(tmp_path / "notes.txt")


def cut_at_random(rng: np.random.Generator, size: int, n: int) -> list[int]:
    edges = np.sort(rng.choice(np.arange(1, size), n - 1, replace=False))
    return np.diff([0, *edges, size]).tolist()


@pytest.mark.parametrize("n", [1, 3, 1024, 1025, 2500])
def test_pieces_of_memory_are_filled_in_turn(place: Place, n: int) -> None:
    rng = np.random.default_rng(n)
    data = rng.integers(0, 256, 9000, np.uint8)
    (place / "x").write(data.tobytes())
    sizes = cut_at_random(rng, 8000, n)
    memory = np.zeros(2 * 8000, np.uint8)
    # scattered backwards with gaps that must stay as they are
    starts = 16000 - np.cumsum([2 * size for size in sizes])
    pieces = np.stack([memory.ctypes.data + starts, np.array(sizes)], axis=1)
    (place / "x").scatter(pieces, 500)
    want, at = np.zeros_like(memory), 500
    for start, size in zip(starts.tolist(), sizes, strict=True):
        want[start : start + size] = data[at : at + size]
        at += size
    np.testing.assert_array_equal(memory, want)
    with pytest.raises(StoreError, match="x is too short"):
        (place / "x").scatter(pieces, 1001)
    (place / "x").scatter(pieces[:0], 10**6)


def test_reads_that_stop_early_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 5000, np.uint8)
    (tmp_path / "x").write_bytes(data.tobytes())
    out = np.zeros(4000, np.uint8)
    sizes = np.array(cut_at_random(rng, 4000, 1500))
    pieces = np.stack([out.ctypes.data + np.cumsum(sizes) - sizes, sizes], axis=1)
    calls = []

    def stingy(fd: int, address: int, count: int, offset: int) -> int:
        assert count <= 1024
        calls.append(count)
        if len(calls) % 3 == 0:
            ctypes.set_errno(errno.EINTR)
            return -1
        given = np.ctypeslib.as_array((ctypes.c_int64 * (2 * count)).from_address(address)).reshape(-1, 2)
        few, left = given.copy(), int(rng.integers(1, 60))
        for piece in few:
            piece[1] = min(piece[1], left)
            left -= piece[1]
        return preadv(fd, few.ctypes.data, count, offset)

    preadv = reading._preadv
    monkeypatch.setattr(reading, "_preadv", stingy)
    (place_of(tmp_path) / "x").scatter(pieces, 700)
    np.testing.assert_array_equal(out, data[700:4700])
    assert len(calls) > 60
