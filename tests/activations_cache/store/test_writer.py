"""What is written is what was given, in a format that zarr reads, once, whatever interrupts the writing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from activations_cache import durable
from activations_cache.schema import StoreLayout, hook_to_path, path_to_hook
from activations_cache.seal import seal
from activations_cache.store import ActivationStore
from activations_cache.writer import StoreWriter
from sae.errors import ConfigError, StoreError

ROOT = Path(__file__).parents[3]
HOOKS = {"layers.2": 16, "layers.2:in": 5}


def stored_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return x.astype(dtype)


def open_writer(path, layout, **change):
    return StoreWriter(
        path, **{"hooks": HOOKS, "seed": 5, "provenance": {"model": "m"}, "layout": layout, **change}
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zarr_reads_every_row_bit_for_bit(tmp_path, rows, write, layout, dtype):
    write(tmp_path / "a.zarr", rows, layout=layout.model_copy(update={"dtype": dtype}), writers=2)
    root = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert root.attrs["logical_dtype"] == dtype and root.attrs["sealed"]
    for split in ("fit", "discover", "confirm"):
        want = rows.where(rows.split == split)
        for hook in HOOKS:
            got = {name: [] for name in ("entity", "position", "time", "acts")}
            for w in ("w0000", "w0001"):
                group = root[f"{w}/{split}"]
                real = group["entity"][:] >= 0
                for name in ("entity", "position", "time"):
                    got[name].append(group[name][:][real])
                got["acts"].append(group["acts"][hook_to_path(hook)][:][real])
            joined = {name: np.concatenate(parts) for name, parts in got.items()}
            order = np.lexsort((joined["position"], joined["entity"]))
            np.testing.assert_array_equal(joined["entity"][order], want.entity)
            np.testing.assert_array_equal(joined["time"][order], want.time)
            np.testing.assert_array_equal(joined["acts"][order], stored_bits(want.acts[hook], dtype))


@given(st.text(min_size=1))
def test_hook_names_survive_as_paths(name):
    path = hook_to_path(name)
    assert path_to_hook(path) == name
    assert "/" not in path and not path.startswith((".", "__"))


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6), data=st.data())
def test_any_sizes_are_stored_once(tmp_path_factory, sizes, data):
    path = tmp_path_factory.mktemp("sizes") / "a.zarr"
    layout = StoreLayout(
        chunk_rows=data.draw(st.sampled_from([1, 4, 8])),
        shard_rows=16,
        block_rows=data.draw(st.integers(1, 80)),
    )
    names = np.array(["fit", "discover", "late"])
    start = 0
    with StoreWriter(path, hooks={"h": 3}, layout=layout, seed=0, provenance={}, run_length=2) as writer:
        for n in sizes:
            i = np.arange(start, start + n)
            writer.append(
                {"h": np.stack([i, -i, i % 7], 1).astype(np.float32)}, entity=i // 5, position=i % 5, time=i,
                split=names[i // 5 % 3], cursor=start + n,
            )  # fmt: skip
            start += n
        total = start
    if total == 0:
        with pytest.raises(StoreError, match="holds no rows"):
            seal(path)
        return
    seal(path)
    store = ActivationStore.open(path)
    seen = [b for split in store.splits for b in store.rows("h", split, batch_rows=13)]
    time = np.concatenate([b.time for b in seen])
    assert sorted(time.tolist()) == list(range(total))
    np.testing.assert_array_equal(np.concatenate([b.acts for b in seen])[:, 0], time)
    assert store.verify() == []


def test_a_short_block_does_not_end_the_store(tmp_path, rows, write, layout, feed):
    path = tmp_path / "a.zarr"
    n = len(rows.entity)
    for stop in (0, 130, 131, 900, n):
        with open_writer(path, layout) as writer:
            start = writer.cursor[0] if writer.cursor else 0
            feed(writer, rows.part(0, stop), start=start)
        with open_writer(path, layout) as writer:
            assert (writer.cursor, writer.rows) == ([stop] if stop else None, stop)
    seal(path)
    got = ActivationStore.open(path).entities(np.arange(300), "layers.2")
    np.testing.assert_array_equal(got.acts, rows.where(rows.entity >= 0).acts["layers.2"])


def test_rows_are_shuffled_and_repeatably_so(tmp_path, rows, write):
    a, b, c = (write(tmp_path / name, rows, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    orders = [s.coordinates("fit")[0] for s in (a, b, c)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).mean() > 0.9
    assert np.abs(np.corrcoef(orders[0][:400], np.arange(400))[0, 1]) < 0.2


def test_runs_stay_together(tmp_path, rows, write):
    entity, position, _ = write(tmp_path / "a.zarr", rows, run_length=4).coordinates("fit")
    kept = (entity[1:] == entity[:-1]) & (position[1:] == position[:-1] + 1)
    starts = position[np.flatnonzero(~kept) + 1] % 4
    assert (starts == 0).mean() > 0.95
    assert kept.mean() > 0.6


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 65520.0), ("float32", np.nan), ("bfloat16", 3.4e38), ("float32", np.inf)]
)
def test_values_that_do_not_fit_stop_the_harvest(tmp_path, rows, layout, dtype, value):
    part = rows.part(0, 50)
    acts = {h: a.copy() for h, a in part.acts.items()}
    acts["layers.2:in"][17, 3] = value
    columns = {name: getattr(part, name) for name in ("entity", "position", "time", "split")}
    with open_writer(tmp_path / "a.zarr", layout.model_copy(update={"dtype": dtype})) as writer:
        writer.append(part.acts, **columns, cursor=1)
        with pytest.raises(
            StoreError, match=rf"layers\.2:in.*entity {part.entity[17]}, position .*time {part.time[17]}"
        ):
            writer.append(acts, **columns, cursor=2)
    assert (writer.cursor, writer.rows) == (1, 50)


@pytest.mark.parametrize(
    ("dtype", "value", "kept"), [("float16", 65519.0, 65504.0), ("bfloat16", 3.39e38, 3.3895314e38)]
)
def test_the_largest_values_that_fit_are_kept(tmp_path, layout, dtype, value, kept):
    one = np.zeros(1, np.int64)
    with open_writer(tmp_path / "a", layout.model_copy(update={"dtype": dtype}), hooks={"h": 1}) as writer:
        writer.append(
            {"h": np.full((1, 1), value, np.float32)}, entity=one, position=one, time=one, split=one, cursor=1
        )
    seal(tmp_path / "a")
    assert ActivationStore.open(tmp_path / "a").entity(0, "h").acts[0, 0] == np.float32(kept)


def test_wrong_rows_are_refused(tmp_path, rows, layout):
    p = rows.part(0, 10)
    columns = {name: getattr(p, name) for name in ("entity", "position", "time", "split")}
    with open_writer(tmp_path / "a.zarr", layout) as writer:
        for acts, change in (
            ({"layers.2": p.acts["layers.2"]}, {}),
            ({**p.acts, "layers.2": p.acts["layers.2"][:, :3]}, {}),
            (p.acts, {"entity": p.entity - 1}),
            (p.acts, {"time": p.time[:3]}),
            (p.acts, {"split": np.full(10, 9)}),
            (p.acts, {"split": np.full(10, "a/b")}),
        ):
            with pytest.raises((StoreError, TypeCheckError)):
                writer.append(acts, **{**columns, **change}, cursor=0)
        writer.append(p.acts, **columns, cursor=1)
    assert writer.rows == 10


def test_other_settings_are_refused(tmp_path, layout, rows, feed):
    path = tmp_path / "a.zarr"
    with open_writer(path, layout) as writer:
        feed(writer, rows.part(0, 10))
    changes = {"seed": 6}, {"provenance": {"model": "n"}}, {"hooks": {"x": 1}}, {"run_length": 2}
    for change in changes:
        with pytest.raises(StoreError, match="begun with other settings"):
            open_writer(path, layout, **change)
    with pytest.raises(StoreError, match="begun with other settings"):
        open_writer(path, StoreLayout())
    seal(path)
    with pytest.raises(StoreError, match="is complete"):
        open_writer(path, layout)
    with pytest.raises(ConfigError):
        StoreLayout(chunk_rows=3, shard_rows=10).geometry({"h": 4})


def test_two_writers_of_one_group_are_refused(tmp_path, layout, rows, feed):
    path = tmp_path / "a.zarr"
    with open_writer(path, layout) as writer, open_writer(path, layout, writer=1) as other:
        with pytest.raises(StoreError, match="being written by another process"):
            open_writer(path, layout)
        feed(writer, rows.part(0, 10))
        feed(other, rows.part(10, 20))
        with pytest.raises(StoreError, match="being written"):
            seal(path)
    seal(path)
    assert ActivationStore.open(path).n_rows == 20


@pytest.mark.parametrize(("stop", "kept"), [(300, None), (700, None), (800, [700]), (1500, [1400])])
def test_an_interruption_keeps_whole_blocks_alone(tmp_path, layout, rows, feed, stop, kept):
    path = tmp_path / "a.zarr"

    def harvest():
        with open_writer(path, layout) as writer:
            feed(writer, rows.part(0, stop))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest()
    with open_writer(path, layout) as writer:
        assert writer.cursor == kept


def test_sealing_sweeps_what_killed_processes_were_about_to_put(tmp_path, rows, write):
    for name in ("parts.json.0.partial", "zarr.json.1.partial.partial", "w0000/end.json.2.partial"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).touch()
    write(tmp_path / "a", rows)
    assert not list((tmp_path / "a").rglob("*.partial"))


def test_short_system_calls_are_continued(tmp_path, monkeypatch):
    real = os.writev
    monkeypatch.setattr(durable.os, "writev", lambda fd, views: real(fd, [views[0][:1000]]))
    parts = [np.arange(5000, dtype=np.int64), b"abc", np.zeros((3, 7), np.float16)]
    with durable.partial_file(tmp_path / "x") as fd:
        assert durable.write_all(fd, parts) == 40045
    assert (tmp_path / "x").read_bytes() == b"".join(
        p if isinstance(p, bytes) else p.tobytes() for p in parts
    )


CHILD = """
import resource, sys, numpy as np
from pathlib import Path
from activations_cache.schema import StoreLayout
from activations_cache.writer import StoreWriter
path, target, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
layout = StoreLayout(chunk_rows=64, shard_rows=512, block_rows=2000)
with StoreWriter(path, hooks={"h": 8}, layout=layout, seed=0, provenance={}) as w:
    start = w.cursor or 0
    print("ready", flush=True)
    while start < target:
        i = np.arange(start, min(start + 300, target))
        x = (i[:, None] * np.arange(1, 9) % 1009).astype(np.float32)
        stop = int(i[-1]) + 1
        w.append({"h": x}, entity=i // 7, position=i % 7, time=i, split=i // 7 % 3, cursor=stop)
        start = stop
"""


def start_child(path, target, *, limit=0):
    """A process that writes rows up to `target`; no file of it may pass `limit` bytes."""
    command = [sys.executable, "-c", CHILD, str(path), str(target), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_all_rows(path, total):
    """The list of rows is known without the store: row i is a function of i."""
    store = ActivationStore.open(path)
    assert store.verify() == []
    batches = [b for split in store.splits for b in store.rows("h", split)]
    time = np.concatenate([b.time for b in batches])
    assert np.array_equal(np.sort(time), np.arange(total))
    acts = np.concatenate([b.acts for b in batches])
    np.testing.assert_array_equal(acts, (time[:, None] * np.arange(1, 9) % 1009).astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([b.entity for b in batches]), time // 7)
    np.testing.assert_array_equal(
        store.entity(total // 7 - 1, "h").time, np.arange(total // 7 * 7 - 7, total // 7 * 7)
    )


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "a.zarr"
    chance = random.Random(0)
    reached = []
    for _ in range(3):
        child = start_child(path, 10**9)
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        try:
            child.wait(timeout=chance.uniform(0.2, 0.8))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.communicate()
        records = sorted((path / "w0000/commits").glob("*.json"))
        reached.append(json.loads(records[-1].read_text())["body"]["cursor"])
    assert 0 < reached[0] < reached[1] < reached[2]
    total = reached[-1] + 5003
    child = start_child(path, total)
    assert child.communicate()[1] == "" and child.returncode == 0
    seal(path)
    assert not list(path.rglob("*.partial"))
    check_all_rows(path, total)


def test_a_full_disk_leaves_a_store_that_continues(tmp_path):
    path = tmp_path / "a.zarr"
    child = start_child(path, 3 * 2000 + 500)
    assert child.communicate()[1] == ""
    child = start_child(path, 50000, limit=10000)
    assert "no space left to write" in child.communicate()[1] and child.returncode == 1
    child = start_child(path, 9000)
    assert child.communicate()[1] == ""
    seal(path)
    check_all_rows(path, 9000)
