# shellcheck shell=bash disable=SC2034
# Environment variables for commands that run in several processes, in the one place that sets them. cmd.sh, and with it
# the files in slurm/, and kubernetes/pytorchjob.yaml source this file. docs/launching.md lists the variables.
#
# launch_environment holds NAME=VALUE of each; nothing is exported here. Variables that you have set are not in it, so
# yours count. $processes_here is the number of processes on this machine (default: 1).
launch_environment=()
# default NAME VALUE
default() { if [[ -z ${!1+set} ]]; then launch_environment+=("$1=$2"); fi; }

# torchrun's agent would share its store with the ranks. A restarted rank then connects to the address of a machine that
# may be gone.
default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
# torchrun would die of SIGUSR1, and its ranks with it. With this it passes SIGUSR1 on, and they save and exit.
default PET_SIGNALS_TO_HANDLE SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# Seconds that torchrun waits for ranks to save: checkpoint.grace_seconds (120) and a little more. Its own 30 can be too
# few for a large model. Older versions of torch ignore it.
default TORCH_ELASTIC_SHUTDOWN_TIMEOUT 130
# NCCL then says which peer or interface has failed. While all is well, it prints its version.
default NCCL_DEBUG WARN
# Forwards differ in shape, and on a GPU their memory would otherwise break into pieces that fit none of the next ones.
# (PYTORCH_CUDA_ALLOC_CONF is the older name; the newer one would override it.)
if [[ -z ${PYTORCH_CUDA_ALLOC_CONF+set} ]]; then default PYTORCH_ALLOC_CONF expandable_segments:True; fi
# Each process would otherwise start a thread per core of the machine, or torchrun would set 1.
if ((${processes_here:=1} > 1)); then
  _cores=$(nproc)
  default OMP_NUM_THREADS $((_cores > processes_here ? _cores / processes_here : 1))
fi
# gloo, NCCL and torchrun look up the name of the machine, which on a machine with several networks may be the address of
# another network, and on Debian is 127.0.1.1. LOCAL_ADDR is the address in the network that joins the machines.
if [[ -n ${LOCAL_ADDR:-} && (-z ${GLOO_SOCKET_IFNAME+set} || -z ${NCCL_SOCKET_IFNAME+set}) ]]; then
  if ! command -v ip >/dev/null; then
    printf '%s: LOCAL_ADDR=%s needs the program ip; or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME\n' "${0##*/}" "$LOCAL_ADDR" >&2
    exit 2
  fi
  _interface=$(ip -brief address show to "$LOCAL_ADDR" | awk 'NR == 1 { sub(/@.*/, "", $1); print $1 }')
  if [[ -z $_interface ]]; then
    printf '%s: LOCAL_ADDR=%s is not an address of this machine: see ip address\n' "${0##*/}" "$LOCAL_ADDR" >&2
    exit 2
  fi
  default GLOO_SOCKET_IFNAME "$_interface"
  default NCCL_SOCKET_IFNAME "$_interface"
fi
unset -f default
unset _cores _interface
