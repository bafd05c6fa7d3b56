"""Behaviour of the vLLM that this process imports, where each patch acts: a check for each.

    PYTHONPATH=DIR:. python -m tests.engines.vllm_behaviour FOLDER

DIR: a copy of vLLM, patched or not. Prints JSON: for each check its error, or null. Plugins are
off, ours that mends the same at run time included.
"""

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "VLLM_PLUGINS": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
}

import numpy as np
import torch
import vllm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tests.engines.trainer import MOE, prompts, saved, weights_of

CHUNK = 48
PROMPTS = [{"prompt_token_ids": ids.tolist()} for ids in prompts(3, 40, 70)]  # 70: two chunks


def start(folder: Path, routed_experts: bool) -> vllm.LLM:
    return vllm.LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        logprobs_mode="processed_logprobs",
        enable_return_routed_experts=routed_experts,
        use_tqdm_on_load=False,
        seed=0,
    )


def generate(llm: vllm.LLM, **sampling) -> list:
    sampling = vllm.SamplingParams(max_tokens=8, logprobs=0, ignore_eos=True, **sampling)
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def log_probs(outputs: list) -> np.ndarray:
    return np.array([next(iter(t.values())).logprob for out in outputs for t in out.logprobs])


def amx_permission(llm, folder):
    """Where vLLM takes the AMX kernels, Linux has been asked: what it grants this process."""
    if _get_attn_isa(torch.bfloat16, 32, 64) == "amx":
        granted = ctypes.c_uint64()
        arch_prctl, get_permission, tile_data = 158, 0x1022, 18
        ctypes.CDLL(None).syscall(arch_prctl, get_permission, ctypes.byref(granted))
        assert granted.value >> tile_data & 1, "AMX kernels without permission for AMX"


def routed_experts(llm, folder):
    """Each row has the experts that transformers chooses there."""
    assert llm.llm_engine.vllm_config.aux_output_config.enabled, "refused"
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, out in zip(PROMPTS, generate(llm, temperature=0), strict=True):
        tokens = torch.tensor([prompt["prompt_token_ids"] + list(out.token_ids)])
        with torch.no_grad():
            logits = model(input_ids=tokens, output_router_logits=True).router_logits
        expected = torch.stack([layer.topk(2).indices.sort().values for layer in logits], dim=1)
        np.testing.assert_array_equal(np.sort(out.routed_experts), expected[:-1].numpy())


def experts_prepacked_on_reload(llm, folder):
    """Reloading the weights that are there changes nothing."""
    before = generate(llm, temperature=0)
    llm.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": iter(weights_of(folder).items())}
    )
    llm.reset_prefix_cache()
    np.testing.assert_array_equal(log_probs(before), log_probs(generate(llm, temperature=0)))


def seeded_chunked_prefill(llm, folder):
    """The same tokens as where the prompt's head is cached and the rest is one chunk."""
    llm.reset_prefix_cache()
    chunked = generate(llm, temperature=1, seed=7)
    again = generate(llm, temperature=1, seed=7)
    assert [list(o.token_ids) for o in chunked] == [list(o.token_ids) for o in again]


def error_of(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except Exception:
        return traceback.format_exc()
    return None


def main():
    # Before torch or oneDNN multiply matrices, which also ask for AMX.
    found = {"amx_permission": error_of(amx_permission, None, None)}
    folder = saved(Path(sys.argv[1]) / "checkpoint", Qwen3MoeConfig(**MOE))
    try:
        llm, refused = start(folder, routed_experts=True), None
    except ValueError:
        refused = traceback.format_exc()
        llm = start(folder, routed_experts=False)
    found["routed_experts"] = refused or error_of(routed_experts, llm, folder)
    found["experts_prepacked_on_reload"] = error_of(experts_prepacked_on_reload, llm, folder)
    # Last: where it fails the engine is at an end.
    found["seeded_chunked_prefill"] = error_of(seeded_chunked_prefill, llm, folder)
    print(json.dumps({"vllm": vllm.__file__, "checks": found}), flush=True)
    os._exit(0)  # an engine that failed hangs in its shutdown


if __name__ == "__main__":
    main()
