#!/usr/bin/env bash
# A SLURM cluster of virtual nodes on this machine.
#   cluster.sh up [NODES]   write its configuration and start its daemons; wait until the nodes are idle
#   cluster.sh down         stop exactly these daemons
#   cluster.sh env          the line to eval before sbatch, squeue, ...
set -euo pipefail

home="${MUYBRIDGE_SLURM_DIR:-${TMPDIR:-/tmp}/muybridge-slurm}"
nodes="${2:-2}"
port=16800
export SLURM_CONF="$home/slurm.conf"

write_configuration() {
    mkdir -p "$home"/{state,log,run}
    for i in $(seq "$nodes"); do mkdir -p "$home/spool-n$i"; done
    chmod 755 "$home"
    # A key and a socket of its own: a munge that the machine may run is left alone.
    [ -f "$home/munge.key" ] || (umask 077 && head -c 128 /dev/urandom > "$home/munge.key")
    printf 'CgroupAutomount=no\nConstrainCores=no\n' > "$home/cgroup.conf"
    # cred_expire: a requeued job would otherwise wait two minutes before it starts again.
    cat > "$SLURM_CONF" <<CONF
ClusterName=muybridge
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$home/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool-%n
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd-%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
InactiveLimit=0
CompleteWait=0
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 11))-$((port + 10 + nodes))] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
    for program in munged slurmctld slurmd; do
        command -v "$program" > /dev/null || { echo "$program is missing: apt-get install --no-install-recommends slurm-wlm munge" >&2; exit 1; }
    done
    write_configuration
    munged --force --socket="$home/run/munge.sock" --key-file="$home/munge.key" --pid-file="$home/run/munged.pid" \
        --log-file="$home/log/munged.log" --seed-file="$home/run/munge.seed"
    slurmctld -c -f "$SLURM_CONF"
    for i in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$i"; done
    for _ in $(seq 150); do
        [ "$(sinfo -h -N -t idle 2> /dev/null | wc -l)" = "$nodes" ] && return
        sleep 0.2
    done
    echo "the nodes did not become idle; see $home/log" >&2
    exit 1
}

down() {
    for file in "$home"/run/slurmd-*.pid "$home/run/slurmctld.pid" "$home/run/munged.pid"; do
        if [ -f "$file" ]; then
            process="$(cat "$file")"
            kill "$process" || echo "no process of $file" >&2
            # It still writes its state, and whoever calls this may remove the folder next.
            for _ in $(seq 100); do kill -0 "$process" 2> /dev/null || break; sleep 0.1; done
        fi
    done
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) sed -n 2,5p "$0"; exit 2 ;;
esac
