#!/usr/bin/env bash
''':'
# One file, two languages. torchrun gives it to Python, for which this part is a string:
#     torchrun --nproc-per-node 2 examples/train_moe.sh [options]
# bash runs this part, which starts the same job by `moe-upgrpo launch`; that checks options and files
# before any rank starts, and says last what went wrong, with an exit status by kind:
#     bash examples/train_moe.sh [options]         (--help lists the options)
# It takes the moe-upgrpo of MOE_UPGRPO, of .venv beside this folder, or of the PATH.
# NPROC is the number of ranks on a machine: two, or one where there is but one GPU.
# Several machines with a common folder: the same command on each, with NNODES, their number, and
# MASTER_ADDR, the name of one of them (MASTER_PORT: 29500). With NODE_RANK, 0 on MASTER_ADDR's
# machine, the ranks are in that order; without it in any.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
moe_upgrpo="${MOE_UPGRPO:-$here/../.venv/bin/moe-upgrpo}"
[ -x "$moe_upgrpo" ] || moe_upgrpo="$(command -v moe-upgrpo)" || {
    echo "No moe-upgrpo here: run 'make setup' first, or activate an environment with it." >&2
    exit 1
}
gpus="$(ls -d /dev/nvidia[0-9]* 2>/dev/null | wc -l)"
ranks=2
[ "$gpus" = 1 ] && ranks=1
machines=()
if [ "${NNODES:-1}" != 1 ]; then
    [ -n "${MASTER_ADDR:-}" ] || { echo "NNODES=$NNODES needs MASTER_ADDR, the name of one of the machines." >&2; exit 1; }
    port="${MASTER_PORT:-29500}"
    machines=(--nnodes "$NNODES")
    if [ -n "${NODE_RANK:-}" ]; then
        machines+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
    else
        machines+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "${RDZV_ID:-moe_upgrpo}")
    fi
fi
exec "$moe_upgrpo" launch "${machines[@]}" --nproc-per-node "${NPROC:-$ranks}" -- "$@"
'''

from moe_upgrpo.cli import main

if __name__ == "__main__":
    main(["train"])
