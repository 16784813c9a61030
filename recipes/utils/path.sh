# shellcheck shell=bash
# Chooses the environment of a recipe, and puts it first on PATH:
#   $W2VSCALE_VENV, if it is set
#   the active environment (venv or conda), if it is your own and w2vscale is installed in it
#   otherwise .venv/ of this checkout
# tools/setup.sh makes and updates it. It installs nothing into an environment of your own.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# own_environment DIR tells whether DIR is an environment that tools/setup.sh has not made.
own_environment() { [[ -x $1/bin/python && ! -e $1/.w2vscale-setup ]]; }

# package_in DIR prints the folder of the w2vscale that is installed in the environment DIR, and fails if there is none.
package_in() {
  [[ -x $1/bin/w2vscale ]] && "$1/bin/python" -I -c 'import w2vscale; print(w2vscale.__path__[0])' 2>/dev/null
}

environment=${W2VSCALE_VENV:-$root/.venv}
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [[ -z ${W2VSCALE_VENV:-} && -x $active/bin/python && ! $active -ef $environment ]]; then
  if ! own_environment "$active"; then
    note "using $environment: the active environment $active belongs to another checkout"
  elif ! package_in "$active" >/dev/null; then
    note "using $environment: w2vscale is not installed in the active environment $active"
  else
    note "using the active environment $active"
    environment=$active
  fi
fi

if own_environment "$environment"; then
  if ! package=$(package_in "$environment"); then
    note "W2VSCALE_VENV=$environment: w2vscale is not installed there: run $environment/bin/pip install -e $root"
    exit 2
  fi
  if [[ ! $package -ef $root/w2vscale ]]; then
    note "warning: $environment has the w2vscale of ${package%/w2vscale}, not of this checkout $root"
  fi
elif ! ${print_command:-false}; then
  W2VSCALE_VENV=$environment bash "$root/tools/setup.sh"
fi
PATH=$(realpath -ms "$environment")/bin:$PATH
export PATH
