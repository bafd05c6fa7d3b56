# SPDX-License-Identifier: Apache-2.0
"""Rollouts from a Hugging Face transformers model in this process: the engine that needs no server.

N prompts, B sequences (samples of prompts), A of them unfinished, W padded prompt width,
V vocabulary, T response tokens, L MoE layers, K experts per token.
"""

import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from moe_upgrpo.errors import UserError
from moe_upgrpo.hugging_face.config import eos_ids, is_tied, read_config
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.rollout.base import (
    Rollout,
    SamplingConfig,
    broken_weights,
    check_prompts,
    check_sequences,
    routes_dtype,
)
from moe_upgrpo.rollout.checkpoint import check_weights, faults_of
from moe_upgrpo.rollout.engines import HF_SEQUENCES
from moe_upgrpo.rollout.hf_places import places, tensors_at

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def in_turn(method: Callable) -> Callable:
    """Have a method of the engine wait for those that other threads have called."""

    @wraps(method)
    def waiting(self, *arguments, **keywords):
        with self._turn:
            return method(self, *arguments, **keywords)

    return waiting


class HFEngine:
    """`Engine` on transformers' causal language models, dense or MoE.

    Log-probs are log_softmax(fp32 logits / temperature). Routes are read where they are used: the
    expert indices that each MoE layer hands to its experts. `moe_layer_ids` maps the L rows of the
    routes to the model's layers; a dense model has L = K = 0.

    Sampling is an explicit loop over a KV cache rather than `model.generate`: a prompt is computed
    once for all its samples, and finished sequences leave the batch, which makes it several times
    faster. At most `max_sequences` are in flight at once. Calls of several threads take turns, so
    that a response is of one version of the weights.

    weights="fp8" stands in for an engine that serves quantised weights: see `fp8_rounded`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str = "bfloat16",
        device: str | torch.device | None = None,
        *,
        weights: str = "as-trained",
        max_sequences: int = HF_SEQUENCES,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
        if weights not in ("as-trained", "fp8"):
            raise UserError(f"weights is {weights!r}; allowed: as-trained, fp8.")
        self.weights = weights
        if max_sequences < 1:
            raise UserError(f"max_sequences is {max_sequences}; at least 1 is needed.")
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.max_sequences = max_sequences
        self.weight_version = 0
        self._half_updated_to: int | None = None
        self._turn = threading.Lock()
        self.config = read_config(model_dir)
        if type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{model_dir} is a {self.config.model_type!r} model, which transformers has no "
                "causal language model for."
            )
        self._eos_ids = torch.tensor(eos_ids(model_dir, self.config), device=self.device)
        with Weights(model_dir, tied=is_tied(self.config)) as weights:
            self._checkpoint_shapes = weights.shapes()
            state = dict(weights.tensors())
            model, unlike = self._built(state)
            if unlike:
                raise UserError(f"{model_dir} does not fit its config.json: {unlike}.")
            self._places = places(model, state)
            del state
        converted = self._checkpoint_shapes.keys() - self._places
        self._layer_sizes = Counter(map(layer_of, converted))
        self._use(model)

    def _built(self, state: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, str]:
        """A model with these weights, and in words which of them do not match its own.

        transformers would make up missing weights, and say so among many lines.
        """
        with no_progress_bar():
            model, found = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].from_pretrained(
                None,
                config=self.config,
                state_dict=state,
                dtype=self.dtype,
                output_loading_info=True,
            )
        wrong = [
            f"{len(names)} tensor(s) {what}, for example {min(map(str, names))}"
            for what in ("missing", "unexpected", "mismatched")
            if (names := found[f"{what}_keys"])
        ]
        return model, " and ".join(wrong)

    def _use(self, model: PreTrainedModel) -> None:
        """Take `model` into use and tap the input of every module of routed experts."""
        experts = {
            name: module for name, module in model.named_modules() if name.endswith(".experts")
        }
        if not experts and getattr(self.config, "num_experts_per_tok", None):
            raise UserError(
                f"{type(model).__name__} routes each token to {self.config.num_experts_per_tok} "
                "experts but has no module named 'experts' to read them from: not supported here."
            )
        self.moe_layer_ids = tuple(
            int(next(part for part in name.split(".") if part.isdigit())) for name in experts
        )
        self.num_experts = max((module.num_experts for module in experts.values()), default=0)
        if experts:
            # The fastest on one CPU thread, and on a GPU as well.
            model.set_experts_implementation("grouped_mm")
        self._taps = {name: [] for name in experts}
        for name, module in experts.items():
            module.register_forward_pre_hook(
                lambda module, args, tap=self._taps[name]: tap.append(args[1])
            )
        # Newer transformers warn of the older name, and on each rank once a step.
        takes = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        self.model = model.to(self.device)
        self._finish_weights()

    def _finish_weights(self) -> None:
        self.model.eval().requires_grad_(False)
        if self.weights == "fp8":
            for name, weight in self.model.named_parameters():
                if is_rounded(name, weight):
                    weight.copy_(fp8_rounded(weight))

    @torch.inference_mode()
    @in_turn
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        *,
        samples_per_prompt: int,
        seed: int,
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        check_prompts(prompts, samples_per_prompt)
        self._check_whole()
        generator = torch.Generator(self.device).manual_seed(seed)
        step = max(1, self.max_sequences // samples_per_prompt)
        # The trainer's CPU backend is a torch function mode; transformers does not need it, and it
        # would take a fifth of the time.
        with torch._C.DisableTorchFunction():
            return [
                rollout
                for start in range(0, len(prompts), step)
                for rollout in self._generate_batch(
                    prompts[start : start + step], sampling, samples_per_prompt, generator
                )
            ]

    def _generate_batch(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        samples: int,
        generator: torch.Generator,
    ) -> list[Rollout]:
        cache = DynamicCache(config=self.config)
        logits_NV, routes_NWLK, lengths, mask = self._prefill(prompts, cache)
        width = routes_NWLK.shape[1]
        cache.batch_repeat_interleave(samples)
        logits_AV = logits_NV.repeat_interleave(samples, dim=0)
        if mask is not None:
            mask = mask.repeat_interleave(samples, dim=0)

        count = len(prompts) * samples
        tokens_BT = np.zeros((count, sampling.max_new_tokens), dtype=np.int64)
        logp_BT = np.zeros((count, sampling.max_new_tokens), dtype=np.float32)
        response_length_B = np.full(count, sampling.max_new_tokens)
        finished_B = np.zeros(count, dtype=bool)
        # For each step, the sequences unfinished at that time and the routes of the token fed in.
        fed: list[tuple[np.ndarray, np.ndarray]] = []
        alive_A = np.arange(count)
        for position in range(sampling.max_new_tokens):
            logp_AV = (logits_AV.float() / sampling.logp_temperature).log_softmax(dim=-1)
            token_A = self._choose(logp_AV, sampling, generator, prompts, alive_A // samples)
            tokens_BT[alive_A, position] = token_A.cpu()
            logp_BT[alive_A, position] = logp_AV.gather(1, token_A[:, None])[:, 0].cpu()
            ended_A = torch.isin(token_A, self._eos_ids)
            if ended_A.any():
                ended = alive_A[ended_A.cpu().numpy()]
                finished_B[ended] = True
                response_length_B[ended] = position + 1
                going = (~ended_A).nonzero()[:, 0]
                alive_A, token_A = alive_A[going.cpu().numpy()], token_A[going]
                if mask is not None:
                    mask = mask[going]
                if len(going):
                    cache.batch_select_indices(going)
            if not len(alive_A) or position + 1 == sampling.max_new_tokens:
                break
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits_AV, routes_A1LK = self._forward(token_A[:, None], mask, cache)
            fed.append((alive_A, routes_A1LK[:, 0]))

        routes_BSLK = np.zeros(
            (count, width + len(fed), *routes_NWLK.shape[2:]), dtype=routes_NWLK.dtype
        )
        routes_BSLK[:, :width] = routes_NWLK.repeat(samples, axis=0)
        for position, (alive_A, routes_ALK) in enumerate(fed):
            routes_BSLK[alive_A, width + position] = routes_ALK
        return [
            Rollout(
                prompt_ids=np.asarray(prompts[b // samples]),
                response_ids=tokens_BT[b, :length],
                logp_rollout=logp_BT[b, :length],
                routes=routes_BSLK[b, width - lengths[b // samples] : width + length - 1],
                weight_version=self.weight_version,
                finished=bool(finished_B[b]),
            )
            for b, length in enumerate(response_length_B)
        ]

    @torch.inference_mode()
    @in_turn
    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine.routes`."""
        check_sequences(sequences)
        self._check_whole()
        found = []
        for start in range(0, len(sequences), self.max_sequences):
            batch = sequences[start : start + self.max_sequences]
            _, routes_NWLK, lengths, _ = self._prefill(batch, DynamicCache(config=self.config))
            found += [r[-n:-1] for r, n in zip(routes_NWLK, lengths, strict=True)]
        return found

    @torch.inference_mode()
    @in_turn
    def score(
        self,
        sequences: Sequence[np.ndarray],
        *,
        temperature: float = 1.0,
        at_once: int | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Log-probs `[S-1]` of the tokens of whole sequences `[S]`, and their routes `[S-1, L, K]`.

        As in `routes`, each sequence in one pass and nothing from a cache. at_once: sequences in a
        batch, at most `max_sequences`.
        """
        check_sequences(sequences)
        self._check_whole()
        found, size = [], min(at_once or self.max_sequences, self.max_sequences)
        for start in range(0, len(sequences), size):
            batch = sequences[start : start + size]
            cache = DynamicCache(config=self.config)
            with torch._C.DisableTorchFunction():  # as in `generate`
                logits_NWV, routes_NWLK, _, _ = self._prefill(batch, cache, keep=0)
            for logits_WV, routes_WLK, tokens in zip(logits_NWV, routes_NWLK, batch, strict=True):
                logp_XV = (logits_WV[-len(tokens) : -1].float() / temperature).log_softmax(dim=-1)
                targets_X1 = torch.from_numpy(np.asarray(tokens[1:], np.int64))[:, None]
                logp_X = logp_XV.gather(1, targets_X1.to(logp_XV.device))[:, 0]
                found.append((logp_X.cpu().numpy(), routes_WLK[-len(tokens) : -1]))
        return found

    def _prefill(
        self, sequences: Sequence[np.ndarray], cache: DynamicCache, keep: int = 1
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, torch.Tensor | None]:
        """Run `_forward` on whole sequences padded on the left; adds their lengths and mask.

        keep: 0 for the logits of all positions, `[N, W, V]`.
        """
        lengths = np.array([len(sequence) for sequence in sequences])
        width = int(lengths.max())
        real_NW = np.arange(width) >= width - lengths[:, None]
        ids_NW = np.zeros((len(sequences), width), dtype=np.int64)
        ids_NW[real_NW] = np.concatenate(sequences)
        # Without padding the mask is left out: transformers' causal path is then faster.
        mask = None if real_NW.all() else torch.from_numpy(real_NW).to(self.device).long()
        logits, routes_NWLK = self._forward(torch.from_numpy(ids_NW), mask, cache, keep)
        return logits, routes_NWLK, lengths, mask

    def _choose(
        self,
        logp_AV: torch.Tensor,
        sampling: SamplingConfig,
        generator: torch.Generator,
        prompts: Sequence[np.ndarray],
        prompt_A: np.ndarray,
    ) -> torch.Tensor:
        broken_A = logp_AV.isnan().any(dim=-1)
        if broken_A.any():
            prompt = prompts[prompt_A[int(broken_A.nonzero()[0, 0])]]
            raise broken_weights(self.weight_version)(
                f"The log-probs of the sequence with prompt {prompt.tolist()} are not finite: "
                f"look for non-finite weights (weight version {self.weight_version})."
            )
        if sampling.temperature == 0:
            return logp_AV.argmax(dim=-1)
        return torch.multinomial(logp_AV.exp(), 1, generator=generator)[:, 0]

    def _forward(
        self, ids_AX: torch.Tensor, mask: torch.Tensor | None, cache: DynamicCache, keep: int = 1
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Logits of the last position `[A, V]` and the routes of every token fed in `[A, X, L, K]`.

        `mask` covers the cached positions and the X new ones. keep=0: the logits `[A, X, V]` of all
        positions.
        """
        for tap in self._taps.values():
            tap.clear()
        new = ids_AX.shape[1]
        positions = None
        if mask is not None:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new:]
        logits = self.model(
            input_ids=ids_AX.to(self.device),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_argument: cache},
        ).logits
        return logits[:, -1] if keep else logits, self._read_taps(*ids_AX.shape)

    def _read_taps(self, sequences: int, tokens: int) -> np.ndarray:
        """The routes in the taps after one forward, as `[sequences, tokens, L, K]`."""
        for name, tap in self._taps.items():
            if len(tap) != 1 or tap[0].ndim != 2 or len(tap[0]) != sequences * tokens:
                raise RuntimeError(
                    f"{name} handed over expert indices of shapes {[tuple(t.shape) for t in tap]} "
                    f"in one forward; once [{sequences * tokens}, K] was expected. The routes of "
                    f"{type(self.model).__name__} cannot be read by this engine."
                )
        if not self._taps:
            return np.zeros((sequences, tokens, 0, 0), dtype=routes_dtype(0))
        routes = torch.stack([tap[0] for tap in self._taps.values()], dim=1)
        routes = routes.cpu().numpy().astype(routes_dtype(self.num_experts))
        return routes.reshape(sequences, tokens, *routes.shape[1:])

    @in_turn
    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """See `Engine.update_weights`: each tensor in the place of the old one.

        Those whose place is not known go through transformers' conversion, layer by layer, so that
        at most three layers are held beside the model. After an update that was refused or broke
        off nothing is sampled until another one is whole.
        """
        self._half_updated_to = version
        own = tensors_at(self.model, self._places)
        given: dict[str, torch.Tensor] = {}
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in named_tensors:  # a collective: to its end, whatever is refused
            given[name] = tensor.detach().to("meta")
            if faults_of({name: given[name]}, self._checkpoint_shapes):
                continue
            if name in own:
                own[name].copy_(tensor.detach())
                continue
            # Cloned: transformers keeps tensors that need no conversion, and an optimizer step on
            # them would change the engine's weights behind its back.
            layer = held.setdefault(layer_of(name), {})
            layer[name] = tensor.detach().clone()
            if len(layer) == self._layer_sizes[layer_of(name)]:
                self._put(held.pop(layer_of(name)))
        check_weights(given, self._checkpoint_shapes, held=None)
        self.model.tie_weights()
        self._finish_weights()
        self.weight_version, self._half_updated_to = version, None

    def _put(self, state: dict[str, torch.Tensor]) -> None:
        """Load the weights of one layer, as transformers loads a checkpoint of them alone."""
        load = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": self.device},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        with no_progress_bar():
            found, _ = convert_and_load_state_dict_in_model(self.model, state, load)
        if found.unexpected_keys or found.mismatched_keys or found.conversion_errors:
            raise RuntimeError(f"transformers did not load these weights: {found}")

    def _check_whole(self) -> None:
        if self._half_updated_to is not None:
            raise UserError(
                f"The update to weight version {self._half_updated_to} failed half-way: the "
                "engine's weights are of no version. Update them again."
            )

    def close(self) -> None:
        """See `Engine.close`."""
        self._taps.clear()
        self.model = None


def layer_of(name: str) -> str:
    """The part of a tensor's name that all tensors of its layer share; else the whole name."""
    match = re.match(r".*?\d+\.", name)
    return match[0] if match else name


# Left unrounded by published FP8 recipes: the router, a shared expert's gate, the embedding, the
# head and the norms' vectors.
_KEPT = ("embed_tokens", "lm_head", "mlp.gate.weight", "shared_expert_gate", "norm")


def is_rounded(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight of a transformers model is one that FP8 engines round."""
    return weight.ndim >= 2 and not any(kept in name for kept in _KEPT)


def fp8_rounded(weight: torch.Tensor) -> torch.Tensor:
    """The weight rounded to e4m3 with one scale for each matrix, in its own dtype.

    s = max|w| / 448; w' = e4m3(w / s) · s, where 448 is the largest e4m3 number; each matrix of
    stacked experts `[E, ...]` has its own scale. Activations stay as they are.
    """
    scale = weight.float().abs().amax(dim=(-2, -1), keepdim=True) / 448
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return ((weight.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


@contextmanager
def no_progress_bar():
    """Hide the progress bars that transformers draws for every load and save."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
