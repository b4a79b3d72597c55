#!/usr/bin/env bash
#SBATCH --job-name=tetrajet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train on a Slurm cluster, from the repository's root on a file system that all nodes share:
#   sbatch [sbatch's options] scripts/slurm.sh --output-dir DIR [main.py's options ...]
# One torchrun per node. Two minutes before its time is up the job is told to write a checkpoint; training then exits
# with code 75, the job is requeued and goes on from there.
set -euo pipefail

CHECKPOINT_WRITTEN=75

# Wait for process $1, however often a signal interrupts, and return its exit code. A signal's trap sets `signalled`:
# the process may have ended while the trap ran, and bash remembers its code.
wait_for() {
    local code
    signalled=yes
    while [ "$signalled" ]; do
        signalled=
        code=0
        wait "$1" || code=$?
    done
    return "$code"
}

if [ "${1:-}" = --node ]; then # on each node: --node HOST:PORT, main.py's options
    endpoint="$2"
    shift 2
    trap '' USR1 # inherited: the signal that reaches a whole step must not end torchrun
    python scripts/launch.py --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$endpoint" \
        main.py "$@" --resume auto &
    launcher=$!
    trap 'signalled=yes; pkill -USR1 -P "$launcher" || true' USR1 # the training processes are its children
    code=0
    wait_for "$launcher" || code=$?
    exit "$code"
fi

cd "${SLURM_SUBMIT_DIR:?start this script by sbatch}" # sbatch runs a copy elsewhere
if [ ! -f scripts/slurm.sh ]; then
    echo "slurm.sh: error: sbatch must be called in the repository's root, got $PWD" >&2
    exit 2
fi
case " $* " in
*" --output-dir "* | *" --output-dir="*) ;;
*) echo "slurm.sh: error: a job that is requeued needs --output-dir to find its checkpoint; add it" >&2 && exit 2 ;;
esac
source scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # processes share the cores with their loaders
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
host="${hosts%%$'\n'*}" # by `| head -n 1` a long list would end the job: scontrol could not write the rest
port=$((20000 + SLURM_JOB_ID % 20000))
# A node whose torchrun ends takes the others along after half a minute: enough for all to end by themselves.
srun --kill-on-bad-exit=0 --wait=30 bash scripts/slurm.sh --node "$host:$port" "$@" &
step=$!
trap 'signalled=yes; kill -USR1 "$step" || true' USR1 # srun passes it on to every node
code=0
wait_for "$step" || code=$?
if [ "$code" -eq "$CHECKPOINT_WRITTEN" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
