"""Each setting of a published replay script of slime and of miles: what becomes of it; the page.

On stand-ins of hooks.json's data, at the script's revision.
"""

import functools
import importlib
import json
import re
from pathlib import Path

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations import hooks
from tests.integrations import slime_scripts
from tests.integrations.places import CHECKOUTS, with_checkout
from tests.integrations.stand_ins import installed
from tests.integrations.test_slime_stand_ins import Manager, args_of, installed_miles


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_UPGRPO_RUN", str(tmp_path / "run"))


def value_of(text):
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def verdict(ours, settings: list[dict], **flags) -> str:
    """Give what our init hook says of a job with our lines and these settings."""
    stack = ours.__name__.rsplit(".", 1)[1]
    given = args_of(stack, **flags)
    given.use_routing_replay = True  # as the stack sets it with --use-rollout-routing-replay
    for one in settings:
        name = one["flag"].removeprefix("--").replace("-", "_")
        setattr(given, name, True if one["value"] is True else value_of(one["value"]))
    actor = importlib.import_module(f"{stack}.backends.megatron_utils.actor")
    vars(actor).pop("moe_upgrpo_log", None)
    try:
        ours.init(given)
    except UserError as refused:
        return str(refused)
    assert actor.moe_upgrpo_log.mode == "R3"
    return "accepted"


@pytest.mark.parametrize("stack", ["slime", "miles"])
def test_each_setting_of_a_published_replay_script(stack, run):
    script = slime_scripts.read()[stack]
    settings, revision = script["settings"], script["revision"]
    assert revision == CHECKOUTS[stack][1]  # else the next test would be skipped for every checkout
    flags = {one["flag"] for one in settings}
    assert len(flags) > 60 and {"--use-rollout-routing-replay", "--context-parallel-size"} <= flags
    managers = Manager("routing", ""), Manager("indexer", "")
    opened = {
        "slime": functools.partial(installed, "slime", revision),
        "miles": functools.partial(installed_miles, revision, *managers),
    }
    with opened[stack]() as ours:
        for one in settings:
            found = verdict(ours, [one])
            assert (found == "accepted") == one["accepted"], (one, found)
        assert verdict(ours, settings) == "accepted"
        # That the check can refuse, and what the note says of TIS.
        fused = {"flag": "--moe-router-fusion", "value": True}
        assert "moe_router_fusion under R3" in verdict(ours, [*settings, fused])
        tis = [*settings, {"flag": "--use-tis", "value": True}]
        told = verdict(ours, tis, moe_upgrpo_loss="up-gspo")
        assert "--use-tis: given with up-gspo, a loss of whole sequences" in told
        assert verdict(ours, tis, moe_upgrpo_loss="gspo-token") == "accepted"


@pytest.mark.parametrize(("stack", "checkout"), with_checkout("slime", "miles"))
def test_the_settings_are_the_scripts_own(stack, checkout):
    script = slime_scripts.read()[stack]
    if hooks.difference(stack, checkout, script["revision"]):
        pytest.skip(f"the checkout is not at {script['revision']}, whose script it is")
    text = (checkout / script["script"]).read_text(encoding="utf-8")
    for one in script["settings"]:
        assert one["flag"] in text, one
        assert one["value"] is True or one["value"][0] == "/" or one["value"] in text, one


def test_the_page_names_every_revision_and_its_line_can_be_copied():
    page = (Path(__file__).parents[2] / "docs" / "slime.md").read_text(encoding="utf-8")
    for stack in ("slime", "miles"):
        for revision in hooks.read()[stack]:
            assert f"{revision}" in page, (stack, revision)
    (line,) = re.findall(r"--runtime-env-json='(.*)'", page)
    assert json.loads(line)["env_vars"]["MOE_UPGRPO_RUN"] == "/runs/one"
