"""The engines by name; each engine's module is imported only when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_upgrpo.errors import UserError

if TYPE_CHECKING:
    import torch

    from moe_upgrpo.rollout.base import Engine

EngineName = Literal["hf", "vllm", "sglang"]
EngineWeights = Literal["as-trained", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VLLMSettings:
    """Settings of vLLM in process."""

    sequences: int = 256
    """Most sequences in flight."""
    kv_cache_gib: float = 0.25
    """Memory for their keys and values, in each rank."""

    def __post_init__(self):
        if self.sequences < 1:
            raise UserError(f"vllm.sequences={self.sequences}: at least 1 is needed.")
        if self.kv_cache_gib <= 0:
            raise UserError(f"vllm.kv_cache_gib={self.kv_cache_gib}: above 0 is needed.")


def make_engine(
    name: EngineName,
    model_dir: str | Path,
    *,
    dtype: str,
    weights: EngineWeights = "as-trained",
    device: torch.device,
    max_tokens: int,
    seed: int = 0,
    url: str | None = None,
    vllm: VLLMSettings | None = None,
    server_log: str | Path | None = None,
) -> Engine:
    """The engine `name` on a checkpoint; a collective of all ranks of the job.

    hf, and vllm without `url`: one in each rank. Otherwise one server for all: that at `url`, or
    one of SGLang that rank 0 starts, whose output goes to `server_log`. `max_tokens`: of the
    longest sequence, prompt and response together. `weights`: hf alone rounds them.
    """
    if weights != "as-trained" and name != "hf":
        raise UserError(f"engine_weights={weights!r} with engine={name}: allowed with engine=hf.")
    if url is not None and name == "hf":
        raise UserError(f"engine_url={url} with engine=hf: only vllm and sglang have servers.")
    if name == "sglang":
        from moe_upgrpo.rollout.sglang import SGLangEngine

        return SGLangEngine.shared(model_dir, dtype, url=url, log=server_log)
    if name == "vllm" and url is not None:
        from moe_upgrpo.rollout.vllm_server import VLLMServerEngine

        return VLLMServerEngine(model_dir, url, dtype)
    if name == "vllm":
        from moe_upgrpo.rollout.vllm import VLLMEngine

        vllm = vllm or VLLMSettings()
        return VLLMEngine(
            model_dir,
            dtype,
            max_model_len=max_tokens,
            max_num_seqs=vllm.sequences,
            memory_bytes=int(vllm.kv_cache_gib * 2**30),
            seed=seed,
        )
    from moe_upgrpo.rollout.hf import HFEngine

    return HFEngine(model_dir, dtype=dtype, device=device, weights=weights)
