"""Which rank holds which part of the model, and what divides into what. Imports no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from moe_upgrpo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel groups; data parallelism is what the other sizes leave of the ranks.

    tp: tensor parallelism of everything but the experts, with sequence parallelism where tp > 1.
    ep: expert parallelism, by all-to-all.
    etp: tensor parallelism inside an expert. None means 1 with ep > 1, and tp with ep = 1.
    """

    tp: int = 1
    ep: int = 1
    etp: int | None = None

    def __post_init__(self):
        for name in ("tp", "ep", "etp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: a parallel size is at least 1.")
        if self.ep == 1 and self.expert_tp != self.tp:
            # Megatron-Core marks expert weights as expert-parallel only where ep > 1
            # (tensor_parallel/layers.py:886). Otherwise their gradients are reduced over the
            # data-parallel ranks alone although they are replicated over the tp ranks too.
            raise UserError(
                f"ep=1 with etp={self.etp} and tp={self.tp}: in this layout Megatron-Core 0.16.1 "
                "leaves the experts' gradients unreduced over the tensor-parallel ranks and trains "
                f"wrongly without an error. Use etp={self.tp} (the default) or ep > 1."
            )

        if self.ep > 1 and self.expert_tp > 1:
            raise UserError(
                f"ep={self.ep} with etp={self.etp}: both above 1 is not supported; Megatron-Core's "
                "all-to-all then gathers shards of different sizes, which gloo refuses. Use etp=1."
            )

    @property
    def expert_tp(self) -> int:
        return self.etp if self.etp is not None else (1 if self.ep > 1 else self.tp)

    @classmethod
    def for_world(
        cls,
        world_size: int,
        *,
        tp: int | None = None,
        ep: int | None = None,
        etp: int | None = None,
    ) -> Layout:
        """Sizes not given: 2 on an even number of ranks, else 1."""
        default = 2 if world_size % 2 == 0 else 1
        return cls(tp=default if tp is None else tp, ep=default if ep is None else ep, etp=etp)

    def check_world(self, world_size: int) -> None:
        """Raise UserError where the ranks do not divide into the groups."""
        for name, size in (("tp", self.tp), ("ep*etp", self.ep * self.expert_tp)):
            if world_size % size:
                raise UserError(
                    f"{name}={size} does not divide the {world_size} rank(s) of this job. Start it "
                    f"with a multiple of {size} ranks (torchrun --nproc-per-node) or lower {name}."
                )

    def check_model(self, model) -> None:
        """Raise UserError where the Hugging Face config `model` does not divide into the layout."""
        sizes = (
            ("tp", self.tp, ("num_attention_heads", "num_key_value_heads", "vocab_size")),
            ("ep", self.ep, ("num_experts",)),
            ("etp", self.expert_tp, ("moe_intermediate_size",)),
        )
        for name, size, fields in sizes:
            for field in fields:
                value = getattr(model, field)
                if value % size:
                    raise UserError(
                        f"{name}={size} does not divide the model's {field}={value}. Choose {name} "
                        f"among the divisors of {value}."
                    )

    def __str__(self) -> str:
        etp = f"·ETP{self.etp}" if self.etp is not None else ""
        return f"TP{self.tp}·EP{self.ep}{etp}"
