"""Words that a comparison's config may have, and the options that each of its runs gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moe_upgrpo.compare.plan import Run, from_values, read_plan
from moe_upgrpo.errors import UserError

VALUES = {
    "name": "one",
    "question": "?",
    "base": {"steps": 4, "prompts": 8, "optimizer": {"lr": 1e-3, "clip-grad": 0.5}},
    "arms": {"grpo": {"loss": "grpo"}, "up": {"loss": "up-grpo", "optimizer": {"lr": 2e-3}}},
    "seeds": [0, 1],
    "contrasts": [["up", "grpo"]],
}
RATES = {"values": [1e-4, 3e-4], "seeds": [7], "steps": 2}


def test_options_of_a_run():
    plan = from_values(VALUES)
    given = plan.options(Run(arm="up", seed=1))
    assert given["optimizer"] == {"lr": 2e-3, "clip_grad": 0.5}  # the arm's over the base's
    assert given["warm_start"] == {"seed": 1} and given["seed"] == 1
    config = plan.config(Run(arm="up", seed=1))
    assert (config.objective.loss, config.run.seed) == ("up-grpo", 1)
    assert config.start.warm_start.seed == 1 and not config.log.report
    optimizer = config.trainer.optimizer
    assert (optimizer.lr, optimizer.clip_grad) == (2e-3, 0.5)


def test_a_chosen_learning_rate_wins():
    plan = from_values(VALUES | {"learning_rates": RATES})
    config = plan.config(Run(arm="up", seed=1, lr=5e-4))
    assert config.trainer.optimizer.lr == 5e-4 and config.run.steps == 4
    tuning = plan.config(plan.tuning()[0])
    assert (tuning.run.steps, tuning.run.seed, tuning.evaluation.eval_problems) == (2, 7, 1)


def test_rates_without_a_dot_are_words_in_yaml():
    values = yaml.safe_load("[1e-4, 3e-4]")
    assert values == ["1e-4", "3e-4"]
    plan = from_values(VALUES | {"learning_rates": RATES | {"values": values}})
    assert plan.learning_rates.values == (1e-4, 3e-4)
    assert plan.tuning()[0].key == "tuning-grpo-lr0.0001-seed7"


def test_every_arm_has_the_same_budget():
    tuning = from_values(VALUES | {"learning_rates": RATES}).tuning()
    by_arm = {arm: sorted((r.lr, r.seed) for r in tuning if r.arm == arm) for arm in VALUES["arms"]}
    assert by_arm["grpo"] == by_arm["up"] == [(1e-4, 7), (3e-4, 7)]
    assert len({run.key for run in tuning}) == len(tuning)


def test_seeds_are_whole_before_the_next():
    runs = from_values(VALUES).runs({"grpo": 1e-4, "up": 3e-4})
    assert [(r.seed, r.arm, r.lr) for r in runs] == [
        (0, "grpo", 1e-4),
        (0, "up", 3e-4),
        (1, "grpo", 1e-4),
        (1, "up", 3e-4),
    ]


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"arm": {}}, "arm: not a field; known: arms, base"),
        ({"seeds": [0, 0]}, "at least 2, all different"),
        ({"seeds": [0]}, "at least 2, all different"),
        ({"seeds": 3}, "a field has the wrong form"),
        ({"contrasts": [["up", "dapo"]]}, "'dapo' is not an arm; known: grpo, up"),
        ({"contrasts": []}, "at least 2 arms and 1 contrast"),
        ({"contrasts": [["up", "up"]]}, "an arm with itself"),
        ({"contrasts": [["up", "grpo"], ["grpo", "up"]]}, "listed more than once"),
        ({"name": "../up"}, "name '../up': letters, digits"),
        ({"confidence": 95}, "confidence=95: a number such as 0.95"),
        ({"confidence": "high"}, "confidence='high'"),
        ({"warm_start_by_seed": "nope"}, "warm_start_by_seed='nope': true or false"),
        ({"seeds": [0, -1]}, "whole numbers of at least 0"),
        ({"seeds": "01"}, "whole numbers of at least 0"),
        ({"arms": {"a/b": {"loss": "grpo"}, "c": {"loss": "dapo"}}, "contrasts": [["c", "a/b"]]},
         "arm 'a/b': letters, digits"),
        ({"arms": {1: {"loss": "grpo"}, 2: {"loss": "dapo"}}, "contrasts": [[1, 2]]}, "arm 1:"),
        ({"primary": {"metric": "eval/pass@7"}}, "'eval/pass@7' is not measured with arm grpo's"),
        ({"learning_rates": RATES | {"seeds": [7, 7]}}, "learning_rates.seeds=[7, 7]"),
        ({"learning_rates": RATES | {"values": ["low", "high"]}}, "a field has the wrong form"),
        ({"arms": {"a": {"loss": "grpo"}, "up": {"los": 1}}, "contrasts": [["a", "up"]]}, "'los'"),
        ({"arms": {"a": {"loss": "grpo"}, "up": {"loss": "gpo"}}, "contrasts": [["a", "up"]]},
         "arm up: loss: 'gpo' given; allowed: grpo, dapo"),
        ({"base": {"seed": 3}}, "seed is set by the comparison"),
        ({"base": {"prompts": "many"}}, "arm grpo:"),
        ({"base": {"prompts": 7, "minibatches": 3}}, "cannot be split into 3 mini-batches"),
        ({"primary": {"metric": "reward/mean"}}, "a metric eval/... is needed"),
        ({"primary": {"summary": "sum"}}, "use mean, last or best"),
        ({"learning_rates": RATES | {"seeds": [0]}}, "other seeds than those compared"),
        ({"learning_rates": RATES | {"values": [1e-4]}}, "at least 2 values"),
        ({"learning_rates": RATES | {"metric": "eval/greedy"}}, "must not choose anything"),
        ({"nproc": 0}, "nproc=0"),
    ],
)  # fmt: skip
def test_mistakes(changed, says):
    with pytest.raises(UserError, match=r"."):
        try:
            from_values(VALUES | changed)
        except UserError as error:
            assert says in str(error)
            raise


@pytest.mark.parametrize(
    "path", sorted(Path("examples/compare").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_comparisons_that_are_shipped(path):
    plan = read_plan(path)
    assert plan.name == path.stem and len(plan.seeds) >= 2


def test_up_dapo_differs_from_dapo_in_the_positive_branch_alone():
    plan = read_plan(Path("examples/compare/up-dapo.yaml"))
    configs = {arm: plan.config(Run(arm=arm, seed=0)) for arm in plan.arms}
    for ours, theirs in plan.contrasts:
        up, dapo = (configs[arm].objective.policy_loss() for arm in (ours, theirs))
        assert (dapo.positive, dapo.negative, up.positive) == ("ppo", "ppo", "log-likelihood")
        assert replace(up, positive="ppo") == dapo
        assert (dapo.dual_clip, dapo.clip_low, dapo.clip_high) == (10, 0.2, 0.28)
        assert configs[ours].terms == configs[theirs].terms
    kl = {arm: config.terms.kl_coef for arm, config in configs.items()}
    assert kl == {"dapo": 0.04, "up-dapo": 0.04, "dapo-no-kl": 0, "up-dapo-no-kl": 0}


def test_file(tmp_path):
    file = tmp_path / "plan.yaml"
    with pytest.raises(UserError, match="No such file"):
        read_plan(file)
    file.write_text("name: [")
    with pytest.raises(UserError, match="is not YAML"):
        read_plan(file)
    file.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="is not YAML"):
        read_plan(file)
    file.write_text("- name")
    with pytest.raises(UserError, match=r"plan.yaml: fields of a comparison .* are needed"):
        read_plan(file)
    file.write_text("name: one\nseeds: [0, 1]\nseeds: [2, 3]")
    with pytest.raises(UserError, match=r"plan.yaml: 'seeds' stands in line 2 and in line 3"):
        read_plan(file)
    file.write_text("name: one")
    with pytest.raises(UserError, match=r"plan.yaml: question, base, .* is missing"):
        read_plan(file)
