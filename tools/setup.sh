#!/usr/bin/env bash
# Creates .venv/ in this checkout and installs w2vscale into it: editable, with all extras, and with the versions and
# hashes in tools/constraints.txt. Only tests and benchmarks use torchaudio; if it cannot be imported, it goes to
# .venv/oracles/.
# This script can be repeated, interrupted and run several times at once. It is fast if there is nothing to do.
#
#   PYTHON          Python interpreter for the environment (default: python3)
#   W2VSCALE_VENV   path of the environment (default: .venv/ in this checkout)
#   TORCH           another version of PyTorch than the one below, e.g. 2.11.0
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${W2VSCALE_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
# Holds the key of a finished set-up. It is empty during a set-up, so that an interrupted one is detected and redone.
stamp=$venv/.w2vscale-setup

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# An existing environment keeps its Python unless PYTHON names another one. If pyvenv.cfg is missing, as after an
# interrupted removal, its Python does not know its base interpreter and cannot be used.
asked() {
  local ours=$venv/bin/python
  [[ -x $ours && -f $venv/pyvenv.cfg ]] || ours=python3
  echo "${PYTHON:-$ours}"
}

# Identifies everything that the environment depends on.
key() {
  printf '%s\n%s\n' "$root" "$("$(asked)" -V 2>&1)"
  [[ -z ${TORCH-} ]] || printf '%s\n' "$TORCH"
  (cd "$root" && sha256 pyproject.toml tools/constraints.txt tools/setup.sh)
}
finished() { [[ -s $stamp && $(<"$stamp") == "$(key)" ]]; }

if finished; then exit 0; fi

# Only one set-up runs at a time; the others wait and then have nothing to do. (Without flock, as on macOS, do not start
# two at once.)
mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
  exec {lock}>"$venv.lock"
  flock -n "$lock" || { say "waiting for another set-up of $venv"; flock "$lock"; }
  if finished; then exit 0; fi
fi

# Use the base interpreter, never the one inside the environment, which a rebuild removes.
python=$("$(asked)" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))') ||
  die "cannot run $(asked); set PYTHON to a Python 3.11 to 3.14"
"$python" -c 'import sys; sys.exit(not (sys.platform == "linux" and (3, 11) <= sys.version_info < (3, 15)))' ||
  die "$("$python" -V) on $(uname): tools/constraints.txt has hashes for Python 3.11 to 3.14 on Linux only; set PYTHON"

if [[ -s $stamp && -x $venv/bin/python && $("$venv/bin/python" -V) == "$("$python" -V)" ]]; then
  say "updating $venv to pyproject.toml and tools/constraints.txt"
  : >"$stamp"
else
  # Delete only an environment that this script has made, never a folder or environment of the user.
  if [[ -e $stamp ]]; then
    : >"$stamp" # kept, so that after an interrupted removal the folder is still recognised as ours
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$stamp" -exec rm -rf {} +
  elif [[ -d $venv && -n $(ls -A "$venv") ]]; then
    die "$venv exists and was not made by this script; remove it, or set W2VSCALE_VENV to another place"
  fi
  say "installing w2vscale and all extras into $venv (takes some minutes)"
  mkdir -p "$venv"
  : >"$stamp"
  "$python" -m venv "$venv"
fi

made_from=$(key) # computed before pip reads the files, which may change meanwhile

# pip COMMAND … prints only errors (-qq).
pip() { "$venv/bin/python" -m pip "$1" -qq --disable-pip-version-check --no-input "${@:2}"; }
# --no-compile: Python compiles modules when they are imported; compiling everything here would double the time.
install() {
  pip install --no-compile "$@" || die "the installation failed (see above); run this script again to retry"
}
constraints=$root/tools/constraints.txt
# Packages are built with what is installed before: pip does not check the hashes of what it downloads for a build.
checked() { install --no-deps --require-hashes --no-build-isolation "$@"; }
# pins REGEX prints the lines of the packages whose names match.
pins() { sed -nE "/^($1)==/,/[^\]\$/p" "$constraints"; }

checked -r <(pins 'setuptools|setuptools-download')
# DS_BUILD_OPS=0: DeepSpeed compiles its operators at first use instead of at installation. DS_ACCELERATOR=cpu: whether
# there is a GPU does not change its requirements.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu checked -r "$constraints"
# torch has no hash: the configured package index decides whether it is a CPU or a CUDA build, with or without CUDA
# libraries. PyTorch 2.11 needs an older setuptools, which has no hash either.
install "torch==${TORCH:-2.13.0}"
# --no-index: a requirement without a pin is an error that names it.
install --no-index --no-build-isolation --editable "${root}[all]"

# The torchaudio wheel is built for CUDA and cannot be imported with a CPU build of torch. Transformers imports
# torchaudio whenever it is installed, so in that case it must be outside the environment.
rm -rf "$venv/oracles"
if ! "$venv/bin/python" -I -c 'import torchaudio' 2>/dev/null; then
  pip uninstall --yes torchaudio
  checked --target "$venv/oracles" -r <(pins torchaudio)
fi

# Where Python may not write what it compiles, as in some containers, every command would compile all modules again.
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
  say "compiling the packages, because PYTHONDONTWRITEBYTECODE is set"
  "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true # some packages ship files that do not compile
fi

printf '%s\n' "$made_from" >"$stamp.new"
mv "$stamp.new" "$stamp"
