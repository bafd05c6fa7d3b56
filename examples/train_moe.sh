#!/usr/bin/env bash
''':'
# One file, two languages. torchrun gives it to Python, for which this part is a string:
#     torchrun --nproc-per-node 2 examples/train_moe.sh [options]
# bash runs this part, which starts the same job by torchrun:
#     bash examples/train_moe.sh [options]         (--help lists the options)
# NPROC is the number of ranks: two, or one where there is but one GPU.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
torchrun="$here/../.venv/bin/torchrun"
[ -x "$torchrun" ] || torchrun="$(command -v torchrun)" || {
    echo "No torchrun here: run 'make setup' first, or activate an environment with moe_upgrpo." >&2
    exit 1
}
gpus="$(ls -d /dev/nvidia[0-9]* 2>/dev/null | wc -l)"
ranks=2
[ "$gpus" = 1 ] && ranks=1
exec "$torchrun" --nproc-per-node "${NPROC:-$ranks}" "${BASH_SOURCE[0]}" "$@"
'''

from moe_upgrpo.cli import main

if __name__ == "__main__":
    main(["train"])
