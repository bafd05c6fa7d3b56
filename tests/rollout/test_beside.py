"""Weights for an engine that still samples, and the group of the ranks that share a server."""

import threading

import pytest
import torch
import torch.distributed as dist

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.beside import SharingRanks, hand_over
from tests.ranks import run_ranks


class Holds:
    """An engine that keeps what it is given."""

    def update_weights(self, named_tensors, *, version):
        self.held, self.version = dict(named_tensors), version


def test_weights_are_those_of_the_hand_over_when_they_are_put_in():
    """The trainer changes its tensors meanwhile; its iterator, a collective, is read at once."""
    engine, weight = Holds(), torch.ones(3)
    read = []
    put = hand_over(engine, ((n, weight) for n in (read.append(n) or n for n in "ab")), version=4)
    assert read == ["a", "b"] and not hasattr(engine, "held")
    weight.zero_()
    put()
    assert engine.version == 4
    assert {name: held.tolist() for name, held in engine.held.items()} == {
        "a": [1, 1, 1],
        "b": [1, 1, 1],
    }


def test_an_engine_that_can_take_weights_itself_is_asked():
    class Takes(Holds):
        def take_weights(self, named_tensors, *, version):
            return lambda: f"{sorted(dict(named_tensors))} of {version}"

    assert hand_over(Takes(), iter({"a": torch.ones(1)}.items()), version=2)() == "['a'] of 2"


def beside_the_trainer():
    """Answers that a thread gets, while the main thread uses the default group in another order."""
    dist.init_process_group("gloo")
    rank, ranks, told = dist.get_rank(), SharingRanks(60), []

    def fails():
        raise OSError("no space")

    def update():
        ranks.meet()
        told.append(ranks.from_first(lambda: f"rank {rank}"))
        with pytest.raises(UserError, match="no space"):
            ranks.from_first(fails)

    total = torch.tensor(rank + 1)
    if rank:  # the thread first; on the other rank the trainer first
        thread = threading.Thread(target=update)
        thread.start()
        dist.all_reduce(total)
    else:
        dist.all_reduce(total)
        thread = threading.Thread(target=update)
        thread.start()
    thread.join()
    return ranks.first, told, int(total)


def test_ranks_meet_in_a_thread_while_the_trainer_uses_its_own_groups():
    assert run_ranks(2, beside_the_trainer) == [(True, ["rank 0"], 3), (False, ["rank 0"], 3)]


def test_one_process_needs_no_group():
    ranks = SharingRanks(1)
    ranks.meet()
    assert ranks.first and ranks.from_first(lambda: 5) == 5
