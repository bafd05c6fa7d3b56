"""The plan of a run, and the configs for eight GPUs.

What the arithmetic is held to: tests/megatron/test_plan.py; the configs' stand-in on a CPU:
tests/train/test_stand_in.py. Not covered: a GPU; the configs themselves were not run on any.
"""

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig

from moe_upgrpo.cli import _parse_with_files
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import memory
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import Sizes
from moe_upgrpo.rollout.engines import ENGINES, EngineRecord
from moe_upgrpo.tools.plan import (
    DoesNotFit,
    check_fits,
    make_plan,
    show,
)
from moe_upgrpo.tools.plan_options import PlanConfig
from tests.ranks import run_command

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
MOE, DENSE = CONFIGS / "qwen3-30b-a3b.yaml", CONFIGS / "qwen3-14b-base.yaml"
MOE_80 = CONFIGS / "qwen3-30b-a3b-80gb.yaml"
MOE_32K = CONFIGS / "qwen3-30b-a3b-32k.yaml"
GB = 1e9


def planned(*words: str, monkeypatch) -> PlanConfig:
    monkeypatch.chdir(ROOT)  # the configs name folders as seen from there
    return _parse_with_files(PlanConfig, list(map(str, words)), "plan")


def shown(plan) -> str:
    console = Console(file=io.StringIO(), width=140, markup=False)
    show(plan, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "total", "active"),
    # Hand-worked. 30B: 48 x (128 x 3·2048·768 + 2048·128 + 2048·(4096 + 2·512) + 4096·2048 + 256 +
    # 4096) + 2·151936·2048 + 2048; 14B: 40 x (3·5120·17408 + 5120·(5120 + 2·1024) + 5120² + 256 +
    # 10240) + 2·151936·5120 + 5120.
    [
        ("qwen3-30b-a3b", 30_532_122_624, 30_532_122_624 - 48 * 120 * 3 * 2048 * 768),
        ("qwen3-14b-base", 14_768_307_200, 14_768_307_200),
    ],
)
def test_the_published_models_have_their_published_sizes(name, total, active):
    model = Sizes.of(AutoConfig.from_pretrained(CONFIGS / "models" / name))
    assert memory.model_parameters(model) == total
    assert memory.active_parameters(model) == active
    assert f"{total / 1e9:.1f}" == {"qwen3-30b-a3b": "30.5", "qwen3-14b-base": "14.8"}[name]


def test_thirty_billion_parameters_fit_on_eight_gpus(monkeypatch):
    """TP2·EP8: 2 + 4 bytes for what a rank holds; 12 for a quarter of what four ranks share."""
    plan = make_plan(planned("--config", MOE, "--server-gb", 24, monkeypatch=monkeypatch))
    check_fits(plan)
    (stage,) = plan.stages
    expert = 48 * 16 * 3 * 2048 * 768  # 16 of the 128 experts of each layer
    # Attention, embeddings and head are halved; norms and routers are whole on both ranks.
    halved = 48 * (2048 * (4096 + 2 * 512) + 4096 * 2048) + 2 * 151936 * 2048
    shared = halved // 2 + 48 * (2048 * 128 + 256 + 4096) + 2048
    assert (stage.stage.expert, stage.stage.shared) == (expert, shared)
    assert stage.held == {
        "parameters": 2 * (expert + shared),
        "gradients": 4 * (expert + shared),
        "optimizer": 12 * (expert + shared / 4),
        "engine: server": 24 * GB,
    }
    # Each token goes to eight experts; half of them on a rank of TP2, half as many again on the
    # busiest: twice 2,048 numbers and four times 768 of two bytes; and four times the rank's half
    # of the hidden states.
    sent = 9216 * 8 / 2 * 1.5 * 2 * (2 * 2048 + 4 * 768)
    own = 4 * 9216 * 2048 * 2 / 2 + 9216 * 2048 * 2  # and a gathered one
    assert stage.moments["old log-probs"] == {"layer in work": sent + own}
    # 128 sequences; 48 routers, 8 ids of one byte and a margin; sent, and gathered from two ranks.
    routes = 128 * 9216 * 48 * (8 + 4)
    assert stage.moments["routes gathered"] == {"routes and margins": routes / 2 * 3}
    assert plan.host == {"routes and margins of a step": routes * 2 * 8}
    # 441 rows of half the vocabulary, in bf16 once and in fp32 twice; all hidden states.
    batch = memory.MicroBatch(sequences=1, length=9216)
    head = memory.head(plan.model, plan.layout, batch, dtype="bfloat16", purpose="score")
    assert 2**27 // (4 * 75968) == 441
    assert head == 441 * 75968 * 10 + 9216 * ((8 * 2048 + 4) / 2 + 2048 * 2)
    text = shown(plan)
    for words in ("30.53B parameters, 3.35B", "TP2·EP8", "assumptions", "Korthikanti",
                  "--server-gb", "expert-parallel", "token log: routes"):  # fmt: skip
        assert words in text


def test_thirty_billion_parameters_fit_on_eight_gpus_of_80_gb(monkeypatch):
    """TP4·EP8, 8,192 new tokens: what is not experts lies on four ranks, and twice."""
    plan = make_plan(planned("--config", MOE_80, "--gpu-memory-gb", 80, monkeypatch=monkeypatch))
    check_fits(plan)
    assert (plan.new_tokens, plan.available) == (8192, 80 * GB * 0.94 - 2 * GB)
    (stage,) = plan.stages
    expert = 48 * 16 * 3 * 2048 * 768
    split = 48 * (2048 * (4096 + 2 * 512) + 4096 * 2048) + 2 * 151936 * 2048
    shared = split // 4 + 48 * (2048 * 128 + 256 + 4096) + 2048
    assert sum(stage.held.values()) == 6 * (expert + shared) + 12 * (expert + shared / 2)
    assert "engine: server" not in stage.held
    assert stage.peak > 0.95 * plan.available


def test_responses_of_32k_tokens_in_two_parts_fit_on_two_machines_of_80_gb(monkeypatch):
    """TP4·CP2·EP8: attention keeps queries, the output twice, and the keys and values of both."""
    words = ("--config", MOE_32K, "--gpu-memory-gb", 80, "--nodes", 2)
    plan = make_plan(planned(*words, monkeypatch=monkeypatch))
    check_fits(plan)
    assert str(plan.layout) == "TP4·CP2·EP8"
    (stage,) = plan.stages
    update, part = stage.moments["update"], 32768 // 2
    assert update["layer inputs"] == 48 * part * 2048 * 2 / 4
    heads, kv = 32 / 4 * 128, 4 / 4 * 128
    assert update["attention"] == part * (2 * (3 * heads + 2 * 2 * kv) + 4 * 32 / 4)
    # All gather the keys and values of one other rank in a forward, and scatter their gradients.
    assert stage.sent["context-parallel"] > 0
    assert "1 x 16384 tokens of it on each" in shown(plan)


def test_responses_of_32k_tokens_fit_on_eight_gpus_of_141_gb(monkeypatch):
    words = ("--config", MOE, "--max-new-tokens", 32768, "--server-gb", 24)
    plan = make_plan(planned(*words, monkeypatch=monkeypatch))
    check_fits(plan)
    assert "1 x 33792 tokens" in shown(plan)
    (stage,) = plan.stages
    # Full recomputation keeps the input of each of 48 layers, half of it on a rank of TP2.
    assert stage.moments["update"]["layer inputs"] == 48 * 33792 * 2048 * 2 / 2


def test_what_does_not_fit_is_refused_with_what_would_help(monkeypatch):
    config = planned("--config", MOE, "--gpu-memory-gb", 80, monkeypatch=monkeypatch)
    plan = make_plan(config)
    with pytest.raises(DoesNotFit) as error:
        check_fits(plan)
    message = str(error.value)
    assert message.startswith("does not fit: rank 0 to 7 needs 75.2 GB (at the moment: update)")
    assert "of 73.2 GB, which is 80 GB less the reserve" in message
    assert "The largest: optimizer 45.8 GB" in message
    # The optimizer's share halves on twice the ranks, with the experts on two of them each.
    assert "Enough by itself: " in message and "--nodes 2 (" in message
    twice = make_plan(config.but(nodes=2))
    assert f"--nodes 2 ({twice.fullest.peak / GB:.1f} GB)" in message
    check_fits(twice)


def test_an_engine_in_each_rank_holds_a_model_of_its_own(monkeypatch):
    plan = make_plan(planned("--config", DENSE, monkeypatch=monkeypatch))
    check_fits(plan)
    (stage,) = plan.stages
    assert stage.held["engine: model"] == 2 * 14_768_307_200
    assert stage.held["engine: cache"] == 16 * 2**30
    # The largest of its weights, the embedding of 151,936 x 5,120 in bf16, gathered and joined, and
    # as much again in the engine; never the whole model.
    embedding = 2 * 2 * 151_936 * 5_120
    assert stage.moments["weights to the engine"] == {
        "one layer": embedding, "engine's next layer": embedding,
    }  # fmt: skip
    # A server elsewhere takes nothing here, and hf keeps keys and values of 64 sequences: 40
    # layers, 8 heads of 128, in bf16, twice, and one layer once more while it grows.
    away = make_plan(plan.config.but(engine_url="http://elsewhere:1"))
    assert away.fullest.peak < stage.peak - 40 * GB
    assert away.host == {} and away.stages[0].moments["weights to the engine"] == {
        "one layer": embedding
    }
    hf = make_plan(plan.config.but(engine="hf"))
    cache = 2 * 40 * 8 * 128 * 2 * 64 * 9216
    assert hf.stages[0].moments["generation"]["engine: cache"] == pytest.approx(cache * 41 / 40)


def test_a_copy_of_the_state_may_lie_on_the_host(monkeypatch):
    """14 bytes a parameter in bf16, of the ranks that write: TP2 outside of experts, EP8."""
    name = "a checkpoint's copy (--async-save)"
    config = planned("--config", MOE, "--server-gb", 24, monkeypatch=monkeypatch)
    assert name not in make_plan(config).host
    plan = make_plan(config.but(async_save=True))
    (stage,) = plan.stages
    on_both = 48 * (2048 * 128 + 256 + 4096) + 2048  # routers and norms
    whole = memory.model_parameters(plan.model)
    assert stage.stage.expert * 8 + stage.stage.shared * 2 == whole + on_both
    assert plan.host[name] == 14 * (whole + on_both)
    assert make_plan(config.but(async_save=True, save_every=0)).host == make_plan(config).host


def test_the_copy_of_a_state_is_counted_by_hand():
    """Two stages of four ranks, TP2·EP4: 10 parameters outside of experts and 7 in them."""
    common = {"layers": 1, "moe_layers": 1, "first": True, "last": True, "shared": 10, "expert": 7}
    stages = [memory.Stage(index=i, **common) for i in range(2)]
    layout = Layout(tp=2, ep=4, pp=2)
    given = (stages, layout, 8)
    assert memory.state_copies(*given, ranks=8, dtype="bfloat16") == 14 * 2 * (20 + 28)
    assert memory.state_copies(*given, ranks=3, dtype="float32") == 16 * (20 + 21)
    sgd = {"algorithm": "sgd", "frozen": 1}
    assert memory.state_copies(*given, ranks=5, dtype="float32", **sgd) == 8 * (48 + 17)


def test_an_engine_is_planned_by_its_record(monkeypatch):
    """A new one, which the plan has never heard of."""
    config = planned("--config", DENSE, monkeypatch=monkeypatch)

    def plan(**traits):
        monkeypatch.setitem(ENGINES, "new", EngineRecord(title="New", make=None, **traits))
        return make_plan(config.but(engine="new", engine_dtype="float32"))

    (stage,) = plan(in_flight=3).stages
    assert stage.held["engine: model"] == 4 * 14_768_307_200 and "engine: cache" not in stage.held
    cache = 2 * 40 * 8 * 128 * 4 * 3 * 9216  # as hf's above, in fp32, of three sequences
    assert stage.moments["generation"]["engine: cache"] == pytest.approx(cache * 41 / 40)
    (stage,) = plan(cache_setting="vllm.kv_cache_gib").stages
    assert stage.held["engine: cache"] == 16 * 2**30 and "generation" not in stage.moments
    with pytest.raises(UserError, match=r"engine=new without .* where New takes most of the mem"):
        plan(without_url="a server started here", takes_url=True)


def test_pipeline_stages_are_planned_one_by_one(monkeypatch):
    words = ("--config", MOE, "--pp", 2, "--tp", 1, "--ep", 4)
    plan = make_plan(planned(*words, monkeypatch=monkeypatch))
    first, last = plan.stages
    assert (first.ranks, last.ranks) == (range(4), range(4, 8))
    assert first.stage.layers == last.stage.layers == 24
    assert "logits" not in {n for parts in first.moments.values() for n in parts}
    # The first stage keeps the inputs of two micro-batches.
    inputs = [s.moments["update"]["layer inputs"] for s in plan.stages]
    assert inputs == [2 * 24 * 9216 * 2048 * 2, 24 * 9216 * 2048 * 2]
    assert first.sent["pipeline"] > 0
    assert "stage 1, rank 4 to 7" in shown(plan)


def test_a_budget_of_tokens_is_planned_as_the_longest_sequences_that_fit_it(monkeypatch):
    """1,024 + 8,192 tokens each: one of them in a budget below two, two in one of two."""
    base = planned("--config", MOE, monkeypatch=monkeypatch)
    inputs = {
        tokens: make_plan(base.but(micro_batch=None, micro_batch_tokens=tokens))
        .fullest.moments["update"]["layer inputs"]
        for tokens in (2 * 9216 - 1, 2 * 9216)
    }  # fmt: skip
    assert inputs == {2 * 9216 - 1: 48 * 4608 * 2048 * 2, 2 * 9216: 48 * 9216 * 2048 * 2}
    # Packed, shorter ones fill a budget to its end; by count all may be of the greatest length.
    packed = base.but(micro_batch=None, micro_batch_tokens=2 * 9216 - 2, packing=True)
    inputs = make_plan(packed).fullest.moments["update"]["layer inputs"]
    assert inputs == 48 * 9215 * 2048 * 2
    update = {
        packing: make_plan(base.but(micro_batch=2, packing=packing)).fullest.moments["update"]
        for packing in (False, True)
    }
    assert update[True]["layer inputs"] == update[False]["layer inputs"]


def test_what_nothing_can_be_said_about_is_refused(monkeypatch, tmp_path):
    base = planned("--config", MOE, monkeypatch=monkeypatch)
    for change, words in (
        ({"max_prompt_tokens": None}, "max_prompt_tokens is not given"),
        ({"engine": "sglang", "engine_url": None}, "give --engine-url"),
        ({"max_new_tokens": 50_000}, "max_position_embeddings=40960"),
        ({"tp": 8}, "num_key_value_heads=4"),
        (
            {"micro_batch": None, "micro_batch_tokens": 9215},
            "micro_batch_tokens=9215: .*--micro-batch-tokens 9216 or more",
        ),
        ({"model": tmp_path}, "holds no config.json"),
    ):
        with pytest.raises(UserError, match=words):
            make_plan(base.but(**change))
    nan = float("nan")
    for name, value in (
        *(("imbalance", 0.5), ("imbalance", nan), ("gpu_memory_gb", 0), ("gpu_memory_gb", nan)),
        *(("server_gb", -1), ("server_gb", nan), ("nodes", 0)),
    ):
        with pytest.raises(UserError, match=f"^{name}={value:g}: "):
            base.but(**{name: value})


def test_the_tiny_model_needs_next_to_nothing():
    plan = make_plan(PlanConfig.of(gpus_per_node=2))
    check_fits(plan)
    assert plan.fullest.peak < 0.5 * GB


def test_the_command_prints_and_refuses():
    result = run_command("plan", "--gpus-per-node", "2", "--gpu-memory-gb", "2.13")
    assert result.returncode == 1 and "assumptions" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: does not fit: rank 0 to 1 needs ")
