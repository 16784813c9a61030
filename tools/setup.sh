#!/usr/bin/env bash
# Makes .venv/ in this checkout and installs w2vscale into it, editable, with all extras, from tools/constraints.txt.
# torchaudio, which only tests and benches use, is installed where it loads; otherwise it goes to .venv/oracles/.
# Safe to repeat, to interrupt and to call from several places at once; a call with nothing to do is quick.
#
#   PYTHON          the interpreter to build with (default: python3)
#   W2VSCALE_VENV   another place for the environment
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${W2VSCALE_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
# Holds the key of a finished set-up; empty while one is at work, so that an interrupted one is seen and redone.
stamp=$venv/.w2vscale-setup

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# An existing environment keeps its Python unless PYTHON asks for another. Without pyvenv.cfg, which an interrupted
# removal may have taken, its Python no longer knows which one it was made from.
asked() {
  local ours=$venv/bin/python
  [[ -x $ours && -f $venv/pyvenv.cfg ]] || ours=python3
  echo "${PYTHON:-$ours}"
}

# What the environment is made from.
key() {
  printf '%s\n%s\n' "$root" "$("$(asked)" -V 2>&1)"
  (cd "$root" && sha256 pyproject.toml tools/constraints.txt tools/setup.sh)
}
finished() { [[ -s $stamp && $(<"$stamp") == "$(key)" ]]; }

if finished; then exit 0; fi

# One set-up at a time; the next in line finds the work done. (Without flock, as on macOS, don't start two at once.)
mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
  exec {lock}>"$venv.lock"
  flock -n "$lock" || { say "waiting for another set-up of $venv"; flock "$lock"; }
  if finished; then exit 0; fi
fi

# The interpreter that an environment was made from, never the one inside it, which a rebuild removes.
python=$("$(asked)" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))') ||
  die "cannot run $(asked); set PYTHON to a Python 3.11 or later"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$python" -V) is too old for the versions in tools/constraints.txt; set PYTHON to a Python 3.11 or later"

if [[ -s $stamp && -x $venv/bin/python && $("$venv/bin/python" -V) == "$("$python" -V)" ]]; then
  say "updating $venv to pyproject.toml and tools/constraints.txt"
  : >"$stamp"
else
  # Removes only what an earlier set-up made: somebody's own folder or environment is not ours to delete.
  if [[ -e $stamp ]]; then
    : >"$stamp" # stays until the last, lest an interrupted removal look like somebody's own folder
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$stamp" -exec rm -rf {} +
  elif [[ -d $venv && -n $(ls -A "$venv") ]]; then
    die "$venv exists and was not made by this script; remove it, or set W2VSCALE_VENV to another place"
  fi
  say "installing w2vscale and all extras into $venv (takes some minutes)"
  mkdir -p "$venv"
  : >"$stamp"
  "$python" -m venv "$venv"
fi

made_from=$(key) # before pip reads the files: they may change while it works

# pip COMMAND … is quiet: -qq prints errors alone.
pip() { "$venv/bin/python" -m pip "$1" -qq --disable-pip-version-check --no-input "${@:2}"; }
# --no-compile: Python writes byte code for what gets imported; compiling everything doubles the time.
install() {
  pip install --no-compile --constraint "$root/tools/constraints.txt" "$@" ||
    die "the installation failed (see above); the next call starts afresh"
}

# DS_BUILD_OPS=0: DeepSpeed compiles its operators when one is first used, not here.
DS_BUILD_OPS=0 install --editable "${root}[all]"

# torchaudio's wheel is built for CUDA and does not load beside a CPU build of torch. Transformers imports torchaudio
# wherever it is installed, so there it must not be. --no-deps: torch stays as it is.
rm -rf "$venv/oracles"
install --no-deps torchaudio
if ! "$venv/bin/python" -I -c 'import torchaudio' 2>/dev/null; then
  pip uninstall --yes torchaudio
  install --no-deps --target "$venv/oracles" torchaudio
fi

printf '%s\n' "$made_from" >"$stamp.new"
mv "$stamp.new" "$stamp"
