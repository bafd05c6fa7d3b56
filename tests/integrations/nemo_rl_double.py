"""NeMo-RL without a checkout: modules made of hooks.json, with bodies of ours that do little.

Every function that the integration hooks into has the file, the name and the signature that
hooks.json keeps of a revision, so that a call which does not fit them fails here, too. The worker
trains a GPTModel of ours in one process, without packing and without replay; what NeMo-RL's own
code does is seen in test_nemo_rl.py, with a checkout.
"""

import enum
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from moe_upgrpo.integrations import hooks
from tests.integrations.stand_ins import module_named, module_of, put

WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker"
OURS = "moe_upgrpo.integrations.nemo_rl"


@contextmanager
def installed(revision: str, root: Path) -> Iterator[None]:
    """Inside, `nemo_rl` is the double of a revision, whose files would lie below `root`."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_nemo_rl(name)}
    try:
        _make(revision, root)
        yield
    finally:
        for name in [name for name in sys.modules if _of_nemo_rl(name)]:
            del sys.modules[name]
        sys.modules.update(kept)
        parent = sys.modules["moe_upgrpo.integrations"]
        for name in ("nemo_rl", "nemo_rl_loss", "nemo_rl_worker"):
            if f"{parent.__name__}.{name}" in kept:
                setattr(parent, name, kept[f"{parent.__name__}.{name}"])
            elif hasattr(parent, name):
                delattr(parent, name)


def _of_nemo_rl(name: str) -> bool:
    return name.split(".")[0] == "nemo_rl" or name.startswith(OURS)


def _make(revision: str, root: Path) -> None:
    """Put the modules into sys.modules. The bodies also get the names of their function's module,
    where the integration replaces some."""
    module = module_named
    for hook, about in hooks.read()["nemo-rl"][revision].items():
        file, name = hook.split(":")
        names = vars(module_of(file))
        put(module_of(file), name, about["signature"], partial(BODIES[name], names), names)
    module("nemo_rl").__file__ = str(root / "nemo_rl" / "__init__.py")
    module("nemo_rl.package_info").__version__ = revision
    interfaces = module("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType = enum.Enum(
        "LossType", ["TOKEN_LEVEL", "SEQUENCE_LEVEL"], module=interfaces.__name__
    )
    if splits(revision):
        interfaces.MetricNormalizer = enum.Enum(
            "MetricNormalizer", ["TOKENS", "SEQUENCES", "NONE"], module=interfaces.__name__
        )
    functions = module("nemo_rl.algorithms.loss.loss_functions")
    functions.ClippedPGLossConfig = Config
    package = module("nemo_rl.algorithms.loss")
    package.ClippedPGLossConfig, package.ClippedPGLossFn = Config, functions.ClippedPGLossFn
    module(WORKER).megatron_forward_backward = module(
        "nemo_rl.models.megatron.train"
    ).megatron_forward_backward


def write_worker(root: Path, *, patched: bool) -> None:
    """Write the file of the double's worker, as much of it as says whether it is patched."""
    from moe_upgrpo.integrations.nemo_rl import start

    file = root / "nemo_rl" / start.WORKER
    file.parent.mkdir(parents=True, exist_ok=True)
    line = f"from {start.PATCHED} import logged" if patched else "import torch"
    file.write_text(f"{line}\n", encoding="utf-8")


def splits(revision: str) -> bool:
    """Whether the revision has the single controller's training step."""
    return any("begin_train_step" in hook for hook in hooks.read()["nemo-rl"][revision])


# --- the bodies


@dataclass
class Config:
    """The fields of NeMo-RL's loss config that are looked at, with its defaults."""

    moe_upgrpo: dict | None = None
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    token_level_loss: bool = True
    reference_policy_kl_penalty: float = 0.0
    positive_example_nll_weight: float = 0.0
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    disable_ppo_ratio: bool = False
    sequence_level_importance_ratios: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    others: dict = field(default_factory=dict)

    def model_copy(self, update: dict):
        return replace(self, **update)


class Batch(dict):
    """As much of a BatchedDataDict as the double's worker takes."""

    @property
    def size(self) -> int:
        return len(self["input_ids"])

    def part(self, start: int, end: int) -> "Batch":
        return Batch({name: column[start:end] for name, column in self.items()})


def make_loss(names, self, cfg, use_fused_linear_logprobs=False):
    interfaces = sys.modules["nemo_rl.algorithms.loss.interfaces"]
    vars(self).update(vars(cfg))
    kinds = interfaces.LossType
    self.loss_type = kinds.TOKEN_LEVEL if cfg.token_level_loss else kinds.SEQUENCE_LEVEL
    self.metric_normalizations = {}


def clipped_loss(names, self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
    """PPO's clip, averaged over tokens, and a penalty that is half the squared distance."""
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    ratio = (next_token_logprobs - data["prev_logprobs"][:, 1:]).exp()
    clipped = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
    advantages = data["advantages"][:, 1:]
    of_token = torch.maximum(-advantages * ratio, -advantages * clipped)
    distance = next_token_logprobs - data["reference_policy_logprobs"][:, 1:]
    of_token = of_token + self.reference_policy_kl_penalty * distance.square() / 2
    loss = (of_token * mask).sum() / global_valid_toks
    return loss, {"loss": loss.item()}


def forward_backward(names, model, data_iterator, post_processing_fn, forward_only=False, **_):
    found = []
    for batch in data_iterator:
        ids = batch.data_dict["input_ids"]
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        with torch.set_grad_enabled(not forward_only):
            logits = model(ids, positions, None).float()
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            loss, output = post_processing_fn(logprobs, batch.data_dict)
        if not forward_only:
            loss.backward()
        found.append(output)
    return found


def make_worker(names, self, config, weights_path, **_):
    from moe_upgrpo.megatron import model
    from moe_upgrpo.megatron.families import read_model_config
    from moe_upgrpo.megatron.layout import Layout
    from tests.integrations.local_gpt import loaded

    self.cfg, self.dp_size = config, 1
    self._router_replay_enabled = bool((config.get("router_replay") or {}).get("enabled"))
    self.delegate_pack_to_model, self.draft_model = "packs" in config, None
    hf = read_model_config(Path(weights_path))
    settings = model.transformer_config(hf, Layout(), torch.float32)
    self.model = loaded(settings, hf, weights_path)
    self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)


def _micro_batches(data: Batch) -> Iterator[SimpleNamespace]:
    for start in range(0, data.size, 2):
        yield SimpleNamespace(data_dict=data.part(start, start + 2), cu_seqlens_padded=None)


def _run(names, self, data, post_processing_fn, forward_only):
    return names["megatron_forward_backward"](
        model=self.model,
        data_iterator=_micro_batches(data),
        num_microbatches=data.size // 2,
        seq_length=data["input_ids"].shape[1],
        mbs=2,
        post_processing_fn=post_processing_fn,
        forward_only=forward_only,
    )


def worker_logprobs(names, self, data, micro_batch_size=None, require_router_replay=True):
    parts = _run(names, self, data, lambda logprobs, _: (None, logprobs), True)
    logprobs = torch.cat(parts)
    return {"logprobs": torch.cat([torch.zeros(len(logprobs), 1), logprobs], dim=1)}


def _learn(names, self, data, loss_fn, seqs, toks) -> list[dict]:
    def loss(logprobs, batch):
        return loss_fn(logprobs, batch, torch.tensor(seqs), torch.tensor(toks))

    return _run(names, self, data, loss, False)


def _counted(data: Batch) -> tuple[float, float]:
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    return float(data["sample_mask"].sum()), float(mask.sum())


def worker_train(names, self, data, loss_fn, eval_mode, gbs, **_):
    for start in range(0, data.size, gbs):
        self.optimizer.zero_grad()
        batch = data.part(start, start + gbs)
        _learn(names, self, batch, loss_fn, *_counted(batch))
        self.optimizer.step()
    return {"all_mb_metrics": defaultdict(list)}


def worker_begin(names, self, loss_fn, **_):
    self.step = SimpleNamespace(loss_fn=loss_fn, counted=torch.zeros(2, dtype=torch.float64))
    self.optimizer.zero_grad()


def worker_chunk(names, self, data):
    self.step.counted += torch.tensor(_counted(data), dtype=torch.float64)
    _learn(names, self, data, self.step.loss_fn, 1.0, 1.0)


def worker_finish(names, self):
    interfaces = sys.modules["nemo_rl.algorithms.loss.interfaces"]
    by_token = self.step.loss_fn.loss_type == interfaces.LossType.TOKEN_LEVEL
    for parameter in self.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= self.step.counted[1 if by_token else 0].item()
    self.optimizer.step()
    return {"all_mb_metrics": defaultdict(list)}


def never(names, **given):
    raise AssertionError("the double has no context parallelism")


BODIES = {
    "ClippedPGLossFn.__init__": make_loss,
    "ClippedPGLossFn.__call__": clipped_loss,
    "Policy.__init__": lambda names, self, config, **_: setattr(self, "config", config),
    "MegatronPolicyWorkerImpl.__init__": make_worker,
    "MegatronPolicyWorkerImpl.get_logprobs": worker_logprobs,
    "MegatronPolicyWorkerImpl.train": worker_train,
    "MegatronPolicyWorkerImpl.begin_train_step": worker_begin,
    "MegatronPolicyWorkerImpl.train_microbatch": worker_chunk,
    "MegatronPolicyWorkerImpl.finish_train_step": worker_finish,
    "MegatronPolicyWorkerImpl.abort_train_step": lambda names, self: self.optimizer.zero_grad(),
    "megatron_forward_backward": forward_backward,
    "_unwrap_model_config": lambda names, model: model.config,
    "allgather_cp_sharded_tensor": never,
}
