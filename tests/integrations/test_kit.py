"""The parts that all integrations are made of: routers against the trainer, the run log."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, presets, routers
from moe_upgrpo.integrations.kit.presets import Flag
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, keep_texts, reported
from moe_upgrpo.integrations.kit.second_look import clipped_tokens, second_look
from moe_upgrpo.losses import PRESETS, Metric
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.record import SequenceRecord, StepRecord, known_rows
from moe_upgrpo.record.limits import AlarmLimits
from moe_upgrpo.store import TokenLogWriter, read_config, read_metrics, read_tokens
from moe_upgrpo.store.questions import rate
from moe_upgrpo.store.texts import read_vocabulary
from moe_upgrpo.tasks.arithmetic import encode, save_tokenizer
from tests.megatron.conftest import checkpoints  # noqa: F401
from tests.megatron.measured import make_samples
from tests.ranks import run_ranks

# --- routers


def seen_by_both(checkpoint) -> list[tuple]:
    """The tap's routes and margins of each sample, and the watch's."""
    samples = make_samples()
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoint, Layout())
        with routers.watched(routers.counted(actor.chunks[0])) as watch:
            scored = actor.score(samples, record=("routes", "margins"))
        numbers, table_NLX = watch.take()
        layer_ids = actor.layer_ids
    table_SBLX = table_NLX.unflatten(0, (-1, len(samples)))
    both = []
    for i, (sample, one) in enumerate(zip(samples, scored, strict=True)):
        layers = routers.by_layer(numbers, table_SBLX[: len(sample.tokens) - 1, i])
        found = routers.Routes.of({i: layers})
        assert found.layer_ids == layer_ids
        both.append((one.routes, one.margins, np.sort(found.routes[i]), found.margins[i]))
    return both


@pytest.mark.parametrize("checkpoint", ["tiny", "mixed", "mixtral", "deepseek", "moonlight"])
def test_the_watch_sees_what_the_trainers_tap_sees(checkpoint, checkpoints):  # noqa: F811
    """Scores before and after the softmax, sigmoids with a bias, groups, dense layers."""
    (both,) = run_ranks(1, seen_by_both, checkpoints[checkpoint])
    for tap_routes, tap_margins, routes, margins in both:
        assert np.array_equal(tap_routes, routes)
        assert np.array_equal(tap_margins, margins)


class Router(nn.Module):
    """Something that `isinstance` takes for a TopKRouter, in a model of two layers."""

    def __init__(self, number: int, **marks):
        super().__init__()
        self.layer_number, self.topk = number, 2
        for name, value in marks.items():
            setattr(self, name, value)


def test_routers_of_multi_token_prediction_and_drafts_are_left_out(monkeypatch):
    monkeypatch.setattr(routers, "TopKRouter", Router)
    model = nn.Module()
    model.decoder = nn.ModuleList([Router(1), Router(2), Router(3, is_mtp_layer=True)])
    model.mtp = nn.ModuleList([Router(2)])
    model.draft_model = nn.ModuleList([Router(1)])
    model.prompt_mtp_free = Router(4)  # a name that only contains the letters
    wrapped = nn.Module()
    wrapped.module = model
    assert [router.layer_number for router in routers.counted(wrapped)] == [1, 2, 4]


def test_a_router_that_did_not_run_is_an_error(monkeypatch):
    watch = routers.Watch([Router(1), Router(3)])
    watch.saw(1, torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"layers \[1\] only, not all of \[1, 3\]"):
        watch.take()
    assert routers.Watch([]).take() == ([], None)
    with pytest.raises(UserError, match="no router ran"):
        routers.Routes.of({})


def test_a_margin_travels_with_its_routes_to_the_last_bit():
    """Through int32, as the stacks' layouts have them; without one it is NaN."""
    watch = routers.Watch([Router(2), Router(5)])
    margins = torch.tensor([0.1, float("inf"), 3e-9])
    watch.saw(5, torch.tensor([[0, 300], [1, 2], [-1, -1]]), margins)
    watch.saw(2, torch.tensor([[4, 5], [6, 7], [0, 1]]))
    numbers, table = watch.take()
    assert table.dtype == torch.int32 and table.shape == (3, 2, 3)
    found = routers.Routes.of({0: routers.by_layer(numbers, table)})
    assert found.layer_ids == [1, 4]
    assert found.routes[0].tolist() == [
        [[4, 5], [0, 300]], [[6, 7], [1, 2]], [[0, 1], [-1, -1]],
    ]  # fmt: skip
    assert np.isnan(found.margins[0][:, 0]).all()
    assert np.array_equal(found.margins[0][:, 1], margins.numpy())


def test_rows_of_dense_layers_are_left_out():
    def chosen(layers: int) -> list[int]:
        routes = np.arange(layers)[None, :, None]
        taken = routers.moe_layers("rows", routes, layer_ids=[1, 2], num_layers=3)
        return taken[0, :, 0].tolist()

    assert chosen(3) == [1, 2]
    assert chosen(2) == [0, 1]
    with pytest.raises(UserError, match="rows: 4 layers given; the model has 2 MoE layers of 3"):
        chosen(4)


# --- the second look


def test_the_second_look_leaves_the_training_step_alone():
    weights = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    log_probs = [weights * 2, weights.sum()[None]]

    def loss(leaves):
        assert all(leaf.is_leaf for leaf in leaves)
        noise = torch.rand(())  # drawn again by the step itself
        return (leaves[0].clamp(max=4.0)).sum() + 0 * noise, {"m": (torch.tensor(1), 2)}

    before = torch.get_rng_state()
    with torch.no_grad():
        look = second_look(loss, log_probs)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(look.loss) == 2 + 4 + 4 and weights.grad is None
    assert [pull.tolist() for pull in look.pulls] == [[1, 1, 0], [0]]
    assert look.metrics == {"m": Metric(1.0, 2.0)}
    advantage, mask = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, True, True])
    assert clipped_tokens(look.pulls[0], advantage, mask).tolist() == [False, False, True]
    assert not clipped_tokens(look.pulls[0], advantage, ~mask).any()


# --- presets

OPTIONS = dict(option="--loss", settings_option="--settings", stack="the stack")


def test_flags_and_settings_change_a_preset():
    def flag(value):
        return [Flag(name="--eps", value=value, default=0.2, field="clip_low")]

    def of(settings, value=0.2, **more):
        options = OPTIONS | {"not_handed_over": ["router_log_probs"]} | more
        return presets.resolve("up-grpo", settings, flag(value), **options)

    assert of({}) == PRESETS["up-grpo"]
    assert of({}, 0.1).clip_low == 0.1
    assert of({"clip_low": 0.3}, 0.1).clip_low == 0.3  # the more special one
    correction = {"weight": "token-tis", "high": 3.0}
    assert of({"correction": correction}).correction.high == 3.0


@pytest.mark.parametrize(
    ("preset", "settings", "value", "words"),
    [
        ("up", {}, 1, "--loss: 'up' given; allowed: grpo, "),
        (None, {}, 1, "--loss: None given"),
        ("rspo", {}, 1, "--loss: 'rspo' given, a loss that needs router_log_probs, which the st"),
        ("up-grpo", {"clip_lo": 1}, 1, r"--settings: {'clip_lo': 1} given; allowed: fields of pos"),
        ("up-grpo", [1], 1, r"--settings: \[1\] given"),
        (
            "up-grpo",
            {"correction": {"hi": 1}},
            1,
            "--settings: correction with hi given; allowed: weight",
        ),
        ("gmpo", {"router_shift_floor": 0.8}, 1, "needs router_log_probs, which the stack does"),
        ("dppo-tv", {}, 2, r"--eps: 2 given; dppo-tv has no clip_low. Leave it at the stack's 1;"),
    ],
)
def test_what_cannot_be_is_refused_by_its_option(preset, settings, value, words):
    flags = [Flag(name="--eps", value=value, default=1, field="clip_low")]
    with pytest.raises(UserError, match=words):
        presets.resolve(preset, settings, flags, not_handed_over=["router_log_probs"], **OPTIONS)


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        (
            "real",
            {},
            r"'real' given, a loss that needs groups, statistics, .* \(groups: the respon",
        ),
        ("gtpo", {}, r"needs token_weights, .*; `moe-upgrpo train` has them\); allowed: grpo"),
        ("grpo", {"top_entropy": 0.5}, r"to a loss \(statistics: they are of the whole mini-batch"),
    ],
)
def test_a_refusal_says_why_a_stack_cannot(preset, settings, words):
    without = ["groups", "token_weights", "statistics"]
    with pytest.raises(UserError, match=words):
        presets.resolve(preset, settings, [], not_handed_over=without, **OPTIONS)


# --- the environment


def test_the_environment(monkeypatch):
    for name in (environment.RUN, environment.TOKENS):
        monkeypatch.delenv(name, raising=False)
    assert environment.run_folder() is None and environment.token_share() == 1
    monkeypatch.setenv(environment.TOKENS, "0.25")
    assert environment.token_share() == 0.25
    for given in ("5%", "0", "1.5", "nan", ""):
        monkeypatch.setenv(environment.TOKENS, given)
        with pytest.raises(UserError, match=f"MOE_UPGRPO_TOKENS: '{given}' given; allowed"):
            environment.token_share()
    monkeypatch.delenv(environment.SETTINGS, raising=False)
    assert environment.loss_settings() == {}
    for given, means in {"": {}, '{"clip_low": 0.1}': {"clip_low": 0.1}, "null": None}.items():
        monkeypatch.setenv(environment.SETTINGS, given)
        assert environment.loss_settings() == means
    monkeypatch.setenv(environment.SETTINGS, "clip_low=0.1")
    said = "MOE_UPGRPO_LOSS_SETTINGS: 'clip_low=0.1' given .* allowed: a JSON object of positive"
    with pytest.raises(UserError, match=said):
        environment.loss_settings()
    environment.refuse({"a": False, "b": None})
    with pytest.raises(UserError, match="does not cover b; unset it"):
        environment.refuse({"a": False, "b": True})


def test_a_router_that_the_replay_does_not_reach_is_named():
    reached, orphan = SimpleNamespace(layer_number=1, router_replay=object()), Router(2)
    routers.check_replayed([reached])
    with pytest.raises(UserError, match=r"routers of layers \[2\] have no router_replay"):
        routers.check_replayed([reached, orphan])


# --- the run log: by hand

A, B, C = (0, 1), (2, 3), (1, 2)


def sequence(prompt: str | int, **changes) -> SequenceRecord:
    """Five tokens, the last three sampled; in row 1 layer 1 differs, in row 3 both do."""
    fields = dict(
        prompt=prompt,
        token_ids=np.array([5, 6, 7, 8, 1]),
        positions=np.array([2, 3, 4]),
        reward=1.0,
        advantage=np.array([1.0, 1.0, 1.0]),
        logp_rollout=np.array([-1.0, -2.0, -3.0]),
        logp_old=np.array([-1.5, -2.0, -3.0]),
        logp_train=np.array([-1.5, -1.0, -3.0]),
        clipped=np.array([False, True, False]),
        gradient_weight=np.array([0.5, 0.0, 0.5]),
        rollout_routes=np.array([(A, A), (A, B), (A, B), (B, C)]),
        train_routes=np.array([(A, A), (A, C), (A, B), (A, A)]),
        margins=np.full((4, 2), [0.5, 0.25], np.float32),
        staleness=2,
    )
    return SequenceRecord(**(fields | changes))


def write(folder, share: float = 1.0) -> tuple:
    """Two ranks; the second has one sequence more, and one of its rows is unknown."""
    with groups.process_groups(Layout()):
        rank = torch.distributed.get_rank()
        log = RunLog(
            folder / "run", {"stack": "none"}, group=None, layer_ids=[1, 3], top_k=2,
            num_experts=4, share=share,
        )  # fmt: skip
        step = Step(updates=2, loss_sum=0.25)
        step.sequences = [sequence("shared")]
        if rank:
            gone = np.array([(A, A), ((-1, -1), B), (A, B), (B, C)])
            known = known_rows(gone, step.sequences[0].train_routes, num_experts=4)
            later = sequence(
                "own", rollout_routes=gone, known=known, positions=np.array([3, 4]),
                **{name: getattr(step.sequences[0], name)[1:] for name in (
                    "advantage", "logp_rollout", "logp_old", "logp_train", "clipped",
                    "gradient_weight",
                )},
            )  # fmt: skip
            step.sequences.append(later)
            step.without_routes = 1
        for one in step.sequences:
            step.visit(one.clipped, one.advantage, np.ones(len(one.positions), bool))
        return log.write_step(7, step), log.run.path


def test_the_run_log_has_every_column_that_the_trainers_has(tmp_path):
    first, second = run_ranks(2, write, tmp_path)
    assert first == second
    run = first[1]
    rows = read_tokens(run / "tokens").to_pandas().sort_values(["sequence", "position"])
    assert rows.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert rows.prompt.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert rows.layers_mismatched.tolist() == [1, 0, 2, 1, 0, 2, 0, 2]
    # Before rows 1, 2, 3: none, one, one; after an unknown row nobody knows.
    prefix = rows.prefix_mismatched.astype("Int64").tolist()
    assert prefix[:6] == [0, 1, 1, 0, 1, 1] and rows.prefix_mismatched[6:].isna().all()
    assert rows.margin_min.tolist() == [0.25] * 8 and rows.staleness.tolist() == [2] * 8
    (metrics,) = read_metrics(run)
    assert metrics["step"] == 7
    assert metrics["mismatch/router_rate"] == 8 / 16
    assert metrics["mismatch/tokens_without_routes"] == 1
    assert metrics["ratio/max"] == pytest.approx(np.e)
    assert metrics["logp_gap/max_abs"] == 0.5
    assert metrics["staleness/mean"] == 2
    assert metrics["clip/positive"] == 3 / 8 and metrics["tokens/visited"] == 8
    assert metrics["loss/policy"] == 0.25  # two ranks' shares of two optimizer steps
    assert metrics["alarms"] == [] and read_config(run)["alarms"]


def named(folder) -> None:
    with groups.process_groups(Layout()):
        RunLog(
            folder / "run", {}, group=None, layer_ids=[1], top_k=2, num_experts=4,
            tokenizer=str(folder / "model"),
        )  # fmt: skip


def test_a_run_keeps_the_texts_of_its_stack_s_tokenizer(tmp_path):
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    run_ranks(1, named, tmp_path)
    found = read_vocabulary(tmp_path / "run", range(100))
    assert [found[i] for i in encode("12+7=")] == [b"1", b"2", b"+", b"7", b"="]


@pytest.mark.parametrize("tokenizer", [None, "org/of-the-hub", "absent"])
def test_a_run_without_a_tokenizer_says_how_texts_are_had(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # not asked, and not reached if it were
    keep_texts(tmp_path, tokenizer)
    (said,) = capsys.readouterr().out.splitlines()
    assert f"moe-upgrpo report {tmp_path} --tokenizer FOLDER" in said
    assert (tokenizer or "no tokenizer is named") in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [KeyError("▁"), RuntimeError("a library's\ntwo lines"), OSError()]
)
def test_a_tokenizer_that_breaks_does_not_end_the_job(error, tmp_path, capsys, monkeypatch):
    """Its rank would leave the others waiting. Whatever is raised, and wherever."""
    (tmp_path / "run").mkdir()
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_moe"}')

    def breaks(*_, **__):
        raise error

    for place in ("token_bytes", "read_tokenizer"):
        with monkeypatch.context() as patched:
            patched.setattr(f"moe_upgrpo.hugging_face.tokenizer.{place}", breaks)
            keep_texts(tmp_path / "run", tmp_path / "model")
        (said,) = capsys.readouterr().out.splitlines()
        assert type(error).__name__ in said and "--tokenizer FOLDER" in said
    keep_texts(tmp_path / "run", tmp_path / "model")
    assert read_vocabulary(tmp_path / "run", range(100)) and not capsys.readouterr().out


def broken(folder) -> str:
    with groups.process_groups(Layout()):
        log = RunLog(folder / "run", {}, group=None, layer_ids=[1, 3], top_k=2, num_experts=4)
        step = Step(sequences=[sequence("a")])
        if torch.distributed.get_rank():
            step.sequences[0].rollout_routes = step.sequences[0].rollout_routes[:, :1]
        with pytest.raises(UserError) as error:
            log.write_step(1, step)
        return str(error.value)


def test_rows_of_two_ranks_that_do_not_fit_end_both(tmp_path):
    said = run_ranks(2, broken, tmp_path)
    assert said[0] == said[1]
    assert said[0].startswith("step 1: data-parallel rank 1: sequence 1: ")
    assert "MoE layers" in said[0]


def alarming(folder) -> dict:
    with groups.process_groups(Layout()):
        log = RunLog(folder / "run", {}, group=None, layer_ids=[1, 3], top_k=2, num_experts=4)
        apart = sequence("a", logp_old=np.array([-5.0, -2.0, -3.0]), staleness=None)
        return log.write_step(1, Step(sequences=[apart], updates=1))


def test_alarms_ring(tmp_path):
    (metrics,) = run_ranks(1, alarming, tmp_path)
    assert metrics["alarms/raised"] == 2 and metrics["alarms/mismatch-above-noise"] == 0.5
    assert {"ratio/max", "logp_gap/k3", "alarms/raised"} <= reported(metrics).keys()
    assert not any(isinstance(value, list) for value in reported(metrics).values())
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["alarms"] == ["mismatch-above-noise", "large-log-prob-gap"]


def training(folder) -> tuple[list[float | None], float]:
    """Three steps: the second changes one of two tensors, the third none."""
    model = torch.nn.Linear(2, 2)
    with groups.process_groups(Layout()):
        log = RunLog(
            folder / "run", {}, group=None, layer_ids=[1, 3], top_k=2, num_experts=4,
            modules=[model], limits=AlarmLimits(steps_unchanged=1),
        )  # fmt: skip
        rates = []
        for number in (1, 2, 3):
            if number == 2:
                model.bias.data += 1
            metrics = log.write_step(number, Step(sequences=[sequence("a")], updates=1))
            rates.append(metrics.get("weights/changed_rate"))
        return rates, metrics["alarms/weights-unchanged"]


def test_whether_a_step_changed_the_weights(tmp_path):
    (found,) = run_ranks(1, training, tmp_path)
    assert found == ([None, 0.5, 0.0], 1)


def test_old_log_probs_that_nobody_computed_are_null(tmp_path):
    """And a file without them can be asked what it holds."""
    record = StepRecord(sequences=[sequence(0, logp_old=None)], first_sequence=0, num_experts=4)
    layout = dict(rank=0, layer_ids=[1, 3], top_k=2, num_experts=4)
    TokenLogWriter(tmp_path / "tokens", **layout).write(1, record.token_rows())
    table = read_tokens(tmp_path / "tokens")
    assert table["logp_old"].null_count == table["ratio"].null_count == table.num_rows == 3
    assert table["logp_train"].null_count == 0 and not table.schema.field("logp_train").nullable
    assert rate(table, "mismatch")[0].rate == 3 / 6
    with pytest.raises(UserError, match="none of 3 rows has all of"):
        rate(table, "gap")
    assert not [name for name in record.sums() if name.startswith("logp_gap/")]
    assert record.maxima() == {} and "mismatch/router_rate" in record.sums()
    rows = record.token_rows()
    rows["logp_train"] = np.ma.masked_all(3)
    with pytest.raises(UserError, match="column logp_train cannot hold nulls"):
        TokenLogWriter(tmp_path / "other", **layout).write(1, rows)


def test_what_ranks_gathered_of_one_optimizer_step_adds_up():
    mine, other = Step(loss_sum=0.25, updates=1), Step(loss_sum=0.5, updates=1)
    other.loss_metrics.append({"ppo_kl": Metric(1.0, 2.0)})
    yes, no = np.array([True, True, False]), np.array([False, True, False])
    mine.visit(no, np.array([1.0, 1.0, 1.0]), yes)
    other.visit(no, np.array([1.0, -1.0, -1.0]), yes)
    mine.add(other)
    assert (mine.loss_sum, mine.updates, mine.visited) == (0.75, 1, 4)
    assert mine.loss_metrics == other.loss_metrics
    assert {sign: counts.tolist() for sign, counts in mine.clips.items()} == {
        "positive": [1, 3],
        "negative": [1, 1],
    }


def test_a_share_of_the_rows_is_kept(tmp_path):
    run_ranks(2, write, tmp_path, 0.5)
    config = read_config(tmp_path / "run")
    assert (config["token_log"], config["token_log_share"]) == ("sampled", 0.5)
    kept = read_tokens(tmp_path / "run" / "tokens").to_pandas().sequence.unique()
    assert 0 < len(kept) < 3


def test_a_token_whose_routes_are_unknown_may_not_count():
    routes = np.array([(A, A), ((0, 0), B)])
    known = known_rows(routes, num_experts=4)
    assert known.tolist() == [True, False]
    assert known_rows(np.array([(A, (1, 4))]), num_experts=4).tolist() == [False]
    assert known_rows(np.array([(A, (-2, -1))]), num_experts=4).tolist() == [False]
    assert known_rows(np.zeros((2, 1, 1), int), num_experts=4).tolist() == [True, True]
