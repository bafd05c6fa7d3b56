"""Messages of ranks, counted and predicted, and the model of many GPUs by hand-worked numbers."""

import pytest

from benchmarks.micro import at_scale, messages
from benchmarks.micro.at_scale import Machine, Row
from benchmarks.micro.messages import Sent
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import MicroBatch, Sizes, Stage
from moe_upgrpo.train.tiny import TinyModel


def test_what_a_rank_sends_in_a_ring():
    """Four ranks; sizes of the tensors received, and of those given."""
    found = {
        name: messages.ring_bytes(name, sizes, 4)
        for name, sizes in {
            "allreduce": (80,),
            "allgather": (80, 20),
            "reduce_scatter_tensor_coalesced": (20, 80),
            "alltoall_base": (99, 80),
            "broadcast": (80,),
            "send": (80,),
        }.items()
    }
    assert list(found.values()) == [120, 60, 60, 60, 60, 80]
    assert messages.ring_bytes("alltoall_base", (99, 80), 4, stays=0.5) == 40
    with pytest.raises(NotImplementedError, match="scatter is not known"):
        messages.ring_bytes("scatter", (80,), 4)


def test_growth_is_told_where_three_numbers_of_ranks_were_counted():
    counted = {
        f"DP{n}": {"data-parallel": Sent(1, 1e6 * n), "small": Sent(1, 8)} for n in (2, 4, 8)
    }
    told = list(messages.growth(counted | {"TP2": {}}))
    assert told == ["DP: a rank's bytes grow as data-parallel ranks^+1.00"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "EP2", "TP2·EP4", "TP2·EP2·PP2"])
def test_what_plan_predicts_is_what_processes_send(name):
    """Bytes to 2% (norms and routers lie whole on every rank; a sixty-fourth of the tokens choose
    their experts), messages exactly; and nothing else of any size is sent."""
    ranks, layout = messages.LAYOUTS[name]
    (counted,) = messages.counted([name]).values()
    predicted = messages.predicted(layout, ranks)
    for kind, of_plan in predicted.items():
        found = counted.get(kind, Sent())
        assert found.bytes == pytest.approx(of_plan.bytes, rel=0.02), kind
        if of_plan.calls:
            assert found.calls == of_plan.calls, kind
    rest = {kind: sent.bytes for kind, sent in counted.items() if kind not in predicted}
    assert rest.keys() <= {"allreduce", "objects"}
    assert rest["allreduce"] < 0.01 * sum(sent.bytes for sent in counted.values())


MACHINE = Machine(
    flops=100, hbm=10, nvlink=20, network=5, start_s=1, nvlink_hop_s=0.1, network_hop_s=0.5,
    of_flops=0.5, of_bytes=1,
)  # fmt: skip


def test_times_of_messages_by_hand():
    # Four ranks of one machine: 3 hops of .1; 40 bytes at 20.
    assert at_scale.ring(MACHINE, 40, 2, 4, 4) == pytest.approx(2 * 1.3 + 2)
    # Two machines of four: 1 hop of the network, 6 of NVLink; four adapters are as fast as NVLink.
    assert at_scale.ring(MACHINE, 40, 1, 8, 4) == pytest.approx(1 + 0.5 + 6 * 0.1 + 2)
    # One rank in each of eight: its own adapter.
    assert at_scale.ring(MACHINE, 40, 1, 8, 1) == pytest.approx(1 + 7 * 0.5 + 8)
    assert at_scale.ring(MACHINE, 40, 1, 1, 1) == 0
    # To 7 others, 4 of them in the other machine: 40 of 70 bytes leave, at 5.
    assert at_scale.exchange(MACHINE, 70, 1, 8, 4) == pytest.approx(1.5 + 8)
    assert at_scale.exchange(MACHINE, 70, 1, 8, 8) == pytest.approx(1.1 + 3.5)


def test_operations_and_bytes_by_hand():
    """Two layers of hidden size 32, heads of 4 x 32: see tiny_model_config."""
    hf = TinyModel(layers=2, hidden=32, experts=4, top_k=1, expert_intermediate=32).hugging_face()
    model = Sizes.of(hf)
    experts = 3 * 32 * 32 + 32 * 4  # one of four, and the router
    attention = 32 * (128 + 2 * 64) + 128 * 32 + 2 * 32 + 2 * 32
    active = 2 * (experts + attention) + 2 * 32 * 32 + 32 - model.tied * 32 * 32
    pairs = 4 * 4 * 32 * 2 * 100 / 2
    found = at_scale.flops(model, 100, forwards=2, backwards=1)
    assert found == (2 * active + pairs) * 4
    stage = Stage(index=0, shared=1000, expert=600, layers=0, moe_layers=0, first=True, last=True)
    # Without layers: weights and gradients of three micro-batches, and the state of two ranks'.
    found = at_scale.hbm_bytes(
        model, Layout(ep=2), stage, 2, MicroBatch(sequences=1, length=4),
        micro_batches=3, optimizer_steps=2, forwards=2, backwards=1,
    )  # fmt: skip
    assert found == 3 * (2 * 2 + 12) * 1600 + 2 * 30 * (1000 / 2 + 600)


def test_the_first_limit_is_the_longest_row():
    class Of:
        ranks = 64

    class Fullest:
        peak = 50e9

    class Plan:
        config, fullest, layout, available = Of, Fullest, Layout(tp=2), 73e9

    found = [Row(name=n, amount="", seconds=s) for n, s in (("a", 1.0), ("b", 7.0), ("c", 2.0))]
    title, shown, limit, memory = at_scale.report("model", Plan, found)
    assert "modelled, not measured" in title and "| b |  | 7.0 | 70% |" in shown
    assert limit == "first limit: b (7 s of 10), then c"
    assert memory == "memory at its fullest: 50.0 of 73.0 GB"


@pytest.mark.slow
def test_both_cases_fit_and_name_their_limit(capsys):
    at_scale.main()
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("first limit: ") for line in said) == 2
    for line in said:
        if line.startswith("memory"):
            used, available = (float(word) for word in line.split() if word[0].isdigit())
            assert used < available
