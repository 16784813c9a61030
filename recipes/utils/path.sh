# shellcheck shell=bash
# Sets up the environment of a recipe: installs w2vscale into .venv/ of this checkout and puts it first on PATH.
# Set W2VSCALE_VENV to use another environment.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bash "$root/tools/setup.sh"
PATH=$(cd "${W2VSCALE_VENV:-$root/.venv}" && pwd)/bin:$PATH
export PATH
