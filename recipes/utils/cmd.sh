# shellcheck shell=bash
# Starts training and decoding. Source this file below log.sh and path.sh. docs/launching.md has a command for each case.
#
# Options of a recipe:
#   --launcher local       --nproc processes on this machine (the default)
#   --launcher torchrun    --nproc processes on each of NNODES machines. Start the recipe on all of them.
#   --launcher slurm       inside sbatch or salloc: one process per task. With --nproc N, one task per machine, which
#                          starts N processes with torchrun.
#   --launcher deepspeed   --nproc processes on each machine of HOSTFILE, which DeepSpeed's launcher reaches by ssh
#   --print-command        print the commands that would start processes, and run nothing
#
# Environment variables, because they belong to a cluster or a machine and not to an experiment:
#   NNODES         number of machines, or MIN:MAX for an elastic run (default: 1; SLURM knows it)
#   RDZV           HOST:PORT of one of the machines, where all meet. Required if there are several.
#   RDZV_ID        name of the job there (default: w2vscale)
#   MAX_RESTARTS   how often torchrun starts all processes again after a failure (default: 0; elastic: 3)
#   FIRST_MACHINE  true or false: whether this machine does what needs one process, such as data preparation, while
#                  the others wait (default: RDZV is this machine)
#   LOCAL_ADDR     address of this machine in the network that joins the machines, if it has several networks
#   HOSTFILE       DeepSpeed's list of machines: a line "HOST slots=GPUS" for each
_utils=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

: "${launcher:=local}" "${nproc:=1}" "${NNODES:=1}"
_most=${NNODES##*:} # machines

_check_values() {
  local number='[1-9][0-9]{0,5}'
  [[ $nproc =~ ^$number$ ]] || die "--nproc takes a number of processes, 1 or more, not '$nproc'"
  if ! [[ $NNODES =~ ^$number(:$number)?$ ]] || ((${NNODES%%:*} > _most)); then
    die "NNODES=$NNODES: give a number of machines, or MIN:MAX for an elastic run"
  fi
  [[ ${MAX_RESTARTS:-0} =~ ^(0|$number)$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS: give a number of restarts"
  if [[ -n ${RDZV:-} ]] &&
    { ! [[ $RDZV =~ ^(\[[0-9a-fA-F:]+\]|[^][/:[:space:]]+):$number$ ]] || ((${RDZV##*:} > 65535)); }; then
    die "RDZV=$RDZV: give HOST:PORT of one of the machines, such as node1:29400"
  fi
}

_check_launcher() {
  local several=false
  if ((_most > 1)); then several=true; fi
  case $launcher in
    local)
      if $several; then
        die "NNODES=$NNODES: --launcher local starts processes on this machine only; choose torchrun or deepspeed"
      fi
      ;;
    torchrun)
      if $several && [[ -z ${RDZV:-} ]]; then
        die "NNODES=$NNODES without RDZV: each machine would wait for itself; set RDZV=HOST:PORT, the same on all machines"
      elif $several && [[ -z ${FIRST_MACHINE:-} ]] && ! ${print_command:-false}; then
        _check_rdzv
      fi
      ;;
    slurm)
      if ((nproc > 1)) && [[ -z ${SLURM_JOB_ID:-} ]]; then
        die "--launcher slurm --nproc $nproc: only inside sbatch or salloc, because all machines meet on the first one"
      elif ((nproc > 1)) && [[ ${SLURM_NTASKS_PER_NODE:-1} != 1 ]]; then
        die "--launcher slurm --nproc $nproc: needs sbatch --ntasks-per-node=1, not $SLURM_NTASKS_PER_NODE"
      fi
      ;;
    deepspeed)
      if [[ $NNODES == *:* ]]; then
        die "NNODES=$NNODES: DeepSpeed's launcher is not elastic; choose --launcher torchrun"
      elif $several && [[ -z ${HOSTFILE:-} ]]; then
        die "NNODES=$NNODES without HOSTFILE: set HOSTFILE to a file with a line 'HOST slots=GPUS' for each machine"
      elif [[ -n ${HOSTFILE:-} && ! -f $HOSTFILE ]]; then
        die "HOSTFILE=$HOSTFILE: no such file"
      fi
      ;;
    *) die "--launcher takes local, torchrun, slurm or deepspeed, not $launcher" ;;
  esac
  if [[ -n ${LOCAL_ADDR:-} && ($launcher == slurm || $launcher == deepspeed) ]]; then
    die "LOCAL_ADDR=$LOCAL_ADDR: every machine has another one, but --launcher $launcher starts all from here; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface"
  fi
  if [[ $launcher == slurm && $NNODES != 1 && $NNODES != "${SLURM_JOB_NUM_NODES:-}" ]]; then
    die "NNODES=$NNODES: with --launcher slurm, choose the machines with sbatch --nodes"
  fi
  if ((${MAX_RESTARTS:-0} > 0)) && ! [[ $launcher == torchrun || ($launcher == slurm && $nproc -gt 1) ]]; then
    die "MAX_RESTARTS=$MAX_RESTARTS: --launcher $launcher does not restart processes; torchrun does"
  fi
}

# Other machines look up the name of this one. On Debian it is 127.0.1.1, which they cannot reach.
_warn_of_local_name() {
  local address
  if [[ $launcher != torchrun || -n ${LOCAL_ADDR:-} ]] || ((_most == 1)); then return; fi
  address=$(getent hosts "$(hostname)" | cut -d ' ' -f 1) || true
  if [[ $address == 127.* ]]; then
    log "warning: $(hostname) is $address, which other machines cannot reach: set LOCAL_ADDR to its address in their network"
  fi
}

_check_rdzv() {
  local addresses
  addresses=$(_addresses_of_rdzv)
  if [[ -z $addresses ]]; then die "RDZV=$RDZV: no machine has this name; give HOST:PORT of one of the machines"; fi
  if [[ $addresses =~ ^(127\.|::1) ]] && ! _is_my_name; then
    die "RDZV=$RDZV: each machine would wait for itself; give a name or address that the others can reach"
  fi
}

_rdzv_host() {
  local host=${RDZV%:*}
  host=${host#[}
  echo "${host%]}"
}

_addresses_of_rdzv() { { getent ahosts "$(_rdzv_host)" || true; } | awk '{ print $1 }' | sort -u; }

# Whether RDZV has the name of this machine, which may be a local address here (127.0.1.1 on Debian).
_is_my_name() { [[ $(_rdzv_host) == "$(hostname)" || $(_rdzv_host) == "$(hostname -f 2>/dev/null)" ]]; }

# Whether this is the only machine that runs the recipe, or the one of RDZV.
_is_first_machine() {
  local address
  if [[ $launcher != torchrun ]] || ((_most == 1)); then return 0; fi
  while read -r address; do
    if [[ $address == 127.* || $address == ::1 || " $(_my_addresses) " == *" $address "* ]]; then return 0; fi
  done < <(_addresses_of_rdzv)
  return 1
}

# Not every `hostname` has the option -I.
_my_addresses() { hostname -I 2>/dev/null || ip -brief address | awk '{ for (i = 3; i <= NF; i++) { sub("/.*", "", $i); printf "%s ", $i } }'; }

_check_values
_check_launcher
_warn_of_local_name
case ${FIRST_MACHINE:=} in
  true | false) first_machine=$FIRST_MACHINE ;;
  '') if _is_first_machine; then first_machine=true; else first_machine=false; fi ;;
  *) die "FIRST_MACHINE takes true or false, not '$FIRST_MACHINE'" ;;
esac
# shellcheck disable=SC2034 # log.sh reads it
others_wait=false
# shellcheck disable=SC2034
if $first_machine && [[ $launcher == torchrun ]] && ((_most > 1)); then others_wait=true; fi
processes_here=$nproc
if [[ $launcher == slurm ]] && ((nproc == 1)); then processes_here=${SLURM_NTASKS_PER_NODE:-1}; fi
. "$_utils/environment.sh"

# on_ranks COMMAND [ARGUMENT…] runs a w2vscale command in all processes; with --print-command it prints what would run.
on_ranks() {
  local words=()
  "_words_of_$launcher" "$@"
  words=(env "${launch_environment[@]}" "${words[@]}")
  if ${print_command:-false}; then _print_words "${words[@]}"; else "${words[@]}"; fi
}

# on_first_machine COMMAND… runs a command of a stage that starts processes: on one machine, and not with --print-command.
on_first_machine() { if $first_machine && ! ${print_command:-false}; then "$@"; fi; }

_words_of_local() {
  words=("$(_path_of w2vscale)" "$1" --nproc-per-node "$nproc" "${@:2}")
}

_words_of_torchrun() {
  _torchrun "$NNODES" "${RDZV:-localhost:0}" "${RDZV_ID:-w2vscale}" "$@"
}

# _torchrun NNODES HOST:PORT ID COMMAND [ARGUMENT…]
_torchrun() {
  local restarts=0 elastic=()
  # With enough machines, torchrun would wait 30 seconds for further ones.
  if [[ $1 == *:* ]]; then restarts=3 elastic=(--rdzv-conf last_call_timeout=10); fi
  # torchrun, but with the exit codes of docs/interruptions.md.
  words+=("$(_path_of python)" -m w2vscale.distributed.torchrun --nnodes "$1" --nproc-per-node "$nproc"
    --rdzv-backend c10d --rdzv-endpoint "$2" --rdzv-id "$3" --max-restarts "${MAX_RESTARTS:-$restarts}" "${elastic[@]}")
  if [[ -n ${LOCAL_ADDR:-} ]]; then words+=(--local-addr "$LOCAL_ADDR"); fi
  words+=(-m w2vscale "${@:4}")
}

_words_of_slurm() {
  words=(srun --kill-on-bad-exit=1)
  # From 22.05 on, srun does not take this from sbatch, and loaders and ranks would share one core.
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then words+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
  if ((nproc > 1)); then
    local nodes=${SLURM_JOB_NUM_NODES:-1} first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${first%%$'\n'*} # `head` could end scontrol by SIGPIPE, and with it the recipe
    words+=("--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1)
    _task
    # Jobs that share a machine need different ports. Linux gives those from 32768 on to outgoing connections.
    _torchrun "$nodes" "$first:$((20000 + SLURM_JOB_ID % 12000))" "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
  else
    _task
    words+=("$(_path_of w2vscale)" "$@")
  fi
}

# Tasks note the exit code of a failure that a repetition cannot cure, if the batch script asks for it.
_task() { if [[ -n ${TASK_CODES:-} ]]; then words+=(bash "$_utils/slurm/task.sh" "$TASK_CODES"); fi; }

_words_of_deepspeed() {
  words=("$(_path_of deepspeed)")
  if [[ -n ${HOSTFILE:-} ]]; then
    words+=(--hostfile "$(absolute "$HOSTFILE")" --num_gpus "$nproc")
    if ((NNODES > 1)); then words+=(--num_nodes "$NNODES"); fi
  elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    if (($(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l) < nproc)); then
      die "--nproc $nproc: only CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES are visible"
    fi
    # With --num_gpus it would ignore CUDA_VISIBLE_DEVICES and take the first ones of the machine.
    words+=(--include "localhost:$(cut -d , -f "-$nproc" <<<"$CUDA_VISIBLE_DEVICES")")
  else
    words+=(--num_gpus "$nproc")
  fi
  if [[ -n ${RDZV:-} ]]; then
    words+=(--master_addr "${RDZV%:*}" --master_port "${RDZV##*:}")
  else
    words+=(--master_port $((20000 + $$ % 12000))) # two jobs on a machine would both take 29500
  fi
  words+=(--module w2vscale "$@")
}

# _path_of PROGRAM prints its full path, so that a printed command does not need the PATH of path.sh.
_path_of() { type -P "$1" || echo "$1"; }

# _print_words WORD… prints a command on one line, with quotes where the shell needs them.
_print_words() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+="$word "; else line+="${word@Q} "; fi
  done
  printf '%s\n' "${line% }"
}
