"""`moe-upgrpo diagnose` of two dumps and of run folders: what it says, writes and refuses."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from benchmarks.diagnose.faults import FAULTS, injected
from benchmarks.diagnose.pairs import make_pair
from benchmarks.diagnose.records import write_dumps, write_run
from moe_upgrpo.errors import UserError
from moe_upgrpo.store import RunFolder
from moe_upgrpo.tools.diagnose import expected, verdict
from moe_upgrpo.tools.diagnose.command import diagnose
from moe_upgrpo.tools.diagnose_options import DiagnoseConfig
from moe_upgrpo.train.command_line import parsed
from tests.ranks import run_command


def diagnosed(**options):
    """The diagnosis, and what was printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=120, markup=False, highlight=False)
    return diagnose(DiagnoseConfig(**options), console), printed.getvalue()


def dumps(folder, evidence, *names) -> dict:
    folder.mkdir(exist_ok=True)
    found = write_dumps(folder, evidence)
    return {name: path for name, path in found.items() if not names or name in names}


ROUTES = ("rollout_routes", "train_routes")
LOG_PROBS = ("rollout_logp", "train_logp")


def test_two_dumps_in_a_command_and_what_a_remedy_removed(tmp_path):
    """The rows of the trainer's dump are one late; mended, the command says what is left."""
    shifted = dumps(tmp_path / "a", injected("rows one late"), *ROUTES)
    words = [
        *("diagnose", "--rollout-routes", shifted["rollout_routes"]),
        *("--train-routes", shifted["train_routes"], "--num-experts", 16),
        *("--dump-samples", 2, "--output-dir", tmp_path / "out"),
    ]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    about, *said = result.stdout.splitlines()
    assert about == "Diagnosis of dumps of 20 sequences"
    assert said[0].startswith("Engine and trainer choose other experts in 9")
    assert said[1].startswith("The cause is that one side's rows belong to the token before or")
    assert said[2].startswith("With that mended ")
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert found["first_cause"] == "row-off-by-one" and found["sentences"] == said[:3]
    first = found["findings"][0]
    assert 0.9 < first["low"] < first["share"] < first["high"] <= 1
    assert first["what"]["remedy"] in result.stdout
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    assert all(text in page for text in ("row-off-by-one", "<style>", "Is it expected?"))
    assert "http" not in page.replace("http://www.w3.org", "")

    clean = dumps(tmp_path / "b", make_pair().evidence, *ROUTES)
    now, printed = diagnosed(
        **clean, num_experts=16, dump_samples=2, before=tmp_path / "out" / "diagnosis.json",
        output_dir=tmp_path / "again",
    )  # fmt: skip
    then = found["measured"]["routers"]["value"]
    left = now.measured.routers.value
    assert now.since["gone"] == ["row-off-by-one"] and now.since["new"] == []
    assert now.since["figures"][0]["removed"] == pytest.approx(1 - left / then)
    assert f"routers that differ {100 * then:.3g}% → {100 * left:.3g}%" in printed
    assert now.sentences[1].startswith("No fault was found in ")


@pytest.mark.parametrize("name", ["padded on either side", "zero-filled rows", "ids in eight bits"])
def test_faults_in_padded_dumps(name, tmp_path):
    """Dumps are padded at their end, which is no fault of theirs."""
    experts = FAULTS[name].shape.experts
    found, _ = diagnosed(
        **dumps(tmp_path, injected(name), *ROUTES), num_experts=experts, output_dir=tmp_path
    )
    assert found.first.cause == FAULTS[name].cause


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3), (3, 0, 1, 2)], ids=str)
def test_axes_of_a_whole_batch(order, tmp_path):
    paths = dumps(tmp_path, make_pair().evidence, *ROUTES)
    batch = np.load(paths["train_routes"])
    np.save(paths["train_routes"], batch.transpose(order))
    found, _ = diagnosed(**paths, num_experts=16, output_dir=tmp_path)
    assert found.first.cause == "transposed-axes"
    assert found.measured.left.value < 0.1


def test_log_probs_alone(tmp_path):
    """No routes: the questions to log-probs are answered, and the others are said not to be."""
    evidence = injected("log-probs of temperature 0.7")
    found, printed = diagnosed(**dumps(tmp_path, evidence, *LOG_PROBS), output_dir=tmp_path)
    assert found.first.cause == "other-temperature"
    assert "at a temperature 0.69" in found.first.shown_by
    assert found.sentences[0].startswith("No routes are compared, and a token's log-prob differs")
    assert "not asked: routes: rows, layers, experts; the routes of both sides" in printed


@pytest.mark.parametrize("name", ["experts permuted in each layer", "log-probs not written"])
def test_a_run_folder(name, tmp_path):
    run = write_run(tmp_path / "run", injected(name))
    found, printed = diagnosed(run=run)
    assert found.first.cause == FAULTS[name].cause
    assert (run / "diagnosis.html").is_file() and (run / "diagnosis.json").is_file()
    assert len(found.measured.by_layer) == 6 and "tokens of steps 1" in printed


def test_a_clean_run_is_within_what_is_expected(tmp_path, monkeypatch):
    asked = {}

    def rate(*shape, **of):
        asked.update(of, shape=shape)
        return expected.Expected(low=0.01, middle=0.03, high=0.2, source="a rule")

    monkeypatch.setattr("moe_upgrpo.tools.diagnose.command.expected_rate", rate)
    evidence = make_pair().evidence
    run = write_run(tmp_path / "run", evidence, alarms={})
    RunFolder(run).append_metrics({"step": 2, "alarms": ["large-log-prob-gap"]})
    found, printed = diagnosed(run=run)
    assert asked["shape"] == (16, 4, 6, "bf16") and asked["trained"] is True
    smallest = np.concatenate(
        [m[rows].min(axis=1) for m, rows in zip(evidence.margins, evidence.response, strict=True)]
    )
    assert asked["margins"] == pytest.approx(np.median(smallest), rel=1e-6)
    assert (
        "is within the 1% to 20% expected of this model's shape and precision"
        in (found.sentences[2])
    )
    assert "ALARM large-log-prob-gap at 1 step: KL(rollout" in printed
    assert [one.kind for one in found.findings] == ["numerics"] * len(found.findings)


def test_a_run_without_routes_says_what_it_can(tmp_path):
    """Overlaps alone: how many differ, by layer, at which margins, and what is expected."""
    evidence = make_pair().evidence
    kept = write_run(tmp_path / "kept", evidence)
    counted = write_run(tmp_path / "counted", evidence, routes=False)
    (whole, _), (found, printed) = (diagnosed(run=run) for run in (kept, counted))
    assert found.measured.routers == whole.measured.routers
    assert found.measured.by_layer == whole.measured.by_layer
    assert found.sentences[2] == whole.sentences[2] and "expected of this" in found.sentences[2]
    assert [one.cause for one in found.findings] == ["near-ties"]
    assert "not asked: routes: rows, layers, experts" in printed


def test_nothing_differs(tmp_path):
    evidence = make_pair().evidence
    same = replace(evidence, train_routes=evidence.rollout_routes, logp_train=evidence.logp_rollout)
    found, _ = diagnosed(**dumps(tmp_path, same), num_experts=16, output_dir=tmp_path)
    assert found.findings == [] and found.measured.routers.value == 0
    assert found.sentences[0].startswith("None of ")
    assert found.sentences[1].endswith("and nothing is left to explain.")


def test_that_nothing_was_seen_is_below_what_is_expected_only_of_much(tmp_path):
    """None of 10 prompts' n routers: at most 10 (40^.4 − 1) / 4 n, 8.4 of n. Of 960 that is .87%,
    more than the .2% that is expected at least; of 96,000 it is less."""
    one = np.load(dumps(tmp_path, make_pair().evidence, *ROUTES)["rollout_routes"])[:, :8]

    def of(times, *, samples=2):
        paths = {name: tmp_path / f"{name}.npy" for name in ROUTES}
        for path in paths.values():
            np.save(path, np.tile(one, (1, times, 1, 1)))
        found, _ = diagnosed(**paths, num_experts=16, dump_samples=samples, output_dir=tmp_path)
        return found.measured.routers, found.sentences[2]

    few, said = of(1)
    bound = (0.025 ** (-4 / 10) - 1) / (4 * 96)
    assert few.value == 0 and (few.low, few.high) == (0, pytest.approx(bound))
    assert said.startswith(f"That, 0% (0% to {100 * bound:.3g}%), is not clearly outside the ")
    all_P = verdict._figure(make_pair().evidence, "all", [48] * 20, [48] * 20, "share")
    assert (all_P.low, all_P.high) == (pytest.approx(1 - bound), 1)
    many, said = of(100)
    assert many.high == pytest.approx(bound / 100) and " is below the " in said
    assert said.endswith(" expected of this model's shape and precision.")
    few, said = of(1, samples=None)  # one prompt, so to say: no interval, and that is said
    assert few.low is None and " is below the " in said
    assert said.endswith("with fewer than 8 prompts told apart, that may be chance.")


def test_two_files_without_options_are_both_sides_and_each_diagnosis_has_a_folder(
    tmp_path, monkeypatch
):
    """Typed as compare_routes takes them; the second leaves the first as it was."""
    monkeypatch.chdir(tmp_path)
    paths = dumps(tmp_path / "a", make_pair().evidence, *ROUTES)
    named, _ = diagnosed(**paths, num_experts=16, output_dir=tmp_path / "named")
    words = [str(paths["rollout_routes"]), str(paths["train_routes"]), "--num-experts", "16"]
    folders = []
    for _ in range(2):
        config = parsed(DiagnoseConfig, words, "moe-upgrpo diagnose")
        printed = io.StringIO()
        console = Console(file=printed, width=120, markup=False, highlight=False)
        assert diagnose(config, console).sentences == named.sentences
        assert len(named.sentences[2]) < 130
        source = next(x for x in printed.getvalue().splitlines() if x.startswith("expected: "))
        assert source.endswith("the engine is taken to be in bf16, --precision says otherwise")
        folders.append(config.folder)
    assert len({*folders}) == 2 and all(x.parent.name == "runs" for x in folders)
    assert all((folder / "diagnosis.html").is_file() for folder in folders)

    engine = paths["rollout_routes"]
    refused("is a file. For a run name its folder", run=engine)
    refused("a folder where a route dump is needed", run=tmp_path, trainer=tmp_path / "a")
    refused("leave one of the two out", **paths, run=engine, trainer=engine, num_experts=16)


def refused(says: str, **options):
    with pytest.raises(UserError) as error:
        diagnosed(**options)
    assert says in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.fault(
    "Problems and routes",
    "a diagnosis of dumps of other prompts, of a run without token log, of nothing",
    "one message, which says which questions can still be answered",
)
def test_what_cannot_be_diagnosed_says_what_still_can(tmp_path):
    refused("nothing to diagnose: name a run folder")
    refused("several things to diagnose", run=tmp_path, model=tmp_path)
    refused("--prompts is missing", model=tmp_path)
    refused("--model is missing", prompts=tmp_path)
    refused("without --train-routes", rollout_routes=tmp_path)
    refused("--num-experts is missing", rollout_routes=tmp_path, train_routes=tmp_path)
    refused("--minutes goes with a checkpoint", run=tmp_path, minutes=1.0)
    config = {"loss": "grpo", "token_log": "aggregate", "moe_layers": [0]}
    run = RunFolder.create(tmp_path / "run", config).path
    RunFolder(run).append_metrics({"step": 1})
    refused("Still answered: whether routing is to blame", run=run)
    paths = dumps(tmp_path / "a", make_pair().evidence, *ROUTES)
    fewer = np.load(paths["train_routes"])[:7]
    np.save(paths["train_routes"], fewer)
    refused("(rollout routes 20, train routes 7): they belong to", num_experts=16, **paths)
    flat = paths | {"train_routes": tmp_path / "flat.npy"}
    np.save(flat["train_routes"], fewer[0])
    refused("one is a batch of sequences and the other a row", num_experts=16, **flat)
    logps = dumps(tmp_path / "b", make_pair().evidence, *LOG_PROBS)
    np.save(logps["train_logp"], -np.load(logps["train_logp"]))
    refused("log-probs are above 0", **logps)
    paths = dumps(tmp_path / "c", make_pair().evidence)
    refused("both sides' routes have ids up to 15 or more: a layer has 16", num_experts=8, **paths)
    right = np.load(paths["train_logp"])
    np.save(paths["train_logp"], right[:, :-5])
    refused(f"of {right.shape[1]} tokens a sequence and the trainer's of", num_experts=16, **paths)
    np.save(paths["train_logp"], np.full_like(right, np.nan))
    refused("no token has a log-prob on both sides (numbers: rollout", num_experts=16, **paths)
    (tmp_path / "no.json").write_text("{}")
    taken, logps = tmp_path / "no.json", dumps(tmp_path / "d", make_pair().evidence, *LOG_PROBS)
    refused(f"--output-dir {taken}: File exists", **logps, output_dir=taken)
    refused("is no diagnosis.json", run=run, before=tmp_path / "no.json")
    refused("--before", run=run, before=tmp_path / "absent.json")


def test_dumps_of_other_prompts_are_named(tmp_path):
    """As many sequences, and nothing in common: that is the cause, and what still holds is said."""
    found, printed = diagnosed(
        **dumps(tmp_path, injected("other prompts"), *ROUTES), num_experts=16, output_dir=tmp_path
    )
    assert found.first.cause == "unrelated-tokens"
    assert "what is said of one side alone, such as rows that were never written, still" in printed


@pytest.mark.parametrize("rows", [499, 400, 40, 510])
def test_dumps_of_other_lengths_say_how_many_rows_were_compared(rows, tmp_path):
    rng = np.random.default_rng(0)
    both = rng.random((520, 4, 16)).argsort(axis=-1)[..., :2].astype(np.uint8)
    paths = {name: tmp_path / f"{name}.npy" for name in ROUTES}
    for path, kept in zip(paths.values(), (500, rows), strict=True):
        np.save(path, both[:kept])
    found, printed = diagnosed(**paths, num_experts=16, output_dir=tmp_path)
    assert found.first.cause == "extra-rows"
    if rows == 499:
        said = "the engine has 1 more for each sequence: without the last 0.0% of routers differ"
    else:
        said = f"500 rows of the engine against {rows} of the trainer: only {min(500, rows)}, the"
    assert said in " ".join(printed.split())


def test_of_a_large_batch_prompts_spread_over_it_stand_for_all(tmp_path, monkeypatch):
    """Ten prompts of two responses: eight, the least that have an interval, are kept whole."""
    monkeypatch.setattr("moe_upgrpo.tools.diagnose.inputs.ROUTERS", 1600)
    paths = dumps(tmp_path, injected("experts permuted"), *ROUTES)
    found, printed = diagnosed(**paths, num_experts=16, dump_samples=2, output_dir=tmp_path)
    assert "dumps of 16 of 20 sequences, spread over them" in printed
    assert found.first.cause == "experts-permuted"
