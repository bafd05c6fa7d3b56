"""A mixture-of-experts policy small enough to be enumerated: every prefix, every sequence, float64.

Sequences have exactly T tokens, there is no end token, and one prompt (a begin token). A prefix is
a node of a tree, and one forward pass gives the next-token distribution of every node. Causal
attention carries the effects of earlier positions' experts to later ones, as in a real model.

Shapes: M prefixes (nodes), N = V^T sequences, T positions, V tokens, L MoE layers, E experts, K
experts per token, D hidden, F expert width, P parameters. θ is one flat vector `[P]`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_upgrpo.errors import UserError

DTYPE = torch.float64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    tokens: int = 6
    """V"""
    length: int = 4
    """T"""
    layers: int = 3
    """L, every one of them MoE"""
    experts: int = 8
    """E"""
    top_k: int = 2
    """K"""
    hidden: int = 8
    """D"""
    expert_width: int = 4
    """F"""
    expert_scale: float = 0.5
    """Factor on the experts' initial output weights: how much an expert matters."""
    head_scale: float = 2.0
    """Factor on the output layer's initial weights: how peaked the policy is."""

    def __post_init__(self):
        if not 1 <= self.top_k < self.experts:
            raise UserError(
                f"top_k: {self.top_k} given; allowed: from 1 to experts - 1 = {self.experts - 1}"
            )
        if self.tokens**self.length > 20_000:
            raise UserError(
                f"tokens, length: {self.tokens}, {self.length} given, {self.tokens**self.length} "
                "sequences; allowed: tokens ** length up to 20000"
            )


class Tree:
    """Which prefix belongs to which sequence.

    prefixes_MT: input tokens of each prefix, the begin token first, 0 behind its end.
    depth_M: index of a prefix's last input, the position whose output counts.
    ancestors_MT: the node of each leading part of a prefix, itself behind its end.
    nodes_NT, tokens_NT: the prefix before each token of a sequence, and the token.
    """

    def __init__(self, tokens: int, length: int):
        V, T = self.V, self.T = tokens, length
        first_T = [sum(V**i for i in range(t)) for t in range(T + 1)]  # first node of each depth
        self.tokens_NT = torch.cartesian_prod(*[torch.arange(V)] * T).view(-1, T)
        code_N = torch.zeros(V**T, dtype=torch.long)
        nodes = []
        for t in range(T):
            nodes.append(first_T[t] + code_N)
            code_N = code_N * V + self.tokens_NT[:, t]
        self.nodes_NT = torch.stack(nodes, 1)
        M = first_T[T]
        self.depth_M = torch.cat([torch.full((V**t,), t) for t in range(T)])
        self.ancestors_MT = torch.arange(M)[:, None].repeat(1, T)
        self.prefixes_MT = torch.zeros(M, T, dtype=torch.long)
        self.prefixes_MT[:, 0] = V
        for t in range(T):
            # every sequence through a node writes the same values
            here_N = self.nodes_NT[:, t]
            self.ancestors_MT[here_N, : t + 1] = self.nodes_NT[:, : t + 1]
            self.prefixes_MT[here_N, 1 : t + 1] = self.tokens_NT[:, :t]

    @cached_property
    def pairs_NT(self) -> Tensor:
        """Index of each token of a sequence among the M·V (prefix, next token) pairs."""
        return self.nodes_NT * self.V + self.tokens_NT

    def of_sequences(self, values_MV: Tensor) -> Tensor:
        """`[M, V]` per prefix and next token → `[N, T]` per token of each sequence."""
        return values_MV[self.nodes_NT, self.tokens_NT]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """log_probs_MV; routes_MLK: the experts used; router_log_probs_MLE: of all experts, native."""

    log_probs_MV: Tensor
    routes_MLK: Tensor
    router_log_probs_MLE: Tensor


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Differences between the policies of rollout engine and trainer; held fixed while θ moves.

    noise_MLE: added to the router's logits, one draw for each prefix, layer and expert: it moves
        the choice of experts and their gates.
    bf16_router: the router's input, weight and logits rounded to bfloat16.
    lag_P: the engine's weights are θ − lag.
    """

    noise_MLE: Tensor | None = None
    bf16_router: bool = False
    lag_P: Tensor | None = None


def round_bf16(x: Tensor) -> Tensor:
    """bfloat16 values, with the gradient of the identity (a rounding has none of its own)."""
    return x + (x.to(torch.bfloat16).to(x.dtype) - x).detach()


def norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Policy:
    """The model as a function of θ; holds no parameters."""

    def __init__(self, sizes: Sizes):
        s = self.sizes = sizes
        self.tree = Tree(s.tokens, s.length)
        L, E, D, F = s.layers, s.experts, s.hidden, s.expert_width
        # name -> (shape, standard deviation of the initial weights)
        self.shapes = {
            "token": ((s.tokens + 1, D), 1.0),
            "position": ((s.length, D), 1.0),
            "qkv": ((L, D, 3 * D), D**-0.5),
            "attention_out": ((L, D, D), D**-0.5),
            "router": ((L, D, E), D**-0.5),
            "up": ((L, E, D, F), D**-0.5),
            "down": ((L, E, F, D), s.expert_scale * F**-0.5),
            "head": ((D, s.tokens), s.head_scale * D**-0.5),
        }
        self.num_parameters = sum(math.prod(shape) for shape, _ in self.shapes.values())

    def initial(self, generator: torch.Generator) -> Tensor:
        """θ `[P]`, normal."""
        parts = [
            std * torch.randn(math.prod(shape), generator=generator, dtype=DTYPE)
            for shape, std in self.shapes.values()
        ]
        return torch.cat(parts)

    def unpacked(self, theta_P: Tensor) -> dict[str, Tensor]:
        sizes = [math.prod(shape) for shape, _ in self.shapes.values()]
        return {
            name: part.view(shape)
            for (name, (shape, _)), part in zip(
                self.shapes.items(), theta_P.split(sizes), strict=True
            )
        }

    def forward(
        self,
        theta_P: Tensor,
        prefixes_T: Tensor,
        *,
        noise_TLE: Tensor | None = None,
        routes_TLK: Tensor | None = None,
        bf16_router: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One model over prefixes (any leading dimensions, written here without them).

        Args:
            routes_TLK: experts to use instead of the router's choice; their gates are native.

        Returns:
            log-probs `[T, V]`, experts used `[T, L, K]`, native router log-probs `[T, L, E]`.
        """
        w = self.unpacked(theta_P)
        T, D, experts_E = self.sizes.length, self.sizes.hidden, torch.arange(self.sizes.experts)
        later_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = w["token"][prefixes_T] + w["position"]
        used, router_log_probs = [], []
        for layer in range(self.sizes.layers):
            q, k, v = (norm(x) @ w["qkv"][layer]).split(D, -1)
            scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(later_TT, -math.inf)
            x = x + scores.softmax(-1) @ v @ w["attention_out"][layer]

            h = norm(x)
            router = w["router"][layer]
            logits_TE = (
                round_bf16(round_bf16(h) @ round_bf16(router)) if bf16_router else h @ router
            )
            if noise_TLE is not None:
                logits_TE = logits_TE + noise_TLE[..., layer, :]
            if routes_TLK is None:
                chosen_TK = logits_TE.topk(self.sizes.top_k, dim=-1).indices
            else:
                chosen_TK = routes_TLK[..., layer, :]
            mask_TE = (chosen_TK[..., None] == experts_E).any(-2)
            gates_TE = logits_TE.masked_fill(~mask_TE, -math.inf).softmax(-1)
            up_TEF = torch.nn.functional.silu(torch.einsum("...d,edf->...ef", h, w["up"][layer]))
            x = x + torch.einsum("...ef,efd->...d", up_TEF * gates_TE[..., None], w["down"][layer])
            used.append(chosen_TK)
            router_log_probs.append(logits_TE.log_softmax(-1))
        log_probs_TV = (norm(x) @ w["head"]).log_softmax(-1)
        return log_probs_TV, torch.stack(used, -2), torch.stack(router_log_probs, -2)

    def outputs(
        self,
        theta_P: Tensor,
        mismatch: Mismatch | None = None,
        *,
        routes_MLK: Tensor | None = None,
    ) -> Outputs:
        """Every prefix's next-token distribution, of the trainer or of a mismatched engine."""
        mismatch = mismatch or Mismatch()
        tree = self.tree
        if mismatch.lag_P is not None:
            theta_P = theta_P - mismatch.lag_P
        noise, routes = mismatch.noise_MLE, routes_MLK
        log_probs, used, router = self.forward(
            theta_P,
            tree.prefixes_MT,
            noise_TLE=None if noise is None else noise[tree.ancestors_MT],
            routes_TLK=None if routes is None else routes[tree.ancestors_MT],
            bf16_router=mismatch.bf16_router,
        )
        last = (torch.arange(len(tree.depth_M)), tree.depth_M)
        return Outputs(
            log_probs_MV=log_probs[last], routes_MLK=used[last], router_log_probs_MLE=router[last]
        )

    def jacobian(self, theta_P: Tensor, routes_MLK: Tensor | None = None) -> Tensor:
        """∇_θ log π(token | prefix), `[M·V, P]`, of the trainer with native or given routes."""
        tree = self.tree

        def log_probs_V(theta_P, prefix_T, depth, routes_TLK):
            every_TV, _, _ = self.forward(theta_P, prefix_T, routes_TLK=routes_TLK)
            # a sum with one-hot weights: vmap cannot index differently for each element
            return ((torch.arange(tree.T) == depth)[:, None] * every_TV).sum(0)

        routes = (self.outputs(theta_P).routes_MLK if routes_MLK is None else routes_MLK)[
            tree.ancestors_MT
        ]
        per_prefix = torch.func.vmap(torch.func.jacrev(log_probs_V), in_dims=(None, 0, 0, 0))
        with torch.no_grad():
            jacobian = per_prefix(theta_P, tree.prefixes_MT, tree.depth_M, routes)
        return jacobian.flatten(0, 1)


def ascent(
    policy: Policy, theta_P: Tensor, reward_N: Tensor, *, learning_rate: float
) -> Iterator[Tensor]:
    """θ after 0, 1, 2, … Adam steps (betas .9, .99) up the exact gradient of J = Σ_y π(y)·R(y)."""
    theta_P = theta_P.clone().requires_grad_()
    adam = torch.optim.Adam([theta_P], lr=learning_rate, betas=(0.9, 0.99), maximize=True)
    while True:
        yield theta_P.detach().clone()
        adam.zero_grad()
        log_probs_MV = policy.outputs(theta_P).log_probs_MV
        (policy.tree.of_sequences(log_probs_MV).sum(-1).exp() @ reward_N).backward()
        adam.step()
