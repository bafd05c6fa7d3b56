"""Σπ² and hidden states of the old policy, and the advantages that are made of them, in any layout.

Against a dense computation of the test's own, from the logits and hidden states of transformers:
with tensor and sequence parallelism, pipeline stages, packed rows, parts of sequences, sequences
that another rank computes, chunks of logits, and a response of which some tokens do not count.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from moe_upgrpo.losses import PolicyLossConfig, nthr_factors, optimal_token_baseline
from moe_upgrpo.megatron import groups, logprobs
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.train.advantages import advantages_of, with_nthr
from tests.megatron.compare import assert_close, flat, in_order
from tests.megatron.measured import SGD, TEMPERATURE, gradients_by_name, make_samples
from tests.megatron.test_token_budgets import BUDGET
from tests.ranks import run_ranks

GROUP, BETA = 4, 0.5
SIGNS = (1, -1, -1, 1, -1, 1, -1, -1)
LAYOUTS = {
    "one": ("tiny", 1, Layout(), {"micro_batch_size": 3}),
    "TP2·EP2": ("tiny", 2, Layout(tp=2, ep=2), {"micro_batch_size": 3}),
    "PP2": ("mixed", 2, Layout(pp=2), {"micro_batch_size": 3}),
    "dense PP2": ("dense", 2, Layout(pp=2), {"micro_batch_size": 3}),
    "PP2·VPP2": ("mixed", 2, Layout(pp=2, vpp=2), {"micro_batch_size": 3}),
    "TP2·EP2 packed": (
        *("tiny", 2, Layout(tp=2, ep=2)),
        {"micro_batch_tokens": BUDGET, "packing": True},
    ),
    "DP2": ("tiny", 2, Layout(), {"micro_batch_tokens": BUDGET}),
    "CP2·EP2": ("tiny", 2, Layout(cp=2, ep=2), {"micro_batch_tokens": 32}),
    "TP2·EP2·DP2": ("tiny", 4, Layout(tp=2, ep=2), {"micro_batch_tokens": BUDGET}),
    "TP2·PP2": ("mixed", 4, Layout(tp=2, pp=2), {"micro_batch_size": 3}),
    "CP2·TP2": ("mixed", 4, Layout(cp=2, tp=2), {"micro_batch_size": 3}),
}
SLOW = ("TP2·EP2·DP2", "TP2·PP2", "CP2·TP2", "dense PP2", "PP2·VPP2")


def samples() -> list:
    """Two groups of four with responses of either sign, and few ids, so that right and wrong ones
    share some; in one some tokens are a tool's."""
    made = []
    for i, (one, sign) in enumerate(zip(make_samples(), SIGNS, strict=True)):
        tokens = one.tokens.copy()
        tokens[one.prompt_length :] = 2 + tokens[one.prompt_length :] % 4
        made.append(
            replace(one, tokens=tokens, advantage=sign * (0.5 + i), number=i, group=i // GROUP)
        )
    longest = max(range(8), key=lambda i: len(made[i].tokens) - made[i].prompt_length)
    made[longest] = replace(made[longest], sampled=np.arange(len(counted(made[longest]))) % 3 != 1)
    return made


def counted(sample) -> np.ndarray:
    return (
        np.ones(len(sample.tokens) - sample.prompt_length, bool)
        if sample.sampled is None
        else sample.sampled
    )


def measure(layout: Layout, checkpoint, options: dict, dtype: str = "float32") -> dict:
    """On a rank: what was recorded, and the advantages of both kinds."""
    with groups.process_groups(layout), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "BUFFER_BYTES", 7 * 4 * 64)  # 7 or 14 rows of logits at a time
        dp_rank, dp_size = groups.data_parallel()
        mine = samples()[dp_rank * 8 // dp_size : (dp_rank + 1) * 8 // dp_size]
        actor = MegatronActor(checkpoint, layout, temperature=TEMPERATURE, dtype=dtype, **options)
        plain = actor.score(mine)
        asked = ("routes", "margins", "sum_pi_squared", "hidden")
        scored = actor.score(mine, record=asked)
        for a, b in zip(plain, scored, strict=True):  # what is recorded besides changes no bit
            for field in ("log_probs", "entropy", "routes", "margins"):
                assert np.array_equal(getattr(a, field), getattr(b, field)), field
            assert (a.sum_pi_squared, a.hidden) == (None, None)
        rewards = np.array([float(s.advantage > 0) for s in mine], np.float32)
        rollouts = [SimpleNamespace(sampled_or_all=counted(sample)) for sample in mine]
        otb = advantages_of(rewards, rollouts, group=GROUP, kind="otb", old=scored)
        masked = with_nthr(mine, scored, actor, group=GROUP, beta=BETA, eta=None)
        return {
            "dp_rank": dp_rank,
            "squares": [one.sum_pi_squared for one in scored],
            "hidden": [one.hidden for one in scored],
            "otb": otb,
            "nthr": [sample.advantage for sample in masked],
        }


def stepped(layout: Layout, checkpoint) -> dict:
    """On a rank: gradient and weights of a step with each kind of advantages."""
    with groups.process_groups(layout):
        actor = MegatronActor(
            checkpoint, layout, temperature=TEMPERATURE, micro_batch_size=3, optimizer=SGD
        )
        start, found = actor.weights_now(), {}
        mine = samples()
        scored = actor.score(mine, record=("sum_pi_squared", "hidden"))
        mine = [
            replace(s, old_log_probs=o.log_probs) for s, o in zip(mine, scored, strict=True)
        ]  # at ratios of 1 no token is clipped
        rewards = np.array([float(s.advantage > 0) for s in mine], np.float32)
        rollouts = [SimpleNamespace(sampled_or_all=counted(sample)) for sample in mine]
        otb = advantages_of(rewards, rollouts, group=GROUP, kind="otb", old=scored)
        for name, batch in {
            "plain": mine,
            "otb": [replace(s, advantage=a) for s, a in zip(mine, otb, strict=True)],
            "nthr": with_nthr(mine, scored, actor, group=GROUP, beta=BETA, eta=None),
        }.items():
            actor._put(start)
            actor.update(batch, PolicyLossConfig.preset("up-grpo"))
            gradient = gradients_by_name(actor)
            found[name] = gradient, {n: w.clone() for n, w in actor.export_weights()}
        return found


def dense(checkpoint) -> dict:
    """Sums over all logits, in float64, and the advantages by the pure functions."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rows = {name: [] for name in ("squares", "hidden", "log_probs", "probabilities", "mask", "ids")}
    made = samples()
    for sample in made:
        tokens = torch.from_numpy(sample.tokens)
        with torch.no_grad():
            out = model(tokens[None], output_hidden_states=True)
        all_TV = (out.logits[0].double() / TEMPERATURE).log_softmax(-1)[sample.response_rows]
        ids_T = tokens[sample.prompt_length :]
        rows["squares"].append(all_TV.exp().square().sum(-1))
        rows["hidden"].append(out.hidden_states[-1][0].double()[sample.response_rows])
        rows["log_probs"].append(all_TV.gather(1, ids_T[:, None])[:, 0])
        rows["probabilities"].append(all_TV.exp())
        rows["mask"].append(torch.from_numpy(counted(sample)))
        rows["ids"].append(ids_T)
    padded = {name: pad_sequence(column, batch_first=True) for name, column in rows.items()}
    advantages = torch.tensor([sample.advantage for sample in made]).double()
    otb = optimal_token_baseline(
        (advantages > 0).double(), GROUP, padded["log_probs"], padded["mask"], padded["squares"]
    )
    factors = []
    for mine in (slice(0, GROUP), slice(GROUP, None)):
        ids = padded["ids"][mine][padded["mask"][mine]].unique()
        onehot = padded["ids"][mine][..., None] == ids
        residuals = onehot.double() - padded["probabilities"][mine][..., ids]
        given = (padded["hidden"][mine], residuals, advantages[mine] > 0, padded["mask"][mine])
        factors.append(nthr_factors(*given, beta=BETA))
        nearby = [nthr_factors(*given, beta=BETA * near) for near in (1 - 1e-3, 1 + 1e-3)]
        assert all(torch.equal(one, factors[-1]) for one in nearby)  # none is at the limit
    factors = torch.cat(factors)
    wrong = padded["mask"] & (advantages <= 0)[:, None]
    assert 0 < (factors != 1).sum() < wrong.sum()
    masked = factors * advantages[:, None]
    lengths = [len(one) for one in rows["mask"]]
    return rows | {
        name: [row[:n].numpy() for row, n in zip(x, lengths, strict=True)]
        for name, x in (("otb", otb), ("nthr", masked))
    }


@pytest.fixture(scope="module")
def expected(checkpoints):
    return functools.cache(lambda name: dense(checkpoints[name]))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)
def test_every_layout_has_what_a_dense_computation_has(name, checkpoints, expected):
    checkpoint, world_size, layout, options = LAYOUTS[name]
    ranks = run_ranks(world_size, measure, layout, checkpoints[checkpoint], options)
    exact = expected(checkpoint)
    for rank in ranks:  # all of a copy have the same
        twin = next(other for other in ranks if other["dp_rank"] == rank["dp_rank"])
        for kind in ("squares", "otb", "nthr"):
            assert all(map(np.array_equal, rank[kind], twin[kind]))
    holders = [rank for rank in ranks if rank["hidden"][0] is not None]
    copies = {rank["dp_rank"] for rank in ranks}
    assert len(holders) == len(copies) == len({rank["dp_rank"] for rank in holders})
    for i, sample in enumerate(samples()):
        mask_T = counted(sample)
        of_rank = {kind: in_order(ranks, lambda r, k=kind: r[k])[i] for kind in ("squares", "otb")}
        np.testing.assert_allclose(
            of_rank["squares"][mask_T], exact["squares"][i][mask_T], rtol=1e-4, atol=1e-6
        )
        hidden = in_order(holders, lambda r: r["hidden"])[i]
        expected_hidden = exact["hidden"][i][mask_T].float()
        torch.testing.assert_close(hidden, expected_hidden, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(of_rank["otb"], exact["otb"][i], rtol=1e-3, atol=1e-4)
        masked = np.broadcast_to(in_order(ranks, lambda r: r["nthr"])[i], mask_T.shape)
        np.testing.assert_allclose(masked[mask_T], exact["nthr"][i][mask_T], rtol=1e-5)


def test_in_bfloat16_hidden_states_take_two_bytes_each(checkpoints):
    """Each sequence's by themselves: as they are kept, and as they would be sent."""
    (found,) = run_ranks(1, measure, Layout(), checkpoints["tiny"], {}, "bfloat16")
    for hidden, sample in zip(found["hidden"], samples(), strict=True):
        assert hidden.dtype == torch.bfloat16 and len(hidden) == counted(sample).sum()
        assert hidden.untyped_storage().nbytes() == 2 * hidden.numel()


def test_a_step_on_two_ranks_is_that_of_one_process(checkpoints):
    (one,) = run_ranks(1, stepped, Layout(), checkpoints["tiny"])
    for rank in run_ranks(2, stepped, Layout(tp=2, ep=2), checkpoints["tiny"]):
        for name, expected in one.items():
            for mine, theirs in zip(rank[name], expected, strict=True):
                assert_close(mine, theirs)
    plain = flat(one["plain"][0])
    for name in ("otb", "nthr"):
        assert (flat(one[name][0]) - plain).norm() > 0.01 * plain.norm(), name
