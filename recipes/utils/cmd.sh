# shellcheck shell=bash disable=SC2034
# How training is started, by the recipe's $launcher:
#   local     $nproc processes on this machine
#   torchrun  $nproc processes on each of $NNODES machines, started on all of them; $RDZV is HOST:PORT of one
#   slurm     as many processes as the allocation has tasks (run inside sbatch or salloc)
case ${launcher:=local} in
  local) train_cmd=(w2vscale train --nproc-per-node "${nproc:-1}") ;;
  torchrun)
    train_cmd=(torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${nproc:-1}" --rdzv-backend c10d
      --rdzv-endpoint "${RDZV:-localhost:0}" -m w2vscale train)
    ;;
  slurm) train_cmd=(srun --kill-on-bad-exit=1 w2vscale train) ;;
  *)
    printf '%s: --launcher takes local, torchrun or slurm, not %s\n' "${0##*/}" "$launcher" >&2
    exit 2
    ;;
esac
