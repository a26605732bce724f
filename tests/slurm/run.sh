#!/usr/bin/env bash
# Submit the scripts of configs/slurm to a SLURM of two virtual nodes and check what they leave.
#   tests/slurm/run.sh | tee benchmarks/results/slurm.txt
#   tests/slurm/run.sh limit | tee -a benchmarks/results/slurm.txt      only a run that meets its time limit again and again
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
python="${PYTHON:-$repository/.venv/bin/python}"
work="$(mktemp -d)"
export MUYBRIDGE_SLURM_DIR="$work/cluster"
export PYTHONPATH="$repository" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
eval "$("$here/cluster.sh" env)"

finish() {
    status=$?
    scancel --user "$(id -un)" --quiet || true
    "$here/cluster.sh" down
    if [ "$status" != 0 ]; then tail -n 40 "$work"/*.log >&2; fi
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

# Nodes that are one machine have no names and no GPUs; everything else is as the shipped scripts say.
mkdir "$work/bin"
printf '#!/bin/sh\nexec "%s" -m muybridge "$@"\n' "$python" > "$work/bin/muybridge"
chmod +x "$work/bin/muybridge"
export PATH="$work/bin:$PATH" MASTER_ADDR=127.0.0.1
resources=(--ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=10)
if [ "${1:-}" = limit ]; then resources+=(--time=1 --signal=USR1@25); fi
job() { # name, sbatch script, options of the command: prints the job's number
    local name="$1" script="$2"
    shift 2
    sbatch --parsable --job-name="$name" "${resources[@]}" --output="$work/%x.log" "$repository/configs/slurm/$script" \
        -c tiny/wan.yaml --trainer.max_steps "$steps" --trainer.val_check_interval "$steps" --trainer.log_every_n_steps 50 \
        --data.batch_size "$batch" --trainer.callbacks+=EMA --trainer.callbacks+=Preemption "$@"
}
state() { scontrol --oneliner show job "$1" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p'; }
restarts() { scontrol --oneliner show job "$1" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p'; }
wait_for() { # seconds, command: until it succeeds
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        if [ "$SECONDS" -ge "$until" ]; then echo "waited in vain for: $*" >&2; return 1; fi
        sleep 0.2
    done
}
over() { case "$(state "$1")" in COMPLETED) ;; FAILED | CANCELLED | TIMEOUT | NODE) echo "job $1: $(state "$1")" >&2; exit 1 ;; *) return 1 ;; esac }
begun() { grep -q "Loading weights" "$work/$1.log" 2> /dev/null && sleep 3; } # the captions of the first update
timed() { local start=$SECONDS; "$@"; echo "  $((SECONDS - start)) s"; }
last() { find "$work/runs/$1" -name last.ckpt | sort | tail -n 1; }
compare() { # two checkpoints must hold the same
    "$python" - "$1" "$2" <<'PYTHON'
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_modules.parallel import consolidate, load_plain

with TemporaryDirectory() as folder:
    a, b = (
        load_plain(consolidate(p, Path(folder) / f"{i}.ckpt") if p.is_dir() else p) for i, p in enumerate(map(Path, sys.argv[1:]))
    )
    assert a["state_dict"].keys() == b["state_dict"].keys()
    worst = max(float((a["state_dict"][n] - b["state_dict"][n]).abs().max()) for n in a["state_dict"])
    counts = [c["muybridge"]["updates"] for c in (a, b)]
    data = [c["VideoData"] for c in (a, b)]
print(f"  {len(a['state_dict'])} tensors, updates {counts}, largest difference {worst:.1e}")
assert counts[0] == counts[1], counts
assert data[0] == data[1], data
assert worst < 2e-5, worst
PYTHON
}

cd "$work"
"$here/cluster.sh" up 2
echo "$(sinfo --version), $("$python" -c 'import lightning, torch; print("lightning", lightning.__version__, "torch", torch.__version__)')"
sinfo -h -N -o "  node %N %t"
muybridge tiny --family wan --clips runs/tiny/clips > /dev/null 2>&1

if [ "${1:-}" = limit ]; then
    steps=300
    batch=2
    echo "two nodes, FSDP2, $steps updates in jobs of one minute, told to leave 25 seconds before its end"
    limit="$(job limit many_nodes.sbatch --trainer.strategy fully_shard)"
    timed wait_for 900 over "$limit"
    grep -o "told to leave: saved [^;]*" "$work/limit.log" | sed 's/^/  /'
    echo "  restarts of job: $(restarts "$limit")"
    exit
fi

steps=200
batch=4
echo "one node, one process, $steps updates of 4 clips"
one="$(job one one_node.sbatch)"
timed wait_for 300 over "$one"

batch=2
echo "two nodes, DDP, the same clips: weights and averages equal those of one process"
ddp="$(job ddp many_nodes.sbatch --trainer.strategy ddp)"
timed wait_for 300 over "$ddp"
compare "$(last one)" "$(last ddp)"

echo "two nodes, FSDP2, the same clips, told to leave by SIGUSR1 when training has begun: back in the queue, and the same again"
shards="$(job shards many_nodes.sbatch --trainer.strategy fully_shard)"
wait_for 120 begun shards
# What #SBATCH --signal=USR1@120 sends two minutes before the time limit.
scancel --signal=USR1 "$shards"
again() { [ "$(restarts "$shards")" = 1 ]; }
wait_for 60 again
grep -o "told to leave: saved .*" "$work/shards.log" | sed "s#$work/##; s/^/  /"
timed wait_for 300 over "$shards"
grep -o "ckpt_path last: .*" "$work/shards.log" | sort -u | sed "s#$work/##; s/^/  /"
echo "  restarts of job: $(restarts "$shards")"
compare "$(last one)" "$(last shards)"
if ls "$work"/runs/shards/preempted-* 2> /dev/null; then echo "a finished run left what it had to go on from" >&2; exit 1; fi

echo "a job that is cancelled saves and stays cancelled"
cancelled="$(job cancelled many_nodes.sbatch --trainer.strategy fully_shard)"
wait_for 120 begun cancelled
scancel "$cancelled"
gone() { [ "$(state "$cancelled")" = CANCELLED ] && [ -z "$(squeue -h -j "$cancelled" 2> /dev/null)" ]; }
wait_for 60 gone
ls "$work"/runs/cancelled | grep -o "preempted-cancelled-" | sed 's/^/  left: /'
echo "  restarts of job: $(restarts "$cancelled")"
echo "all as it should be"
