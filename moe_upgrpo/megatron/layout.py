# SPDX-License-Identifier: Apache-2.0
"""The layout of the model on ranks, and which sizes must divide which. Imports no Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import releases
from moe_upgrpo.megatron.families import family, moe_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Dispatcher = Literal["alltoall", "allgather"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel groups; the ranks over the other sizes are data-parallel.

    tp: tensor parallelism of everything but the experts, with sequence parallelism where tp > 1.
    cp: context parallelism, parts of each sequence; experts see the parts' tokens as those of other
        data-parallel ranks.
    ep: expert parallelism.
    etp: tensor parallelism inside an expert. None means 1 with ep > 1, and tp with ep = 1.
    pp: pipeline stages, each an equal share of the layers.
    vpp: chunks of layers on each pipeline stage, run interleaved.
    dispatcher: how tokens get to their experts. alltoall sends each token to its experts' ranks;
        allgather sends all tokens to every expert rank, which sums its own experts' outputs.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    pp: int = 1
    vpp: int = 1
    dispatcher: Dispatcher = "alltoall"

    def __post_init__(self):
        for name in ("tp", "cp", "ep", "etp", "pp", "vpp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: a parallel size is at least 1.")
        if self.dispatcher not in get_args(Dispatcher):
            raise UserError(
                f"dispatcher={self.dispatcher!r}: use one of {', '.join(get_args(Dispatcher))}."
            )
        if self.ep == 1 and self.expert_tp != self.tp and not releases.reduces_expert_gradients():
            raise UserError(
                f"ep=1 with etp={self.etp} and tp={self.tp}: in this layout Megatron-Core "
                f"{releases.installed()} leaves the experts' gradients unreduced over the "
                "tensor-parallel ranks and trains wrongly without an error; 0.19 does not. Use "
                f"etp={self.tp} (the default), ep > 1, or megatron-core 0.19 (Python 3.12)."
            )
        if self.ep > 1 and self.expert_tp > 1 and self.dispatcher == "alltoall":
            raise UserError(
                f"ep={self.ep} with etp={self.etp}: both above 1 is not supported by "
                "dispatcher='alltoall'; Megatron-Core's all-to-all then gathers shards of "
                "different sizes, which gloo refuses. Use etp=1, or dispatcher='allgather'."
            )
        if self.vpp > 1 and self.pp == 1:
            raise UserError(
                f"vpp={self.vpp} with pp=1: virtual pipeline stages interleave real ones. Use "
                "pp > 1, or leave vpp at 1."
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
        cp: int = 1,
        ep: int | None = None,
        etp: int | None = None,
        pp: int = 1,
        vpp: int = 1,
        dispatcher: Dispatcher = "alltoall",
    ) -> Layout:
        """Make a layout for `world_size` ranks. A size that is None becomes 2 where each pipeline
        stage, and each part of the sequences, has an even number of ranks, else 1."""
        default = 2 if world_size // max(pp * cp, 1) % 2 == 0 else 1
        return cls(
            tp=default if tp is None else tp,
            cp=cp,
            ep=default if ep is None else ep,
            etp=etp,
            pp=pp,
            vpp=vpp,
            dispatcher=dispatcher,
        )

    def check_world(self, world_size: int) -> None:
        """Raise UserError where the ranks do not divide into the groups."""
        by_pp = "*pp" if self.pp > 1 else ""
        dense = ("tp*cp", self.tp * self.cp) if self.cp > 1 else ("tp", self.tp)
        for name, size in (dense, ("ep*etp", self.ep * self.expert_tp)):
            if world_size % (size * self.pp):
                raise UserError(
                    f"{name}{by_pp}={size * self.pp} does not divide the {world_size} rank(s) of "
                    f"this job. Start it with a multiple of {size * self.pp} ranks (torchrun "
                    f"--nproc-per-node) or lower {name}{' or pp' if by_pp else ''}."
                )

    def check_packing(self) -> None:
        """Raise UserError where sequences cannot be packed (`moe_upgrpo.megatron.packing`)."""
        if self.cp > 1:
            raise UserError(
                f"--packing with --cp {self.cp}: context parallelism takes padded sequences. Leave "
                "one out; --micro-batch-tokens pads little."
            )

    def data_parallel(self, world_size: int) -> int:
        """Copies of the model on `world_size` ranks."""
        return world_size // (self.tp * self.cp * self.pp)

    def check_model(self, hf: PretrainedConfig) -> None:
        """Raise UserError where the model does not divide into the layout."""
        of_family, experts = family(hf), moe_layers(hf)
        sizes = [
            ("tp", self.tp, of_family.tp_sizes),
            ("pp*vpp", self.pp * self.vpp, ("num_hidden_layers",)),
        ]
        if experts:
            sizes.append(("ep", self.ep, (of_family.experts,)))
            sizes.append(("etp", self.expert_tp, (of_family.expert_size,)))
        elif self.ep > 1:
            raise UserError(
                f"ep={self.ep} for a model of type {hf.model_type!r} without experts: use ep=1."
            )
        if len(experts) < hf.num_hidden_layers:
            sizes.append(("tp", self.tp, ("intermediate_size",)))
        for name, size, fields in sizes:
            for field in fields:
                value = getattr(hf, field)
                if value % size:
                    raise UserError(
                        f"{name}={size} does not divide the model's {field}={value}. Choose {name} "
                        f"among the divisors of {value}."
                    )

    def __str__(self) -> str:
        cp = f"·CP{self.cp}" if self.cp > 1 else ""
        etp = f"·ETP{self.etp}" if self.etp is not None else ""
        pp = f"·PP{self.pp}" if self.pp > 1 else ""
        vpp = f"·VPP{self.vpp}" if self.vpp > 1 else ""
        dispatcher = f"·{self.dispatcher}" if self.dispatcher != "alltoall" else ""
        return f"TP{self.tp}{cp}·EP{self.ep}{etp}{pp}{vpp}{dispatcher}"
