#!/usr/bin/env bash
# A real Slurm on one machine: two slurmd with four fake GPUs each, one slurmctld. As root, after
# apt-get install slurm-wlm munge.
#   bash start.sh DIR;  export SLURM_CONF=DIR/slurm.conf;  srun --gpus=1 -n1 env;  bash start.sh DIR stop
# A GPU is a character device made with mknod (a plain file is refused); config_overrides lets a node claim more cores
# than there are. MAX_JOBS: how many the queue takes.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
if [ "${2:-}" = stop ]; then
  for file in "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
    [ -f "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
  exit 0
fi
mkdir -p "$dir"/{state,spooln1,spooln2,log}
install -d -o munge -g munge /run/munge
[ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
  chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
munge -n >/dev/null 2>&1 || { runuser -u munge -- munged; sleep 1; pgrep -n -x munged > "$dir/munged.pid"; }
for node in 1 2; do for gpu in 0 1 2 3; do
  [ -e "$dir/gpu${node}_$gpu" ] || mknod "$dir/gpu${node}_$gpu" c 1 3
done; done
host=$(hostname)
cat > "$dir/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$host
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
MinJobAge=2
MaxJobCount=${MAX_JOBS:-10000}
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=16 RealMemory=8000 Gres=gpu:4
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=16 RealMemory=8000 Gres=gpu:4
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
C
printf 'NodeName=%s Name=gpu File=%s/gpu%s_[0-3]\n' n1 "$dir" 1 n2 "$dir" 2 > "$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf
slurmctld -c -f "$SLURM_CONF"
sleep 2
for node in n1 n2; do slurmd -c -N $node -f "$SLURM_CONF"; done
for _ in $(seq 40); do [ "$(sinfo -h -N -t idle -o %N | wc -l)" = 2 ] && exit 0; sleep 0.25; done
echo "the nodes did not come up; see $dir/log" >&2
exit 1
