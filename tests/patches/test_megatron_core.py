"""Every fault of Megatron-Core that is patched, mended or refused, on the installed release.

Patches: wrong on a copy of the release before, right after. behaviour.py says what is checked, and
faults.json on which releases each fault stands. Not covered: Transformer Engine's layers, grouped
experts, CUDA, NCCL; there the same lines are changed as in the layers that run here.
"""

import os
import shutil

import pytest

from moe_upgrpo import patching
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import backend, releases
from moe_upgrpo.megatron.layout import Layout
from tests.patches import faults

INSTALLED = str(releases.installed())
STANDS = "1000"  # in every release so far
UNPATCHED = {  # and the first release without the fault
    "shards_of_different_sizes": STANDS,
    "norm_with_sequence_parallel": STANDS,
    "latent_head_sizes": STANDS,
    "marks_without_initialisation": "0.18",
    "few_groups": STANDS,
    "gates_not_normalised": STANDS,
    "rotary_halves": STANDS,
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory, megatron_root, megatron_series):
    """The error of each check, by copy: "before" and, where there are patches, "after" them."""
    running = {}
    for name in ("before", "after") if megatron_series else ("before",):
        root = tmp_path_factory.mktemp(name)
        # The rest by links: it is imported from where it is installed.
        shutil.copytree(
            megatron_root / "megatron/core",
            root / "megatron/core",
            ignore=shutil.ignore_patterns("__pycache__"),
            copy_function=os.symlink,
        )
        if megatron_series:
            for file in megatron_series.files:
                (root / file).unlink()
                shutil.copy2(megatron_root / file, root / file)
        if name == "after":
            patching.Checkout(megatron_series, root).apply()
        running[name] = root, faults.start(root, root)
    found = {}
    for name, (root, process) in running.items():
        result = faults.result(process)
        assert result["megatron"].startswith(str(root))  # the copy was imported
        found[name] = result["checks"]
    return found


def as_recorded(checked, name: str) -> str | None:
    """The recorded error of the installed release, after a look that it is what is seen."""
    record = faults.read()
    assert INSTALLED in record, f"no column for {INSTALLED}: python -m tests.patches.faults"
    recorded, seen = record[INSTALLED][name], faults.in_one_line(checked["before"][name])
    assert (recorded is None) == (seen is None), seen or "the fault is gone"
    if recorded:
        assert seen.split(":")[0] == recorded.split(":")[0]  # the kind of the error
    return recorded


def patched(checked, series, name: str, error: str, *, until: str) -> None:
    """The fault stands, with `error`, in releases before `until`, and its patch mends it."""
    recorded = as_recorded(checked, name)
    assert (recorded is not None) == (releases.installed() < releases.Version(until))
    if recorded is None:
        assert series is None or not any(
            patch.test.endswith(f"::test_{name}") for patch in series.patches
        )
        return
    assert error in checked["before"][name]
    if series:
        assert any(patch.test.endswith(f"::test_{name}") for patch in series.patches)
        assert checked["after"][name] is None, checked["after"][name]


def test_router_without_transformer_engine(checked, megatron_series):
    name = "router_without_transformer_engine"
    error = "NameError: name 'te_general_gemm' is not defined"
    patched(checked, megatron_series, name, error, until="0.17")


def test_mla_without_transformer_engine(checked, megatron_series):
    old = releases.installed() < releases.Version("0.17")
    error = "TypeError: isinstance() arg 2 must be a type" if old else "Unsupported linear_kv_down"
    patched(checked, megatron_series, "mla_without_transformer_engine", error, until=STANDS)


def test_query_without_latent(checked, megatron_series):
    """A change of 0.19; before it, the check also shows that the comparison can succeed."""
    if releases.installed() < releases.Version("0.19"):
        assert as_recorded(checked, "query_without_latent") is None
    else:
        error = "meaning it will not be used"
        patched(checked, megatron_series, "query_without_latent", error, until=STANDS)


def test_splits_on_cpu(checked, megatron_series):
    patched(checked, megatron_series, "splits_on_cpu", "AssertionError", until=STANDS)


def test_replay_with_router_fusion(checked, megatron_series):
    patched(checked, megatron_series, "replay_with_router_fusion", "AssertionError", until=STANDS)


def test_expert_gradients_with_etp(checked, megatron_series):
    """Half of the gradients are wrong: those of the experts, by as much as they are large."""
    name, error = "expert_gradients_with_etp", "gradients are wrong"
    patched(checked, megatron_series, name, error, until="0.19")


def test_two_interleaved_stages(checked, megatron_series):
    error = "135 of 135 gradients are wrong"
    patched(checked, megatron_series, "two_interleaved_stages", error, until=STANDS)


def test_rotary_key_gradient(checked, megatron_series):
    """In the local layer spec's latent attention, which the package itself does without."""
    patched(checked, megatron_series, "rotary_key_gradient", "gradients are wrong", until=STANDS)


def test_outputs_in_flight(checked, megatron_series):
    error = "freed and still to be sent"
    patched(checked, megatron_series, "outputs_in_flight", error, until=STANDS)


@pytest.mark.parametrize("name", UNPATCHED)
def test_what_is_refused_or_replaced_has_its_reason(checked, name):
    stands = releases.installed() < releases.Version(UNPATCHED[name])
    assert (as_recorded(checked, name) is not None) == stands
    if "after" in checked:
        assert (checked["after"][name] is not None) == stands


def test_every_fault_has_a_test():
    named = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert named | UNPATCHED.keys() >= faults.FAULTS.keys()


def test_what_is_mended_upstream_is_not_mended_or_refused_here():
    stands = faults.read()[INSTALLED]
    mended = {mend.name for mend in backend.mends()}
    assert ("te_general_gemm" in mended) == bool(stands["router_without_transformer_engine"])
    assert bool({"HAVE_TE", "Linear"} & mended) == bool(stands["mla_without_transformer_engine"])
    if stands["expert_gradients_with_etp"]:
        with pytest.raises(UserError, match=f"Megatron-Core {INSTALLED} leaves"):
            Layout(tp=2, etp=1)
    else:
        assert Layout(tp=2, etp=1).expert_tp == 1


def test_the_record_is_of_supported_releases_the_oldest_and_the_newest_among_them():
    minors = {".".join(version.split(".")[:2]) for version in faults.read()}
    assert minors == {"0.16", "0.17", "0.18", "0.19"}
    for version, checks in faults.read().items():
        assert releases.SUPPORTED_SET.contains(version) and checks.keys() == faults.FAULTS.keys()
    series = {s.version for s in patching.of_stack("megatron-core")}
    assert {min(faults.read()), max(faults.read())} == series
