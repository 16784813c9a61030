# shellcheck shell=bash
# How training and decoding are started, by the recipe's $launcher:
#   local     $nproc processes on this machine
#   torchrun  $nproc processes on each of $NNODES machines, started on all of them; $RDZV is HOST:PORT of one
#   slurm     as many processes as the allocation has tasks (run inside sbatch or salloc)
case ${launcher:=local} in
  local | torchrun | slurm) ;;
  *)
    printf '%s: --launcher takes local, torchrun or slurm, not %s\n' "${0##*/}" "$launcher" >&2
    exit 2
    ;;
esac

# on_ranks COMMAND [ARGUMENT…] runs a w2vscale command in all processes.
on_ranks() {
  local command=$1
  shift
  case $launcher in
    local) w2vscale "$command" --nproc-per-node "${nproc:-1}" "$@" ;;
    torchrun)
      torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${nproc:-1}" --rdzv-backend c10d \
        --rdzv-endpoint "${RDZV:-localhost:0}" -m w2vscale "$command" "$@"
      ;;
    slurm) srun --kill-on-bad-exit=1 w2vscale "$command" "$@" ;;
  esac
}
