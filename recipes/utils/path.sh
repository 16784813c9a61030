# shellcheck shell=bash
# The environment of a recipe: w2vscale, installed into .venv/ of this checkout, first on PATH.
# An environment of your own: set W2VSCALE_VENV to it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bash "$root/tools/setup.sh"
PATH=$(cd "${W2VSCALE_VENV:-$root/.venv}" && pwd)/bin:$PATH
export PATH
