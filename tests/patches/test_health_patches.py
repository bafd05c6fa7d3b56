"""The patches by which a stack counts a replay's health figures without this package.

On copies: applied, reverted to the last bit, and in between the figures of planted routes on two
ranks, as tests/integrations/test_health.py has them. The code that reports them is compiled alone.
slime and NeMo-RL where a variable names a checkout (`make test-stacks`).
"""

import importlib.util
import os
import shutil
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_upgrpo import patching
from moe_upgrpo.megatron import backend, groups
from moe_upgrpo.megatron.layout import Layout
from tests.ranks import run_ranks

E, K, N = 6, 2, 4
NATIVE = [[0, 1], [2, 3], [4, 5], [0, 5]]
SITE = Path(importlib.util.find_spec("megatron.core").origin).parents[2]
ROOTS = {
    "megatron-core-health": SITE,
    "verl-health": SITE,
    "slime-health": os.environ.get("MOE_UPGRPO_SLIME"),
    "nemo-rl-health": os.environ.get("MOE_UPGRPO_NEMO_RL"),
}
FILES = {  # where the counting is
    "megatron-core-health": "megatron/core/transformer/moe/router_replay.py",
    "verl-health": "verl/utils/megatron/router_replay_patch.py",
    "slime-health": "slime/utils/routing_replay.py",
    "nemo-rl-health": "nemo_rl/models/megatron/router_replay.py",
}


class Router(torch.nn.Module):
    """A router that chooses NATIVE, through a stack's replay."""

    def __init__(self, number: int, topk):
        super().__init__()
        self.layer_number, self.topk = number, topk

    def forward(self, scores):
        def own(scores, topk, num_groups=None, group_topk=None):
            return scores.topk(topk, dim=1)

        _, ids = self.topk(own)(scores, K)
        return scores, torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)


def module_of(file: Path, **stand_ins: dict) -> types.ModuleType:
    """The file alone; of what else the stack has it sees stand-ins."""
    for name, attributes in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    spec = importlib.util.spec_from_file_location("patched", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["patched"] = module
    spec.loader.exec_module(module)
    return module


class Megatron:
    """Megatron-Core's RouterReplay, and verl's, which is like it."""

    missing = False  # whether rows of -1 are given to it

    def __init__(self, file: Path):
        self.module = module_of(file)
        self.routers = []
        for number in (1, 3):
            replay = self.module.RouterReplay()
            router = Router(number, lambda own, r=replay: self._topk(r, own))
            router.router_replay = replay
            router.register_forward_hook(replay.count_rows)
            self.routers.append(router)

    @staticmethod
    def _topk(replay, own):
        return lambda scores, topk: replay.get_replay_topk(scores, topk, None, None, own)

    def hold(self, router, routes, action: str = "REPLAY_FORWARD") -> None:
        if routes is not None:
            router.router_replay.set_target_indices(routes)
        router.router_replay.set_router_replay_action(self.module.RouterReplayAction[action])

    def rates(self) -> dict:
        return self.module.RouterReplay.take_rates()


class Nemo(Megatron):
    """NeMo-RL's changes of Megatron-Core's class, the rest of the checkout being stand-ins."""

    missing = True

    def __init__(self, file: Path):
        from megatron.core.transformer.moe import router_replay

        nothing = lambda *_, **__: None  # noqa: E731
        self.patched = module_of(
            file,
            **{
                "nemo_rl": {},
                "nemo_rl.models": {},
                "nemo_rl.models.generation": {},
                "nemo_rl.models.generation.interfaces": {
                    "ROUTED_EXPERTS_MISSING_ROUTE_SENTINEL": -1
                },
                "nemo_rl.models.policy": {"PolicyConfig": dict},
                "nemo_rl.utils": {},
                "nemo_rl.utils.r3_trace": {
                    "trace_router_replay_action": nothing,
                    "trace_router_replay_assignment": nothing,
                },
            },
        )
        self.patched._install_missing_route_fallback_patch()
        self.module = router_replay
        model = torch.nn.ModuleList()
        for number in (1, 3):
            replay = router_replay.RouterReplay()
            router = Router(number, lambda own, r=replay: self._topk(r, own))
            router.router_replay = replay
            model.append(router)
        self.routers = list(model)
        for _ in range(2):  # as before each micro-batch
            assert len(self.patched._router_replay_instances_for_model(model)) == 2

    def rates(self) -> dict:
        return self.patched.take_replay_rates()


class Slime:
    """slime's replay, by the stages of its environment."""

    missing = False

    def __init__(self, file: Path):
        os.environ["ENABLE_ROUTING_REPLAY"] = "1"
        cpu = {"current_device": lambda: torch.device("cpu")}
        accelerator = types.SimpleNamespace(**cpu)
        self.module = module_of(file, **{"slime": {}, "slime.utils": {"accelerator": accelerator}})
        self.routers = [
            Router(number, self.module.get_routing_replay_compute_topk) for number in (1, 3)
        ]
        for router in self.routers:
            self.module.register_routing_replay(router)

    def hold(self, router, routes, action: str = "REPLAY_FORWARD") -> None:
        if routes is not None:
            router.routing_replay.top_indices_list.append(routes)
        os.environ["ROUTING_REPLAY_STAGE"] = action.lower()

    def rates(self) -> dict:
        return self.module.RoutingReplay.take_rates()


STACKS = {
    "megatron-core-health": Megatron,
    "verl-health": Megatron,
    "slime-health": Slime,
    "nemo-rl-health": Nemo,
}


def counted(stack: str, file: Path) -> list[dict]:
    """Figures that are reported on this rank: of planted routes, and then of nothing."""
    with groups.process_groups(Layout()), backend.apply():
        one, scores = STACKS[stack](file), torch.zeros(N, E)
        scores.scatter_(1, torch.tensor(NATIVE), torch.tensor([[2.0, 1.0]] * N))

        def forward(*routes) -> None:
            for router, given in zip(one.routers, routes, strict=True):
                one.hold(router, torch.tensor(given))
                router(scores)

        other = [[0, 1], [2, 4], [4, 5], [0, 5]]  # row 1 differs
        forward(*((other, NATIVE) if dist.get_rank() else (NATIVE, other)))
        third = [[0, 0], [3, 3], [4, 5], [-1, -1] if one.missing else [5, 0]]
        forward(NATIVE, third)
        for router in one.routers:  # recomputed for the gradient: not counted again
            one.hold(router, None, "REPLAY_BACKWARD")
            router(scores)
        return [one.rates(), one.rates()]


def checked(stack: str, tmp_path: Path) -> None:
    root = ROOTS[stack]
    if root is None:
        pytest.skip(f"no variable names a checkout for {stack}")
    of_stack = patching.of_stack(stack)
    if name := of_stack[0].distribution:
        of_stack = [series for series in of_stack if series.version == version(name)]
    if not of_stack and version(name).rsplit(".", 1)[0] in ("0.17", "0.18"):
        pytest.skip(f"docs/patches.md names no patch for {name} {version(name)}")
    (series,) = of_stack
    for file in series.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(root) / file, tmp_path / file)
    before = {file: (tmp_path / file).read_bytes() for file in series.files}
    checkout = patching.Checkout(series, tmp_path)
    assert checkout.state == "clean" and FILES[stack] in checkout.apply()
    for file in series.files:
        compile((tmp_path / file).read_text(encoding="utf-8"), file, "exec")
    first, second = run_ranks(2, counted, stack, tmp_path / FILES[stack])
    assert first == second
    planted, nothing = first
    # Two forwards of two layers on two ranks: 32 rows. In layer 2 four are zero-filled or repeated.
    missing = 2 if STACKS[stack].missing else 0
    assert planted == pytest.approx(
        {
            "replay/rows": 32,
            "replay/applied_rate": (32 - missing) / 32,
            "replay/live_rate": missing / 32,
            "replay/zero_filled_rate": 2 / (32 - missing),
            "replay/repeated_rate": 2 / (32 - missing),
            "replay/native_differs/layer_0": 1 / 16,
            "replay/native_differs/layer_2": 1 / (12 - missing),
        }
    )
    # A replay that reaches no router, or of routers that the model does not have.
    assert nothing["replay/rows"] == nothing["replay/applied_rate"] == 0
    assert nothing["replay/live_rate"] == 1
    assert checkout.revert() and before == {
        file: (tmp_path / file).read_bytes() for file in series.files
    }


def test_megatron_core(tmp_path):
    checked("megatron-core-health", tmp_path)


def test_verl(tmp_path):
    checked("verl-health", tmp_path)


def test_slime(tmp_path):
    checked("slime-health", tmp_path)


def test_nemo_rl(tmp_path):
    checked("nemo-rl-health", tmp_path)
