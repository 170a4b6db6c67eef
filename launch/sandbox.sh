#!/usr/bin/env bash
# A Slurm cluster of four simulated nodes on this machine (127.0.0.1 only), to try and test `recipes launch`. Needs root, no systemd.
#   launch/sandbox.sh start [FOLDER]           FOLDER (default .slurm) then holds everything; use it with: source FOLDER/env.sh
#   launch/sandbox.sh stop [FOLDER]
#   launch/sandbox.sh run COMMAND [WORD ...]   start, run the command, stop; its exit code
# Each node claims 8 GPUs, 16 cores and 64 GB. Nothing is behind the GPUs: links to /dev/null, as Slurm wants a file for each.
# SANDBOX_NODES, SANDBOX_PORT (of the controller; nodes follow) and SANDBOX_SLURM_CONF (further lines of slurm.conf) change it.
set -euo pipefail
NODES=${SANDBOX_NODES:-4} PORT=${SANDBOX_PORT:-16817}

start() {
  for program in munged slurmctld slurmd sinfo; do
    command -v "$program" > /dev/null || { echo "$program is missing: apt-get install -y --no-install-recommends slurm-wlm munge" >&2; return 5; }
  done
  [ "$(id -u)" = 0 ] || { echo "the sandbox needs root (a container will do)" >&2; return 5; }
  mkdir -p "$1"/{etc,run,log,state,dev}
  chmod 755 "$1" "$1"/{run,log}
  [ -s "$1/etc/munge.key" ] || (umask 077; head -c 128 /dev/urandom > "$1/etc/munge.key")
  munged --force --socket="$1/run/munge.socket" --key-file="$1/etc/munge.key" --pid-file="$1/run/munged.pid" \
    --log-file="$1/log/munged.log" --seed-file="$1/run/munged.seed" --num-threads=2 2> "$1/log/munged.start" \
    || { cat "$1/log/munged.start" >&2; return 5; }   # --force: root alone uses it, so a private folder is no harm
  configure "$1"
  export SLURM_CONF=$1/etc/slurm.conf
  echo "export SLURM_CONF='$SLURM_CONF'" > "$1/env.sh"
  slurmctld -c || return 5   # -c: forget the jobs of an earlier start
  for node in $(seq 1 "$NODES"); do start_node "$1" "$node" || return 5; done
  for _ in $(seq 1 200); do
    [ "$(timeout 5 sinfo -h -N -p debug -o %T 2> /dev/null | grep -cx idle)" = "$NODES" ] && return 0
    sleep 0.1
  done
  echo "the cluster did not come up; its logs are in $1/log" >&2
  tail -n 5 "$1"/log/*.log >&2
  return 5
}

start_node() {   # a host name and an /etc/hosts of its own for each slurmd, in private namespaces: nothing of the machine changes
  local hosts=$1/etc/hosts.node$2 other address
  mkdir -p "$1/spool/node$2"
  if [ -n "${SANDBOX_NO_NAMESPACES:-}" ] || ! unshare -m -u true 2> /dev/null; then slurmd -N "node$2"; return; fi
  cp /etc/hosts "$hosts"
  for other in $(seq 1 "$NODES"); do   # the others lie elsewhere on the loopback, so that no node takes itself for the head node
    address=127.0.0.1; [ "$other" = "$2" ] || address=127.0.0.$((10 + other))
    echo "$address node$other" >> "$hosts"
  done
  # shellcheck disable=SC2016
  unshare -m -u sh -c 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -N "$2"' sh "$hosts" "node$2"
}

configure() {
  for gpu in 0 1 2 3 4 5 6 7; do ln -sfn /dev/null "$1/dev/nvidia$gpu"; done
  echo "AutoDetect=off
NodeName=node[1-$NODES] Name=gpu Type=h100 File=$1/dev/nvidia[0-7]" > "$1/etc/gres.conf"
  : > "$1/etc/plugstack.conf"
  cat > "$1/etc/slurm.conf" << END
ClusterName=sandbox
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$1/run/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
KillWait=10
MinJobAge=86400
SlurmctldTimeout=30
SlurmdTimeout=60
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/run/slurmctld.pid
SlurmdPidFile=$1/run/slurmd-%n.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdLogFile=$1/log/slurmd-%n.log
$(for node in $(seq 1 "$NODES"); do
    echo "NodeName=node$node NodeHostname=node$node NodeAddr=127.0.0.1 Port=$((PORT + 100 + node)) CPUs=16 RealMemory=64000 Gres=gpu:h100:8 State=UNKNOWN"
  done)
PartitionName=debug Nodes=ALL Default=YES MaxTime=12:00:00 DefaultTime=01:00:00 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=12:00:00 DefaultTime=00:10:00 State=UP PriorityTier=10
${SANDBOX_SLURM_CONF:-}
END
}

alive() { [ "$(sed 's/.*) //' "/proc/$1/stat" 2> /dev/null | cut -c1)" != Z ] && [ -d "/proc/$1" ]; }   # a zombie is gone

stop() {
  [ -f "$1/etc/slurm.conf" ] || return 0
  export SLURM_CONF=$1/etc/slurm.conf
  local file pid code=0
  timeout 10 squeue -h -o %A 2> /dev/null | sort -u | xargs -r timeout 10 scancel 2> /dev/null || true
  for _ in $(seq 1 150); do [ -n "$(timeout 5 squeue -h -t R,CG,S -o %A 2> /dev/null)" ] || break; sleep 0.1; done
  for file in "$1"/run/slurmd-*.pid "$1/run/slurmctld.pid" "$1/run/munged.pid"; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    grep -qz -e slurm -e munged "/proc/$pid/cmdline" 2> /dev/null || { rm -f "$file"; continue; }   # the number may be another's by now
    kill -TERM "$pid" 2> /dev/null || true
    for _ in $(seq 1 200); do alive "$pid" || break; sleep 0.05; done
    if alive "$pid"; then echo "process $pid ignored TERM; killed" >&2; kill -KILL "$pid"; code=1; fi
    rm -f "$file"
  done
  return $code
}

usage() { sed -n '2,5s/^# //p' "$0"; }

case ${1:-} in
  -h | --help) usage ;;
  start | stop)
    mkdir -p "${2:-.slurm}"
    FOLDER=$(cd "${2:-.slurm}" && pwd)
    if [ "$1" = stop ]; then stop "$FOLDER"; else start "$FOLDER" || { code=$?; stop "$FOLDER"; exit $code; }; fi ;;
  run)
    [ $# -gt 1 ] || { usage >&2; exit 2; }
    FOLDER=$(mktemp -d) COMMAND=
    trap '[ -z "$COMMAND" ] || kill "$COMMAND" 2> /dev/null || true; stop "$FOLDER"; rm -rf "$FOLDER"' EXIT
    trap 'exit 143' TERM HUP
    trap 'exit 130' INT
    start "$FOLDER"
    "${@:2}" &
    COMMAND=$!
    wait "$COMMAND" && CODE=0 || CODE=$?
    COMMAND=
    exit "$CODE" ;;
  *) usage >&2; exit 2 ;;
esac
