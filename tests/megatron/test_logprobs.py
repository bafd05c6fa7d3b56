"""Log-probs, entropy, Σp² and gradients from hidden states against float64 logits; their memory.

In whole models, with tied embeddings, pipeline stages and every layout: test_transformers.py and
test_layouts.py. At the size of a real vocabulary: benchmarks/micro/head.py.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_upgrpo.megatron import groups, logprobs
from moe_upgrpo.megatron.layout import Layout
from tests.megatron.live import Live
from tests.ranks import run_ranks

N, V, H, TEMPERATURE = 60, 48, 16, 0.7


def inputs(dtype=torch.float32, n=N, v=V):
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(n, H).to(dtype), torch.randn(v, H).to(dtype)
    targets_N, mask_N = torch.randint(v, (n,)), torch.rand(n) < 0.7
    return hidden_NH, weight_VH, targets_N, mask_N, torch.randn(n)


def computed(case: str, buffer_bytes: int, ranks: int) -> dict[str, np.ndarray]:
    """On this rank: values, and gradients of a weighted sum of the log-probs."""
    with (
        groups.process_groups(Layout(tp=ranks)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(logprobs, "BUFFER_BYTES", buffer_bytes)
        dtype = torch.bfloat16 if case == "bf16" else torch.float32
        hidden_NH, weight_VH, targets_N, mask_N, along_N = inputs(dtype)
        if case == "nothing asked for":
            mask_N = torch.zeros_like(mask_N)
        weight_vH = weight_VH.chunk(ranks)[dist.get_rank()].clone()
        hidden_NH.requires_grad_()
        weight_vH.requires_grad_()
        if case == "main_grad":  # as DistributedDataParallel has it: of earlier micro-batches
            weight_vH.main_grad = torch.ones_like(weight_vH)
        elif case == "frozen head":
            weight_vH.requires_grad_(False)
        log_probs_N, entropy_N, squares_N = logprobs.log_probs_and_entropy(
            hidden_NH, weight_vH, targets_N, mask_N, temperature=TEMPERATURE,
            group=dist.group.WORLD, entropy_gradient=case == "entropy",
            squares=case not in ("plain", "main_grad", "frozen head"),
        )  # fmt: skip
        found = (log_probs_N * along_N).sum()
        if case == "entropy":
            found = found + (entropy_N * along_N.cos()).sum()
        found.backward()
        alone_N, *none = logprobs.log_probs_and_entropy(
            hidden_NH, weight_vH, targets_N, mask_N, temperature=TEMPERATURE,
            group=dist.group.WORLD, entropy=False,
        )  # fmt: skip
        assert none == [None, None] and torch.equal(alone_N, log_probs_N)
        assert entropy_N.requires_grad == (case == "entropy")
        of_hidden_NH = hidden_NH.grad.float()
        dist.all_reduce(of_hidden_NH)
        of_weight_vH = weight_vH.grad
        if case == "main_grad":
            assert of_weight_vH.is_sparse and of_weight_vH._nnz() == 0
            of_weight_vH = weight_vH.main_grad - 1
        found = {"log_probs": log_probs_N, "entropy": entropy_N, "hidden": of_hidden_NH}
        if of_weight_vH is not None:
            found["weight"] = of_weight_vH
        if squares_N is not None:
            assert not squares_N.requires_grad
            found["squares"] = squares_N
        return {name: tensor.detach().float().numpy() for name, tensor in found.items()}


def expected(case: str) -> dict[str, np.ndarray]:
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    hidden_NH, weight_VH, targets_N, mask_N, along_N = inputs(dtype)
    if case == "nothing asked for":
        mask_N = torch.zeros_like(mask_N)
    hidden_NH, weight_VH = (t.double().requires_grad_() for t in (hidden_NH, weight_VH))
    all_NV = (hidden_NH @ weight_VH.t() / TEMPERATURE).log_softmax(-1)
    log_probs_N = all_NV.gather(1, targets_N[:, None])[:, 0].where(mask_N, 0)
    entropy_N = -(all_NV.exp() * all_NV).sum(-1).where(mask_N, 0)
    loss = (log_probs_N * along_N).sum()
    if case == "entropy":
        loss = loss + (entropy_N * along_N.cos()).sum()
    loss.backward()
    found = {"log_probs": log_probs_N, "entropy": entropy_N, "hidden": hidden_NH.grad}
    if case != "frozen head":
        found["weight"] = weight_VH.grad
    if case not in ("plain", "main_grad", "frozen head"):
        found["squares"] = all_NV.exp().square().sum(-1).where(mask_N, 0)
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows", [7, 1, 1000])
@pytest.mark.parametrize(
    "case", ["plain", "main_grad", "frozen head", "nothing asked for", "bf16", "entropy"]
)
def test_values_and_gradients(case, rows, ranks):
    """7 rows at a time leave a last part of fewer."""
    found = run_ranks(ranks, computed, case, rows * 4 * (V // ranks), ranks)
    exact = expected(case)
    for name, array in exact.items():
        if name == "weight":
            mine = np.concatenate([rank[name] for rank in found])
        else:
            mine = found[0][name]
            assert all(np.array_equal(rank[name], mine) for rank in found)
        assert mine.shape == array.shape
        scale = max(1, np.abs(array).max())
        assert np.abs(mine - array).max() <= (0.03 if case == "bf16" else 1e-6) * scale, name
        assert case == "nothing asked for" or np.abs(array).max() > 0.5
    assert found[0].keys() == exact.keys()


def test_a_logit_that_is_not_finite_shows():
    hidden_NH, weight_VH, targets_N, mask_N, _ = inputs()
    weight_VH[3] = float("nan")
    with groups.process_groups(Layout()):
        found = logprobs.log_probs_and_entropy(
            hidden_NH, weight_VH, targets_N, mask_N, temperature=1.0, group=dist.group.WORLD
        )
    assert all(values_N[mask_N].isnan().all() for values_N in found[:2])


def peaks(ranks: int) -> dict[str, float]:
    """This rank's peak beside what is given, in units of its part of the logits in fp32."""
    n, v = 4096, 2048
    with (
        groups.process_groups(Layout(tp=ranks)),
        pytest.MonkeyPatch.context() as patch,
    ):
        hidden_NH, weight_VH, targets_N, _, _ = inputs(n=n, v=v)
        weight_vH = weight_VH.chunk(ranks)[dist.get_rank()].clone()
        logits_bytes = 4 * n * len(weight_vH)
        # As many parts as 8,192 rows of a vocabulary of 151,936 are split into on one rank, or two.
        parts = 4 * 8192 * 151_936 / ranks / logprobs.BUFFER_BYTES
        patch.setattr(logprobs, "BUFFER_BYTES", int(logits_bytes / parts))
        hidden_NH.requires_grad_()
        weight_vH.requires_grad_()
        weight_vH.main_grad = torch.zeros_like(weight_vH)
        given = (hidden_NH, weight_vH, weight_vH.main_grad, targets_N)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        found = {}

        def call():
            return logprobs.log_probs_and_entropy(
                hidden_NH, weight_vH, targets_N, torch.ones(n, dtype=torch.bool),
                temperature=TEMPERATURE, group=dist.group.WORLD,
            )[0]  # fmt: skip

        with torch.no_grad(), Live(known) as live:
            call()
        found["score"] = live.peak / logits_bytes
        with Live(known) as live:
            call().sum().backward()
        found["update"] = live.peak / logits_bytes
        return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_a_small_part_of_the_logits(ranks):
    for found in run_ranks(ranks, peaks, ranks):
        assert 0.02 < found["score"] < 0.15
        assert 0.02 < found["update"] < 0.30
