# shellcheck shell=bash
# Starts training and decoding with the $launcher of the recipe:
#   local     $nproc processes on this machine
#   torchrun  $nproc processes on each of $NNODES machines. Start the recipe on all of them; $RDZV is HOST:PORT of one.
#   slurm     one process per task of the allocation. Run the recipe inside sbatch or salloc.
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
