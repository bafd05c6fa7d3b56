#!/usr/bin/env bash
# A comparison whose runs are jobs of their own, on one machine each or on several (docs/scale.md):
#
#     bash examples/compare_at_scale.sh PLAN FOLDER            which runs are to be done now, one a line
#     bash examples/compare_at_scale.sh PLAN FOLDER RUN        start that run, or continue it
#     bash examples/compare_at_scale.sh PLAN FOLDER --crashed RUN   its loss ended it, as the log says: keep it as such
#     moe-upgrpo compare PLAN --output FOLDER                  the report, once no run is to be done
#
# A run that was killed, or that its machine failed, goes on where it was: the same line again. One
# that its own numbers ended (exit status 3) is kept as crashed. NPROC, NNODES, MASTER_ADDR: as
# examples/train_moe.sh has them; several machines each start the same line and share FOLDER.
# ENGINE_URL: the run's own server, where the plan names none that all can share.
# As an array of jobs, under Slurm for instance:
#
#     sbatch --array 1-18 --gpus-per-node 8 --wrap 'bash examples/compare_at_scale.sh PLAN FOLDER \
#         "$(sed -n "${SLURM_ARRAY_TASK_ID}p" runs.txt)"'      # runs.txt: what the first line printed
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/../.venv/bin/python"
[ -x "$python" ] || python="$(command -v python)" || {
    echo "No python here: run 'make setup' first, or activate an environment with moe_upgrpo." >&2
    exit 1
}
jobs() { PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "$python" -m moe_upgrpo.compare.jobs "$@"; }

[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
plan="$1" folder="$2"
shift 2
if [ $# = 0 ] || [ "$1" = --crashed ]; then
    jobs "$plan" "$folder" "$@"
    exit
fi

words="$(jobs "$plan" "$folder" --start "$1")"
[ -n "$words" ] || { echo "$1 is done."; exit 0; }
mapfile -t options <<< "$words"
[ -z "${ENGINE_URL:-}" ] || options+=(--engine-url "$ENGINE_URL")
status=0
bash "$here/train_moe.sh" "${options[@]}" || status=$?
case "$status" in
    0) ending=--end ;;
    3) ending=--crashed ;;
    *) exit "$status" ;;
esac
# One machine keeps the data: any that knows no number of its own, or number 0.
[ "${NODE_RANK:-${SLURM_NODEID:-0}}" != 0 ] || jobs "$plan" "$folder" "$ending" "$1"
