"""How results of several ranks and tensors under Hugging Face names are compared."""

import torch

TOLERANCE = 1e-5


def in_order(ranks: list[dict], field) -> list:
    """`field(rank)`, a list over its samples, of one rank of each copy: over all samples."""
    by_dp_rank = {rank["dp_rank"]: field(rank) for rank in ranks}
    return [item for dp_rank in sorted(by_dp_rank) for item in by_dp_rank[dp_rank]]


def assert_close(actual: dict, expected: dict, tolerance: float = TOLERANCE):
    assert actual.keys() == expected.keys() and len(expected) > 40
    # A tensor whose terms cancel keeps the rounding of the terms: one unit of the largest entry.
    floor = 1.2e-7 * max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max()
        allowed = tolerance * tensor.abs().max() + floor
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


def flat(tensors: dict) -> torch.Tensor:
    return torch.cat([tensors[n].float().flatten() for n in sorted(tensors)])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))
