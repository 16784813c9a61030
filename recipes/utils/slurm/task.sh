#!/usr/bin/env bash
# task.sh FILE COMMAND… runs the command of one task, and adds its exit code to FILE if repeating it is of no use (see
# docs/interruptions.md). The exit code of srun does not tell: when one task fails, srun kills the others, and returns the
# highest code, which is that of a killed task.
#
# Signals of SLURM reach this shell and the command. The shell waits for the command.
trap : TERM INT HUP USR1
"${@:2}"
code=$?
if ((code != 0 && code != 75 && code <= 128)); then echo "$code" >>"$1"; fi
exit "$code"
