"""A step's token rows and sums, by hand: two sequences, two MoE layers, two optimizer visits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric, PolicyLossConfig
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.record import SequenceRecord, StepRecord, count_sums, gap_terms, measured
from moe_upgrpo.record.sums import tail_sums
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.routing import compare_routes
from moe_upgrpo.train.analysis import NoiseFloor, OldScores
from moe_upgrpo.train.learner import Learner
from moe_upgrpo.train.place import Place
from moe_upgrpo.train.record import LastVisit, TrainedStep, sequence_records
from moe_upgrpo.train.terms import Terms


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def routes(*rows) -> np.ndarray:
    """One row for each token fed in; each row gives the experts of layer 0 and of layer 1."""
    return np.array(rows, dtype=np.uint8)


A, B, C = (0, 1), (2, 3), (1, 2)
FIRST = Rollout(  # positions 0 1 | 2 3 4: rows 1, 2, 3 belong to the response
    prompt_ids=np.array([5, 6]),
    response_ids=np.array([7, 8, 1]),
    logp_rollout=f32(-1.0, -2.0, -0.5),
    routes=routes((B, B), (A, B), (A, B), (A, A)),
    weight_version=0,
    finished=True,
)
SECOND = Rollout(  # positions 0 | 1 2: rows 0, 1
    prompt_ids=np.array([4]),
    response_ids=np.array([9, 9]),
    logp_rollout=f32(-3.0, -1.0),
    routes=routes((B, A), (C, A)),
    weight_version=0,
    finished=False,
)


def scored(log_probs, entropy, rows, own=None, margins=None) -> Scored:
    """Gates: 3/4 for the first expert of a row and 1/4 for the second."""
    rows = np.array(rows, dtype=np.int16)
    return Scored(
        log_probs=log_probs,
        entropy=entropy,
        routes=rows,
        own_routes=rows if own is None else np.array(own, dtype=np.int16),
        margins=np.ones(rows.shape[:2], np.float32) if margins is None else margins,
        gates=np.broadcast_to(np.array([0.75, 0.25], np.float32), rows.shape).copy()
        if rows.shape[-1] == 2
        else None,
    )


NATIVE = [
    scored(
        f32(-1.1, -2.0, -0.5),
        f32(1.0, 2.0, 3.0),
        # row 0 differs in layer 0, which is the prompt's; row 1 agrees in another order; row 2
        # differs in layer 1, row 3 in both.
        [(A, B), ((1, 0), B), (A, C), (C, B)],
        margins=np.array([(9, 9), (0.5, 0.25), (0.1, 1), (2, 3)], np.float32),
    ),
    scored(f32(-3.0, -1.2), f32(0.5, 0.5), [(B, A), (C, A)]),
]
# Held to the rollout's routes: at rows 0 (the prompt's) and 3 layer 0 would choose otherwise.
HELD = [
    scored(
        f32(-1.05, -2.0, -0.5),
        f32(1.5, 2.0, 3.0),
        FIRST.routes,
        own=[(A, B), (A, B), (A, B), (C, A)],
    ),
    scored(f32(-3.0, -1.1), f32(0.5, 0.5), SECOND.routes),
]
COUNTERPART = [f32(-1.0, -1.5, -0.5), f32(-3.5, -1.2)]


UPDATE = Update(
    log_probs=[],
    clipped=[],
    gradient_weight=[],
    loss=0.5,
    metrics={"m": Metric(1.0, 2.0)},
    grad_norm=1.0,
)
LAST = LastVisit(
    logp_train=[f32(-1.0, -1.0, -0.5), f32(-4.0, -1.2)],
    clipped=[np.array([False, True, False]), np.array([True, False])],
    gradient_weight=[f32(0.1, 0.0, 0.2), f32(0.0, 0.3)],
)


def a_step(*, old=None, num_experts=4, noise=None, **changes) -> TrainedStep:
    fields = dict(
        first_sequence=6,
        group=2,
        replay="none",
        weight_version=0,
        rollouts=[FIRST, SECOND],
        rewards=f32(1, 0),
        advantages=f32(0.7, -0.7),
        old=old or OldScores(native=NATIVE, held=HELD, analysed=True, counterpart=COUNTERPART),
        reference=None,
        last=LAST,
    )
    sequences = sequence_records(**(fields | changes))
    return TrainedStep(
        record=StepRecord(sequences=sequences, first_sequence=6, num_experts=num_experts),
        old=fields["old"],
        updates=[UPDATE, UPDATE],
        updates_counted=2,
        noise=NoiseFloor(sums={"noise/trainer_repeat/k3": Metric(0.0, 5)})
        if noise is None
        else noise,
    )


@pytest.fixture
def step() -> TrainedStep:
    return a_step()


def test_token_rows(step):
    rows = step.record.token_rows()
    expected = {
        "sequence": [6, 6, 6, 7, 7],
        "prompt": [3, 3, 3, 3, 3],
        "position": [2, 3, 4, 1, 2],
        "staleness": [0, 0, 0, 0, 0],
        "token_id": [7, 8, 1, 9, 9],
        "reward": [1, 1, 1, 0, 0],
        "advantage": f32(0.7, 0.7, 0.7, -0.7, -0.7),
        "logp_rollout": f32(-1.0, -2.0, -0.5, -3.0, -1.0),
        "logp_old": f32(-1.1, -2.0, -0.5, -3.0, -1.2),
        "logp_train": f32(-1.0, -1.0, -0.5, -4.0, -1.2),
        "ratio": np.exp(f32(0.1, 1.0, 0.0, -1.0, 0.0)),
        "clipped": [False, True, False, True, False],
        "layers_mismatched": [0, 1, 2, 0, 0],
        # |{2,3} ∩ {1,2}| = 1; |{0,1} ∩ {1,2}| = 1; |{0,1} ∩ {2,3}| = 0
        "overlap": [(2, 2), (2, 1), (1, 0), (2, 2), (2, 2)],
        "rollout_routes": [(A, B), (A, B), (A, A), (B, A), (C, A)],
        "train_routes": [((1, 0), B), (A, C), (C, B), (B, A), (C, A)],
        "gradient_weight": f32(0.1, 0.0, 0.2, 0.0, 0.3),
        # Row 0, the prompt's, differs in one layer, row 2 in one more; the second sequence in none.
        "prefix_mismatched": [1, 1, 2, 0, 0],
        "margin_min": f32(0.25, 0.1, 2, 1, 1),
        "layers_mismatched_conditional": [0, 0, 1, 0, 0],
        "entropy": [1, 2, 3, 0.5, 0.5],
        "gap_numerics": [-0.05, 0, 0, 0, -0.1],
        "gap_engine_routing": [-0.05, 0, 0, 0, -0.1],
        "gap_update": [0.1, 0.5, 0, -0.5, 0],
        "gap_routing_shift": [0, 0.5, 0, -0.5, 0],
    }
    assert rows.keys() == expected.keys()
    for name in ("rollout_routes", "train_routes"):  # a piece for each sequence
        assert [len(piece) for piece in rows[name]] == [3, 2]
        rows[name] = np.concatenate(rows[name])
    for name, values in expected.items():
        np.testing.assert_allclose(rows[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_sums(step):
    named = step.sums()
    sums = {name: tuple(pair) for name, pair in named.items()}
    assert sums["loss/policy"] == (1.0, 2)
    assert sums["reward/mean"] == (1.0, 2)
    assert sums["response/length_mean"] == (5, 2)
    assert sums["response/finished_rate"] == (1, 2)
    assert sums["entropy/mean"] == (7.0, 5)
    assert sums["mismatch/router_rate"] == (3, 10)
    assert sums["mismatch/slot_rate"] == (4, 20)
    assert sums["mismatch/token_any_rate"] == (2, 5)
    assert sums["mismatch/by_layer/0"] == (1, 5) and sums["mismatch/by_layer/1"] == (2, 5)
    assert sums["logp_gap/mean_abs"] == (pytest.approx(0.3), 5)
    # k3 of KL(rollout || trainer): e^gap - 1 - gap at gaps -0.1 and -0.2
    by_hand = (np.exp(-0.1) - 1 + 0.1) + (np.exp(-0.2) - 1 + 0.2)
    assert sums["logp_gap/k3"] == (pytest.approx(by_hand, rel=1e-5), 5)
    assert sums["gap/update/mean"] == (pytest.approx(0.1, abs=1e-6), 5)
    assert sums["gap/update/mean_abs"] == (pytest.approx(1.1, abs=1e-6), 5)
    assert sums["noise/trainer_repeat/k3"] == (0.0, 5)
    assert sums["conditional/router_rate"] == (1, 10)
    assert sums["conditional/by_layer/0"] == (1, 5) and sums["conditional/by_layer/1"] == (0, 5)
    # Rollout's experts against the trainer's, gates 3/4 and 1/4 in the order written:
    # row 1: {0,1} against (1, 0): 1/4 + 1/4; row 2, layer 1: (2,3) against (1,2): 1/4;
    # row 3: (0,1) against (1,2): 1/4, and (0,1) against (2,3): 0. The other five of ten are whole.
    assert sums["conditional/gate_overlap"] == (pytest.approx(0.5 + 1 + 1 + 0.25 + 0.25 + 4), 10)
    metrics = measured(named)
    # Positions 2, 3, 4, 1 and 2: all below 16.
    assert metrics["logp_gap/by_position"] == [pytest.approx(0.06), *[None] * 12]
    assert metrics["mismatch/by_position"] == [0.3, *[None] * 12]
    assert metrics["logp_gap/p50"] < 1e-7 and "logp_gap/p90" not in metrics
    # Ratios e^.1, e, 1, 1/e and 1.
    assert metrics["ratio/beyond_2"] == 2 / 5 and metrics["ratio/beyond_10"] == 0
    assert metrics["logp_gap/beyond_2"] == 0
    assert metrics["advantage/nonzero_rate"] == 1
    assert metrics["entropy/sampled"] == pytest.approx(7.5 / 5)
    # Rows 1 and 2 of the first sequence are alike in the rollout, rows 0 and 1 in the trainer, in
    # another order; the inputs are not.
    assert metrics["mismatch/repeated_rows"] == 1 / 5
    assert metrics["mismatch/repeated_rows_trainer"] == 1 / 5
    assert metrics["mismatch/histogram"] == [3, 1, 1] and metrics["mismatch/by_layer"] == [0.2, 0.4]
    assert metrics["conditional/histogram"] == [4, 1, 0]
    assert metrics["mismatch/zero_rows_by_layer"] == [0, 0]
    maxima = step.record.maxima()
    assert maxima["logp_gap/max_abs"] == pytest.approx(0.2, rel=1e-5)
    assert maxima["ratio/max"] == pytest.approx(np.e, rel=1e-5)


def test_rows_that_were_not_written_again_are_seen():
    """Twelve sequences of 30 tokens, 48 layers: their own rows, one row for all of a sequence, and
    the rows of the first sequence for all of them. Two that ask the same may answer alike."""
    rng = np.random.default_rng(0)

    def repeated(change) -> list[float]:
        sequences = []
        for _ in range(12):
            routes = rng.random((30, 48, 128)).argpartition(8, axis=-1)[..., :8]
            change(routes, [s.rollout_routes for s in sequences])
            sequences.append(
                SequenceRecord(
                    prompt=0, token_ids=rng.integers(0, 999, 31), positions=np.arange(11, 31),
                    reward=0, rollout_routes=routes, train_routes=routes[..., ::-1],
                    **dict.fromkeys(
                        ("advantage", "logp_rollout", "logp_old", "logp_train", "clipped",
                         "gradient_weight"), f32(*[0] * 20),
                    ),
                )
            )  # fmt: skip
        if change is same_answer:
            for sequence in sequences:
                sequence.token_ids = sequences[0].token_ids
        record = StepRecord(sequences=sequences, first_sequence=0, num_experts=128)
        metrics = measured(record.sums())
        assert metrics["mismatch/repeated_rows"] == metrics["mismatch/repeated_rows_trainer"]
        return metrics["mismatch/repeated_rows"]

    def own(routes, others):
        pass

    def one_row(routes, others):
        routes[:] = routes[0]

    def buffer(routes, others):
        routes[:] = others[0] if others else routes

    def same_answer(routes, others):
        buffer(routes, others)

    assert repeated(own) == 0
    assert repeated(one_row) > 0.98  # but for a token that comes twice in a row
    assert repeated(buffer) == 1
    assert repeated(same_answer) == 0


def test_a_step_whose_log_probs_are_no_numbers_has_its_metrics():
    found = measured(tail_sums("logp_gap", np.full(9, np.nan)))
    assert found == {"logp_gap/beyond_2": 1, "logp_gap/beyond_10": 1}


def test_under_r3_the_gap_has_two_terms_and_the_old_policy_is_the_held_one():
    """The gap columns add up to what the loss sees; the free routing's share stands apart."""
    rows = a_step(
        replay="R3", old=OldScores(native=NATIVE, held=HELD, analysed=True)
    ).record.token_rows()
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(rows["logp_old"], [-1.05, -2.0, -0.5, -3.0, -1.1], **close)
    np.testing.assert_allclose(rows["entropy"], [1.5, 2, 3, 0.5, 0.5], **close)
    np.testing.assert_allclose(rows["gap_numerics"], [-0.05, 0, 0, 0, -0.1], **close)
    np.testing.assert_allclose(rows["gap_update"], [0.05, 1, 0, -1, -0.1], **close)
    np.testing.assert_allclose(
        rows["counterfactual_engine_routing"], [-0.05, 0, 0, 0, -0.1], **close
    )
    assert not {"gap_engine_routing", "gap_routing_shift"} & rows.keys()
    assert rows["layers_mismatched"].tolist() == [0, 1, 2, 0, 0]  # free-running all the same


def test_under_r2_the_routing_shift_is_what_the_loss_does_not_see():
    """Held to the old routes, the update's forward is L(θ, n(θ_old)); the native one is extra."""
    rows = a_step(replay="R2").record.token_rows()
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(rows["gap_update"], [0.1, 1, 0, -1, 0], **close)
    np.testing.assert_allclose(rows["counterfactual_routing_shift"], [0, -0.5, 0, 0.5, 0], **close)
    assert "gap_routing_shift" not in rows


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_the_gap_columns_add_up_under_every_replay(replay):
    rng = np.random.default_rng(0)
    of = {k: rng.normal(-3, 1, 50).astype(np.float32) for k in ("rollout", "native", "held")}
    train = rng.normal(-3, 1, 50).astype(np.float32)
    counterpart = None if replay == "R3" else rng.normal(-3, 1, 50).astype(np.float32)
    terms = gap_terms(replay, **of, counterpart=counterpart, train=train)
    total = sum(term for name, term in terms.items() if name.startswith("gap_"))
    np.testing.assert_allclose(total, train.astype(np.float64) - of["rollout"], atol=1e-12)


def test_older_weights_in_the_engine_are_a_term_of_their_own():
    """L(θ_engine, e) stands between μ and L(θ_old, e)."""
    behind = [f32(-1.04, -2.0, -0.25), f32(-3.0, -1.0)]
    old = OldScores(native=NATIVE, held=HELD, analysed=True, counterpart=COUNTERPART, behind=behind)
    step = a_step(old=old, weight_version=1)
    rows = step.record.token_rows()
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(rows["gap_numerics"], [-0.04, 0, 0.25, 0, 0], **close)
    np.testing.assert_allclose(rows["gap_staleness"], [-0.01, 0, -0.25, 0, -0.1], **close)
    np.testing.assert_allclose(rows["gap_update"], [0.1, 0.5, 0, -0.5, 0], **close)
    total = sum(term for name, term in rows.items() if name.startswith("gap_"))
    np.testing.assert_allclose(total, rows["logp_train"] - rows["logp_rollout"], **close)
    assert rows["staleness"].tolist() == [1] * 5
    assert tuple(step.sums()["staleness/mean"]) == (2, 2)


def test_a_dense_model_has_token_rows_and_no_routing():
    def dense(scores):
        nothing = np.empty((len(scores.routes), 0, 0), np.int16)
        return replace(scores, routes=nothing, own_routes=nothing, margins=None)

    step = a_step(
        rollouts=[replace(r, routes=r.routes[:, :0, :0]) for r in (FIRST, SECOND)],
        old=OldScores(native=[dense(s) for s in NATIVE], held=None),
        noise=NoiseFloor(),
        num_experts=0,
    )
    rows = step.record.token_rows()
    assert rows["layers_mismatched"].tolist() == [0] * 5
    assert not {"overlap", "rollout_routes", "margin_min", "prefix_mismatched"} & rows.keys()
    assert not [name for name in measured(step.sums()) if name.startswith("mismatch")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda routes: routes * 0, r"sequence 7: .*MoE layer 0.*zero-filled"),
        (lambda routes: routes + 2, r"sequence 7: .*MoE layer 0: experts \[4, 5\].*ids in 0..3"),
        (lambda routes: routes[:, :1], r"sequence 7: .*same tokens, MoE layers and top-k"),
        (lambda routes: routes | 1, r"sequence 7: .*expected 2 different experts"),
    ],
    ids=["zero-filled", "out of range", "another model's layers", "an expert twice"],
)
def test_routes_that_cannot_be_name_their_sequence(change, words):
    broken = replace(SECOND, routes=change(SECOND.routes))
    with pytest.raises(UserError, match=words):
        a_step(rollouts=[FIRST, broken]).sums()


def test_noise_floor_names_and_counts():
    """Two passes over the same tokens that differ in one of four routers."""
    first = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    second = first.clone()
    second[1, 0] = torch.tensor([1, 2])
    sums = count_sums("noise/x", compare_routes(first, second, num_experts=4, kind="repeat"))
    assert {name: tuple(pair) for name, pair in sums.items()} == {
        "noise/x/router_rate": (1, 4),
        "noise/x/token_any_rate": (1, 2),
        "noise/x/by_layer/0": (1, 2),
        "noise/x/by_layer/1": (0, 2),
        "noise/x/histogram/0": (1, 2),
        "noise/x/histogram/1": (1, 2),
        "noise/x/histogram/2": (0, 2),
    }


class FakeActor:
    """Numbers the visits: the n-th update reports log-prob -n and clips odd visits."""

    chunks = ()

    def __init__(self):
        self.seen: list[list[int]] = []

    def update(self, samples, loss, *, record, terms, at, seed) -> Update:
        self.seen.append([int(s.tokens[0]) for s in samples])
        visit = len(self.seen)
        return Update(
            log_probs=[f32(-visit) for _ in samples],
            clipped=[np.array([visit % 2 == 1]) for _ in samples],
            gradient_weight=[f32(visit) for _ in samples],
            loss=0.0,
            metrics={},
            grad_norm=0.0,
        )


def test_every_epoch_visits_each_sequence_once_and_the_last_visit_counts():
    learner = Learner(
        actor=FakeActor(),
        reference=None,
        behind=None,
        loss=PolicyLossConfig(),
        terms=Terms(),
        place=Place(),
        seed=0,
        minibatches=2,
        epochs=2,
    )
    samples = [Sample(tokens=np.array([i, 1]), prompt_length=1) for i in range(4)]
    scores = [scored(f32(-9), f32(0), np.empty((1, 0, 0))) for _ in samples]
    result = learner.update(samples, [], OldScores(native=scores, held=None), step=1)
    seen = learner.actor.seen
    assert [len(batch) for batch in seen] == [2, 2, 2, 2]
    for epoch in (seen[:2], seen[2:]):
        assert sorted(epoch[0] + epoch[1]) == [0, 1, 2, 3]
    for i in range(4):
        last = 3 if i in seen[2] else 4
        assert result.last.logp_train[i].tolist() == [-last]
        assert result.last.clipped[i].tolist() == [last % 2 == 1]
        assert result.last.gradient_weight[i].tolist() == [last]
