"""slime, from a checkout that MOE_UPGRPO_SLIME names, on CPUs; its settings without one."""

from argparse import Namespace

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.environment import token_share
from moe_upgrpo.integrations.slime_miles.log import check_replay
from moe_upgrpo.integrations.slime_miles.loss import check_loss, loss_config
from tests.integrations.slime_checks import StackChecks


class TestSlime(StackChecks):
    stack = "slime"

    @property
    def tolerance(self):
        """Up to v0.3.0 its cross entropy is Megatron's fused one, as miles' is (test_miles.py)."""
        source = (self.source() / "slime/utils/ppo_utils.py").read_text()
        return 2**-8 if "fused_vocab_parallel_cross_entropy" in source else 1e-4

    @classmethod
    def refused(cls):
        folder = cls.source() / "slime/backends/megatron_utils"
        refused = {}
        if "prepare_routed_experts" not in (folder / "cp_utils.py").read_text():
            refused["allgather-cp"] = (
                "does not cover R3 with --allgather-cp in this release of slime"
            )
        return refused | {
            "bshd": "does not cover R3 with --qkv-format bshd",
            "bshd, cp": "--qkv-format: bshd given with --context-parallel-size 2; allowed with it",
        }

    # Separate processes: some put a stand-in for Megatron in place, others import it.
    name_of_own_tests = (
        "tests/test_policy_loss.py",
        "tests/test_cispo_loss.py",
        "tests/test_ppo_kl_metric.py",
        "tests/test_expert_routing.py",
        "tests/test_logprob_response_spans.py",
        "tests/test_cp_utils.py",
        "tests/test_loss_cp_invariance.py",
        "tests/test_metric_report.py",
    )


def args(loss: str = "up-grpo", settings: dict | None = None, **flags) -> Namespace:
    defaults = dict(
        loss_type="custom_loss",
        custom_loss_function_path="ours",
        moe_upgrpo_loss=loss,
        moe_upgrpo_settings=settings,
        calculate_per_token_loss=False,
        use_tis=False,
        use_rollout_routing_replay=False,
        use_routing_replay=False,
        eps_clip=0.2,
        eps_clip_high=0.2,
    )
    return Namespace(**(defaults | flags))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (args("up"), r"moe_upgrpo_loss: 'up' given; allowed: grpo, dapo"),
        (args("rspo"), "'rspo' given, a loss that needs router_log_probs"),
        (args(settings={"clip_lo": 0.1}), r"moe_upgrpo_settings: .*; allowed: fields of positive"),
        (args(settings={"clip_low": 2}), "clip_low: 2 given; allowed: from 0 to 1"),
        (args(settings={"correction": {"wait": 1}}), "correction with wait given; allowed: weight"),
        (args("dppo-tv", eps_clip=0.1), r"--eps-clip: 0.1 given; .* has no clip_low"),
        (args(settings={"aggregation": "token-mean"}), "add --calculate-per-token-loss"),
        (args("gspo", calculate_per_token_loss=True), "'token-mean' given; allowed with positive"),
        (
            args(settings={"aggregation": "seq-mean-token-sum"}, calculate_per_token_loss=True),
            "allowed with it: token-mean",
        ),
        (args("gspo", use_tis=True), "--use-tis: given with gspo, a loss of whole sequences"),
        (args(custom_pg_loss_reducer_function_path="f"), "take aggregation in moe_upgrpo_settings"),
    ],
)
def test_a_loss_that_cannot_be(given, message):
    with pytest.raises(UserError, match=message):
        loss_config(given)
    with pytest.raises(UserError, match=message):
        check_loss(given, "ours", None)


def test_a_preset_beside_another_loss_is_refused():
    with pytest.raises(UserError, match="another loss is chosen; add --loss-type custom_loss"):
        check_loss(args(loss_type="policy_loss"), "ours", None)
    check_loss(args(None, loss_type="policy_loss"), "ours", None)


ROUTES = {"use_rollout_routing_replay": True, "use_routing_replay": True}


@pytest.mark.parametrize(
    ("asked", "flags", "expected"),
    [
        (None, {}, ("none", False, False)),
        (None, {"use_routing_replay": True}, ("R2", False, True)),
        (None, ROUTES, ("R3", True, True)),
        ("R3", ROUTES, ("R3", True, True)),
        ("R2", ROUTES, ("R2", False, True)),
        ("observe", ROUTES, ("none", False, False)),
    ],
)
def test_the_trainers_replay(asked, flags, expected):
    """Mode, and the two flags of the stack afterwards, in the trainer's process."""
    given = args(**flags)
    if asked:
        given.moe_upgrpo_replay = asked
    found = check_replay(given)
    assert (found, given.use_rollout_routing_replay, given.use_routing_replay) == expected


def test_what_the_log_cannot_do_is_refused(monkeypatch):
    with pytest.raises(UserError, match="'r2' given; allowed: observe, R2, R3"):
        check_replay(args(moe_upgrpo_replay="r2"))
    with pytest.raises(UserError, match="observe given; add --use-rollout-routing-replay"):
        check_replay(args(moe_upgrpo_replay="observe"))
    monkeypatch.setenv("MOE_UPGRPO_TOKENS", "5%")
    with pytest.raises(UserError, match="MOE_UPGRPO_TOKENS: '5%' given"):
        token_share()
