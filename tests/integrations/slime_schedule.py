"""slime's own schedule of micro-batches, by --max-tokens-per-gpu, say; from v0.3.0 on."""

from argparse import Namespace

from moe_upgrpo.integrations.slime_miles.revisions import taken


def of_rank(args: Namespace, lengths: list[int], rank: int, size: int) -> tuple[list, dict]:
    """A data-parallel rank's sequences and its schedule, as slime/ray/rollout.py has them made."""
    from slime.utils.dp_schedule import build_dp_schedule

    layout = {
        "dp_size": size,
        "cp_size": args.context_parallel_size,
        "vpp_size": 1,
        "microbatch_group_size_per_vp_stage": 1,
    }
    places = list(range(len(lengths)))
    ids = taken(build_dp_schedule, rollout_indices=places, group_indices=places)
    partitions, indices, counts, sizes = build_dp_schedule(
        args, layout, lengths, global_batch_size=args.global_batch_size, **ids
    )
    return partitions[rank], {
        "micro_batch_indices": indices[rank],
        "num_microbatches": counts,
        "global_batch_sizes": sizes,
    }
