"""What the processes of one job leave for each other, over restarts and when nobody is there."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import TCPStore

from assay.ranks import Ranks
from sae.errors import ConfigError
from sae.rendezvous import shared_store
from sae.world import ProcessWorld


@pytest.fixture
def server(monkeypatch):
    """The store that a static torchrun keeps over its restarts, as a process of one host finds it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GROUP_WORLD_SIZE": "1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return store


def test_a_restarted_rank_does_not_meet_the_addresses_of_the_dead(server, monkeypatch):
    def place():
        return shared_store(0, 2, timeout=3.0)

    place().set("address", "of the dead")
    assert place().check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not place().check(["address"])
    # hosts may count differently; there every round has a store of its own
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    place().set("address", "of a host")
    assert server.check(["address"])


def test_a_restarted_rank_does_not_hear_the_last_words_of_the_dead(server, monkeypatch):
    def ranks(rank: int) -> Ranks:
        return Ranks(ProcessWorld(rank, 2, torch.device("cpu"), {"data": 2, "feature": 1}, 3.0))

    with ranks(0).ending():
        ranks(0).say("fit", "runs")
    assert ranks(1).hear("fit") == "runs" and ranks(1).hear("train") is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ranks(0).say("fit", "is fresh")
    ranks(0).say("train", "runs")
    assert ranks(1).hear("fit") == "is fresh" and ranks(1).hear("train") == "runs"


def test_without_a_store_one_message_says_what_to_do(server, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match="torchrun"):
        shared_store(0, 2, timeout=3.0)
