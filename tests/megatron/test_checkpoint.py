"""A training state goes through the layouts: written in one, read in the next, written there again.

Each job reads what the one before wrote, writes it anew, and makes one more optimizer step. What is
written is the same to the last bit in every layout (weights, fp32 weights, moments, schedule), and
so a chain of layouts stands for every pair of them. The step after it is that of the first job: in
the same layout to the last bit, in another to rounding.

Not covered: NCCL, more than 4 ranks, the fused Adam of Transformer Engine or Apex.
"""

import errno
import io
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import checkpoint_files, groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.checkpoint import load_state, ready_state, save_state
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings
from tests.megatron.compare import assert_close, cosine, flat
from tests.megatron.measured import make_samples
from tests.ranks import run_ranks

LOSS = PolicyLossConfig.preset("up-grpo")
ONE = (1, Layout())
TP2_EP2 = (2, Layout(tp=2, ep=2))
DP2 = (2, Layout())
PP2_VPP2 = (2, Layout(pp=2, vpp=2))
TP2 = (2, Layout(tp=2))
ALL = (4, Layout(tp=2, ep=2, pp=2))
EP2_DP2 = (4, Layout(ep=2))
CP2_EP2 = (2, Layout(cp=2, ep=2))
CP2_TP2 = (4, Layout(cp=2, tp=2))

# name -> checkpoint, dtype, algorithm, layouts in the order in which they read from each other; the
# first reads again at the end.
CHAINS = {
    "fp32": ("mixed", "float32", "adam", (TP2_EP2, ALL, DP2, PP2_VPP2)),
    "bf16": ("mixed", "bfloat16", "adam", (TP2_EP2, DP2)),
    "tied embeddings": ("dense", "float32", "adam", (PP2_VPP2, ONE)),
    "expert bias, latent attention": ("deepseek", "float32", "adam", (TP2_EP2, ONE)),
}
SLOW_CHAINS = {
    "sgd, bf16": ("mixed", "bfloat16", "sgd", (TP2_EP2, PP2_VPP2)),
    "fp32, other layouts": ("mixed", "float32", "adam", (EP2_DP2, TP2, ONE, ALL)),
    "bf16, stages": ("mixed", "bfloat16", "adam", (PP2_VPP2, EP2_DP2, TP2)),
    "sgd, fp32": ("mixed", "float32", "sgd", (TP2_EP2, PP2_VPP2)),
    "parts of sequences": ("mixed", "float32", "adam", (CP2_EP2, ONE, CP2_TP2)),
    "parts of sequences, sgd": ("mixed", "float32", "sgd", (CP2_EP2, TP2)),
}


def exported(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in actor.export_weights()}


def job(layout, checkpoint, dtype, algorithm, source, target) -> dict:
    """Two steps, or what `source` holds; written to `target`; and one step more."""
    with groups.process_groups(layout):
        settings = OptimizerSettings(algorithm=algorithm, lr=1e-2, warmup_steps=4)
        options = {"dtype": dtype, "micro_batch_size": 3}
        actor = MegatronActor(checkpoint, layout, optimizer=settings, **options)
        behind, reference = (MegatronActor(checkpoint, layout, **options) for _ in range(2))
        dp_rank, dp_size = groups.data_parallel()
        share = len(make_samples()) // dp_size
        mine = make_samples()[dp_rank * share : (dp_rank + 1) * share]
        if source is None:
            actor.update(mine, LOSS)
            behind.take_weights(actor)
            actor.update(mine, LOSS)
            reference.take_weights(actor)
        else:
            load_state(source, actor, behind, reference)
        save_state(target, actor, behind, reference)
        models = {"actor": actor, "behind": behind, "reference": reference}
        before = {name: exported(one) for name, one in models.items()}
        update = actor.update(mine, LOSS)
        return before | {
            "after": exported(actor),
            "grad_norm": update.grad_norm,
            "rates": {group["lr"] for group in actor.optimizer.param_groups},
        }


def contents(folders) -> list[dict]:
    """All tensors of each checkpoint, whole, and the schedule."""
    with groups.process_groups(Layout()):
        return [
            dist_checkpointing.load_plain_tensors(str(folder))
            | dist_checkpointing.load_common_state_dict(str(folder))["scheduler"]
            for folder in folders
        ]


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(expected) > 40
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


@pytest.fixture(
    scope="module",
    params=[*CHAINS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CHAINS)],
)
def chain(request, checkpoints, tmp_path_factory):
    """The chain, and what each job gave, and its folder."""
    checkpoint, dtype, algorithm, layouts = (CHAINS | SLOW_CHAINS)[request.param]
    folder = tmp_path_factory.mktemp("chain")
    done, source = [], None
    for i, (ranks, layout) in enumerate([*layouts, layouts[0]]):
        target = folder / str(i)
        target.mkdir()
        results = run_ranks(
            ranks, job, layout, checkpoints[checkpoint], dtype, algorithm, source, target
        )
        done.append((results, target))
        source = target
    return (dtype, algorithm), done


def test_what_is_written_is_the_same_in_every_layout(chain):
    (dtype, algorithm), done = chain
    (first, _), *others = done
    ((expected, *found),) = run_ranks(1, contents, [folder for _, folder in done])
    kinds = {name.split(".")[2] for name in expected if name.startswith("optimizer.state.")}
    sgd = {"param"} if dtype == "bfloat16" else set()
    assert kinds == ({"param", "exp_avg", "exp_avg_sq"} if algorithm == "adam" else sgd)
    assert expected["num_steps"] == 2
    moved = [n for n, w in first[0]["actor"].items() if not torch.equal(w, first[0]["behind"][n])]
    assert len(moved) > 0.5 * len(first[0]["actor"])
    assert_same(first[0]["reference"], first[0]["actor"])
    for tensors, (results, _) in zip(found, others, strict=True):
        assert_same(tensors, expected)
        for rank in results:
            assert_same(rank["actor"], first[0]["actor"])
            assert_same(rank["behind"], first[0]["behind"])
            assert_same(rank["reference"], first[0]["reference"])


@pytest.mark.bits
def test_back_in_the_same_layout_the_next_step_is_the_same_to_the_last_bit(chain):
    _, ((first, _), *_, (again, _)) = chain
    for rank, expected in zip(again, first, strict=True):
        assert_same(rank["after"], expected["after"])
        assert rank["grad_norm"] == expected["grad_norm"] > 0
        assert rank["rates"] == expected["rates"] == {1e-2 * 3 / 4}


def test_in_another_layout_the_next_step_is_the_same_to_rounding(chain):
    """fp32: 1e-4 of the largest entry, as Adam divides by small moments. bf16 keeps 8 bits, and
    routes may flip, how many by the CPU's kernels (cosines of .93 and .97 were seen, norms 10%
    apart): the direction of the step is compared."""
    (dtype, _), ((first, _), *others) = chain
    before, expected = first[0]["actor"], first[0]["after"]
    moved = flat(expected) - flat(before)
    assert moved.norm() > 0
    for results, _ in others:
        for rank in results:
            assert rank["rates"] == first[0]["rates"]
            if dtype == "float32":
                assert_close(rank["after"], expected, 1e-4)
                assert rank["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-4)
            else:
                assert cosine(flat(rank["after"]) - flat(before), moved) > 0.85
                assert rank["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=0.3)


@pytest.fixture(scope="module")
def state(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    run_ranks(1, job, Layout(), checkpoints["tiny"], "float32", "adam", None, folder)
    return folder


def read(checkpoint, folder) -> str:
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoint, Layout(), optimizer=OptimizerSettings())
        try:
            load_state(folder, actor)
        except UserError as error:
            return str(error)
        return "read"


def test_a_state_of_another_model_is_refused(checkpoints, state):
    assert run_ranks(1, read, checkpoints["tiny"], state) == ["read"]
    (message,) = run_ranks(1, read, checkpoints["mixed"], state)
    assert f"{state} does not hold this model's training state" in message


def as_before(checkpoint, old, new) -> None:
    """Write a state as torch's writer alone does, read it, and write what was read as we do."""
    with groups.process_groups(Layout()):
        actor, other = (
            MegatronActor(checkpoint, Layout(), optimizer=OptimizerSettings()) for _ in range(2)
        )
        actor.update(make_samples(), LOSS)
        with (
            mock.patch.object(checkpoint_files, "_Planner", checkpoint_files.MCoreSavePlanner),
            mock.patch.object(checkpoint_files, "_without_crc", nullcontext),
        ):
            save_state(old, actor)
        load_state(old, other)
        save_state(new, other)


def test_a_state_in_torchs_own_archives_is_read(checkpoints, tmp_path):
    """With checksums; releases before wrote such. Others read ours: `contents`."""
    folders = [tmp_path / "old", tmp_path / "new"]
    for folder in folders:
        folder.mkdir()
    run_ranks(1, as_before, checkpoints["tiny"], *folders)
    ((old, new),) = run_ranks(1, contents, folders)
    assert_same(new, old)
    archive = zipfile.ZipFile(io.BytesIO((folders[0] / "__0_0.distcp").read_bytes()))
    assert archive.testzip() is None


def on_a_disk_that_is_full_later(checkpoint, folder) -> str:
    """Name the error where only the file of the writer's second thread cannot be written."""
    write = checkpoint_files._HashedFile.write

    def full(self, data):
        if str(self.name).endswith("__0_1.distcp"):
            raise OSError(errno.ENOSPC, "no space")
        return write(self, data)

    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoint, Layout(), optimizer=OptimizerSettings())
        actor.update(make_samples(), LOSS)
        with mock.patch.object(checkpoint_files._HashedFile, "write", full):
            try:
                save_state(folder, actor)
            except OSError as error:
                return repr(error)
    return "written"


def test_a_failure_in_any_thread_of_the_writer_is_one_of_the_state(checkpoints, tmp_path):
    (raised,) = run_ranks(1, on_a_disk_that_is_full_later, checkpoints["tiny"], tmp_path)
    assert raised == "OSError(28, 'no space')"


def written_later(layout, checkpoint, folder, *, meanwhile: bool) -> dict:
    """Write a state, in another thread during one more step of training, or at once."""
    with groups.process_groups(layout):
        settings = OptimizerSettings(lr=1e-2)
        actor = MegatronActor(checkpoint, layout, optimizer=settings)
        actor.update(make_samples(), LOSS)
        if meanwhile:
            write = ready_state(folder, actor, own=groups.own_group(60))
            with ThreadPoolExecutor(1) as thread:
                begun = thread.submit(write)
                actor.update(make_samples(), LOSS)
                begun.result()
        else:
            save_state(folder, actor)
    return sorted(str(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_state_written_while_training_goes_on_is_that_of_its_step(ranks, checkpoints, tmp_path):
    folders = [tmp_path / "meanwhile", tmp_path / "before"]
    for folder in folders:
        folder.mkdir()
        given = (Layout(), checkpoints["tiny"], folder)
        run_ranks(ranks, partial(written_later, meanwhile=folder is folders[0]), *given)
    ((found, expected),) = run_ranks(1, contents, folders)
    assert_same(found, expected)


@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp"])
def test_a_state_without_one_of_its_files_is_refused(part, checkpoints, state, tmp_path):
    """That files are whole is the manifest's to say: tests/store/test_checkpoints.py."""
    folder = shutil.copytree(state, tmp_path / "state")
    (folder / part).unlink()
    (message,) = run_ranks(1, read, checkpoints["tiny"], folder)
    assert f"{folder} does not hold this model's training state" in message


class _Stranger:
    """Pickled, it is an instruction to make a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def plant(folder, place: str, content: bytes) -> None:
    """Put `content` where an object is unpickled from: a file, or beside the tensors of one."""
    if place != "object":
        (folder / place).write_bytes(content)
        return
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    kinds = {index: type(metadata.state_dict_metadata[index.fqn]).__name__ for index in
             metadata.storage_data}  # fmt: skip
    index = next(i for i, kind in kinds.items() if kind == "BytesStorageMetadata")
    stored = metadata.storage_data[index]
    file = folder / stored.relative_path
    stored.offset, stored.length = file.stat().st_size, len(content)
    with file.open("ab") as out:
        out.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.fault(
    "Servers and other people's files",
    "a state with code in its pickles",
    "refused; nothing of it runs",
)
@pytest.mark.parametrize("place", [".metadata", "common.pt", "object"])
@pytest.mark.parametrize("kind", ["code", "noise", "nothing"])
def test_somebody_elses_state_runs_no_code(place, kind, state, checkpoints, tmp_path):
    folder, made = tmp_path / "state", tmp_path / "made"
    shutil.copytree(state, folder)
    code = io.BytesIO()
    torch.save({"scheduler": _Stranger(made)}, code)
    pickled = pickle.dumps(_Stranger(made)) if place == ".metadata" else code.getvalue()
    plant(folder, place, {"code": pickled, "noise": b"\x80\x02noise", "nothing": b""}[kind])
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoints["tiny"], Layout(), optimizer=OptimizerSettings())
        with pytest.raises(UserError, match="holds what no checkpoint of moe_upgrpo does"):
            load_state(folder, actor)
    assert not made.exists()
    # The planted code is code: whoever unpickles it without a question makes the file.
    torch.load(io.BytesIO(code.getvalue()), weights_only=False)
    assert made.exists()


@pytest.mark.fault(
    "Servers and other people's files",
    "a state whose index leads out of its folder",
    "refused",
)
@pytest.mark.parametrize("path", ["../other", "/etc/hostname", "sub/file"])
def test_an_index_that_leads_out_of_its_folder_is_refused(path, state, checkpoints, tmp_path):
    folder = shutil.copytree(state, tmp_path / "state")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoints["tiny"], Layout(), optimizer=OptimizerSettings())
        with pytest.raises(UserError, match=f"it leads to {path}"):
            load_state(folder, actor)
