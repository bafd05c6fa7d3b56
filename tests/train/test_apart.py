"""Ranks that do not see the run's folder: who they are, what is refused, and what they send."""

import os
import socket
from pathlib import Path

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.store import RunFolder
from moe_upgrpo.train import apart
from tests.ranks import run_ranks


def refusal(check, *words, **named) -> str:
    try:
        check(*words, **named)
    except UserError as error:
        return str(error)
    return ""


def on_a_rank(shared: Path, own: Path):
    """Rank 2 of 3 has a folder of its own under the common name; it and rank 1 write rows."""
    rank = int(os.environ["RANK"])
    groups._SENT = 7
    run = RunFolder(own / str(rank) if rank == 2 else shared)
    run.tokens.mkdir(parents=True, exist_ok=True)
    asked = dict(resumes=False, states=False, rollouts=False)
    with groups.process_groups(Layout()):
        found = {
            "apart": apart.check(run, **asked),
            "shared": apart.without(own, make=True),
            "absent": apart.without(own / "nowhere"),
            "states": refusal(apart.check, run, **asked | {"states": True}),
            "model": refusal(apart.check_model, run.path),
        }
        rows = apart.Apart(run, found["apart"])
        for step in (1, 2):
            for size in (0, 7, 20)[: rank and 3]:
                file = rows.folder / f"step-{step}-rank-{rank}-{size}.parquet"
                file.write_bytes(bytes(range(size)))
            rows.send()
        found["left"] = sorted(path.name for path in rows.folder.iterdir())
    return found


def test_ranks_that_do_not_see_the_folder_send_and_what_needs_it_is_refused(tmp_path):
    shared, own, here = tmp_path / "shared", tmp_path / "own", socket.gethostname()
    shared.mkdir()
    (shared / "config.json").touch()
    found = run_ranks(3, on_a_rank, shared, own)
    for of_rank in found:
        assert of_rank["apart"] == [2] and of_rank["shared"] == [] == of_rank["absent"]
        named = f"host {here} (rank 2): no such folder as "
        assert of_rank["states"].startswith(f"{named}rank 0's {shared} (host {here}). --save-every")
        assert of_rank["model"].startswith(named) and "--cache-dir" in of_rank["model"]
    sizes = {
        f"step-{s}-rank-{r}-{n}.parquet": n for s in (1, 2) for r in (1, 2) for n in (0, 7, 20)
    }
    assert found[0]["left"] == sorted(sizes) and found[2]["left"] == []
    for name, size in sizes.items():
        assert (shared / "tokens" / name).read_bytes() == bytes(range(size))
    assert not list((own / "2" / "tokens").iterdir())
