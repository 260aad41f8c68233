#!/usr/bin/env bash
# A real SLURM cluster on one machine, for tests: one controller, several node daemons, eight pretend GPUs a node.
#
#   scripts/slurm_cluster.sh up DIR [NODES]     then: . DIR/env.sh; sbatch, srun, squeue, scancel work
#   scripts/slurm_cluster.sh down DIR           stops what `up` started
#
# Needs root and the packages slurm-wlm and munge: it says so where they are missing, or installs them with INSTALL=1
# (apt). Everything lives below DIR (configuration, keys, sockets, state, logs); /etc/slurm is not touched. Two
# partitions: `main`, and `low`, whose jobs are requeued when a job in `main` wants their node.
set -euo pipefail

command=${1:-}
directory=${2:-}
nodes=${3:-2}
port=${SLURM_BASE_PORT:-27000}

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }

require_slurm() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  if [ "${INSTALL:-0}" != 1 ]; then
    echo "slurmctld, slurmd or munged is missing: apt-get install slurm-wlm munge, or run this with INSTALL=1." >&2
    exit 3
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

start_munge() {  # the daemon that signs messages; it insists on a private key folder
  mkdir -p "$directory/munge"
  chmod 700 "$directory/munge"
  [ -s "$directory/munge/key" ] || dd if=/dev/urandom of="$directory/munge/key" bs=1024 count=1 status=none
  chmod 400 "$directory/munge/key"
  munged --force --key-file="$directory/munge/key" --socket="$directory/munge.socket" \
    --pid-file="$directory/munged.pid" --log-file="$directory/munge/munged.log" --seed-file="$directory/munge/seed"
}

write_configuration() {
  local host names i memory
  host=$(hostname -s)
  memory=$(slurmd -C | grep -o 'RealMemory=[0-9]*' | cut -d= -f2)
  names=$(seq -s, -f 'n%g' 0 $((nodes - 1)))
  # cred_expire: a requeued job starts again after seconds, not two minutes. config_overrides: nodes may claim more
  # processors than the machine has. preempt_send_user_signal: preemption sends the signal that a job asked for.
  cat >"$directory/slurm.conf" <<CONF
ClusterName=onemachine
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=6
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
SlurmctldParameters=preempt_send_user_signal
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=60
DebugFlags=NO_CONF_HASH
SlurmdParameters=config_overrides
GresTypes=gpu
MailProg=/bin/true
PartitionName=main Nodes=$names Default=YES MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=NO
PartitionName=low Nodes=$names Default=NO MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=NO GraceTime=30
CONF
  for ((i = 0; i < nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=16 RealMemory=$memory" \
      "Gres=gpu:8 State=UNKNOWN" >>"$directory/slurm.conf"
    getent hosts "n$i" >/dev/null || echo "127.0.0.1 n$i" >>/etc/hosts  # the address of a job's first node
  done
  echo "NodeName=$names Name=gpu File=/dev/tty[0-7]" >"$directory/gres.conf"  # any character device will do
}

write_sacct() {  # submitit asks sacct how a job is; without an accounting daemon scontrol knows it
  mkdir -p "$directory/bin"
  cat >"$directory/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
# The one form that submitit uses: sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...]
echo 'JobID|State|NodeList'
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then
    shift
    scontrol show job "$1" -o 2>/dev/null | awk '{
      job = array = task = state = nodes = ""
      for (i = 1; i <= NF; i++) {
        split($i, pair, "="); value = substr($i, length(pair[1]) + 2)
        if (pair[1] == "JobId") job = value
        if (pair[1] == "ArrayJobId") array = value
        if (pair[1] == "ArrayTaskId") task = value
        if (pair[1] == "JobState") state = value
        if (pair[1] == "NodeList") nodes = value
      }
      if (array != "") job = task ~ /^[0-9]+$/ ? array "_" task : array "_[" task "]"
      print job "|" state "|" nodes }'
  fi
  shift
done
SACCT
  chmod +x "$directory/bin/sacct"
}

up() {
  require_slurm
  mkdir -p "$directory"/{state,spool,log}
  directory=$(cd "$directory" && pwd)
  start_munge
  write_configuration
  write_sacct
  export SLURM_CONF="$directory/slurm.conf"
  slurmctld -c
  for ((i = 0; i < nodes; i++)); do
    mkdir -p "$directory/spool/n$i"
    slurmd -N "n$i" -c -M
  done
  printf 'export SLURM_CONF=%q\nexport PATH=%q:"$PATH"\n' "$SLURM_CONF" "$directory/bin" >"$directory/env.sh"
  for ((i = 0; i < 150; i++)); do
    if [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)" -ge "$nodes" ]; then
      sinfo
      exit 0
    fi
    sleep 0.2
  done
  echo "SLURM did not come up; see $directory/log." >&2
  tail -n 20 "$directory"/log/*.log >&2
  exit 1
}

down() {  # exactly the daemons that `up` started, by their recorded process numbers
  for file in "$directory"/slurmd-*.pid "$directory"/slurmctld.pid "$directory"/munged.pid; do
    [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
  done
}

[ -n "$directory" ] || usage
case $command in
  up) up ;;
  down) down ;;
  *) usage ;;
esac
