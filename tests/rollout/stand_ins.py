"""Stand-ins of engine servers that answer as vLLM 0.32 and SGLang 0.5.23 do.

They sample tokens that follow from a request's seed alone, with routes of zeros. The real servers
are in tests/engines.
"""

import base64
import io
import json
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from moe_upgrpo.rollout.digest import Digest
from moe_upgrpo.rollout.handover import digest_of
from moe_upgrpo.rollout.weight_group import received
from tests.rollout.local_server import serving

KEY = "the-key"
VOCABULARY = 60


@contextmanager
def server(answer, key=KEY):
    """The URL of a server whose `answer(path, body)` is JSON, and the paths and keys asked.

    None for an answer: the connection is closed.
    """
    asked = []

    def reply(request, body):
        path, given = request.path.partition("?")[0], request.headers.get("Authorization")
        asked.append((path, given))
        if given != f"Bearer {key}":
            return 401, b'{"error": "Unauthorized"}'
        said = answer(path, json.loads(body or b"{}"))
        return None if said is None else (200, json.dumps(said).encode())

    with serving(reply) as url:
        yield url, asked


def tokens_of(seed, count):
    return [seed // 7**i % VOCABULARY for i in range(count)]


def vllm(model_dir, state=None):
    """vLLM's answers; it holds the weights that it is told to.

    state: what a test may read and change: `version`, `digests` of the weights that it took.
    """
    state = {} if state is None else state
    state |= {"version": "", "digests": []}
    settings = {
        "model_config": {
            "dtype": "torch.float32",
            "quantization": None,
            "logprobs_mode": "processed_logprobs",
            "max_model_len": 64,
        },
        "aux_output_config": {"enable_return_routed_experts": True},
        "device_config": {"device": "cuda"},
        "parallel_config": {"world_size": 1},
    }

    def taken(method, weights_path=None, **where):
        if method == "take_files":
            return digest_of(Path(weights_path))
        assert method == "take_stream"
        digest = Digest()
        for _, tensor in digest.through(received(1, **where)):
            if not state.get("goes on", lambda tensor: True)(tensor):
                raise ConnectionAbortedError
        return digest.value()

    def generated(body):
        given = body["sampling_params"]
        tokens = tokens_of(given.get("seed", 0), given["max_tokens"])
        file = io.BytesIO()
        np.save(file, np.zeros((len(body["token_ids"]) + len(tokens) - 1, 2, 2), np.uint8))
        choice = {
            "finish_reason": "length",
            "token_ids": tokens,
            "weight_versions": [{"version": state["version"]}],
            "logprobs": {"content": [{"token_id": t, "logprob": -1.0} for t in tokens]},
            "routed_experts": base64.b64encode(file.getvalue()).decode(),
        }
        return {"choices": [choice]}

    def answer(path, body):
        if path == "/update_weight_version":
            state["version"] = body["new_version"]
        if path == "/collective_rpc" and body["method"] != "reload_weights":
            state["digests"].append(taken(body["method"], **body["kwargs"]))
        return {
            "/collective_rpc": lambda: {"results": [state.get("says", state["digests"][-1])]},
            "/server_info": lambda: {"vllm_config": settings},
            "/v1/models": lambda: {"data": [{"id": str(model_dir), "root": str(model_dir)}]},
            "/version": lambda: {"version": "0.32.0"},
            "/weight_info": lambda: {"weight_version": state["version"]},
            "/reset_prefix_cache": lambda: {"success": True},
            "/inference/v1/generate": lambda: generated(body),
        }.get(path, dict)()

    return answer


def entered(body):
    """The group of SGLang's `init_custom_process_group`, as the server's rank."""
    limit = timedelta(seconds=20)
    address, port = body["master_address"], body["master_port"]
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=limit)
    for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
        store = torch.distributed.PrefixStore(prefix, store)
    return torch.distributed.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], limit)


def sglang(model_dir, state=None):
    """SGLang's answers; `state` as of `vllm`."""
    state = {} if state is None else state
    state |= {"version": "of-others", "digests": []}

    def generated(body):
        items = []
        for prompt, sampling in zip(body["input_ids"], body["sampling_params"], strict=True):
            tokens = tokens_of(sampling.get("sampling_seed", 0), sampling["max_new_tokens"])
            routes = np.zeros((len(prompt) + len(tokens) - 1, 2, 2), "<i4").tobytes()
            meta = {
                "finish_reason": {"type": "length"},
                "cached_tokens": 0,
                "weight_version": state["version"],
                "weight_versions": [{"version": state["version"]}],
                "output_token_logprobs": [[-1.0, token, None] for token in tokens],
                "routed_experts": base64.b64encode(routes).decode(),
            }
            items.append({"output_ids": tokens, "meta_info": meta})
        return items

    def answer(path, body):
        if path == "/update_weights_from_disk":
            state["version"] = body["weight_version"]
            state["digests"].append(digest_of(Path(body["model_path"])))
        if path == "/init_weights_update_group":
            state["group"] = entered(body)
        if path == "/begin_weight_update":
            state["sent"] = Digest()
        if path == "/update_weights_from_distributed":
            for name, dtype, shape in zip(
                body["names"], body["dtypes"], body["shapes"], strict=True
            ):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                state["group"].broadcast(tensor, 0).wait()
                state["sent"].add(name, tensor)
            state["version"] = body["weight_version"] or state["version"]
        if path == "/end_weight_update":
            state["digests"].append(state["sent"].value())
        return {
            "/weights_checker": lambda: {
                "per_engine_checksum": state.get("says", state["digests"][-1])
            },
            "/server_info": lambda: {"tp_size": 1},
            "/generate": lambda: generated(body),
            "/model_info": lambda: {"weight_version": state["version"]},
        }.get(path, dict)()

    return answer
