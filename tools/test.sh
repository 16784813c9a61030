#!/usr/bin/env bash
# Runs all checks: the linters, then pytest with the given arguments. A failure does not stop the checks after it.
#
#   bash tools/test.sh              linters and all tests except those marked `long`
#   bash tools/test.sh --slow       the tests marked `long`, and numerical tests without kernels (--slow must come first)
#   bash tools/test.sh -k plan      linters and the tests whose names contain "plan"
#   bash tools/test.sh -n 0         linters and tests, in one process instead of three
set -euo pipefail

tier="not long"
if [[ ${1-} == --slow ]]; then
  tier=long
  shift
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
if [[ $tier == long ]]; then bash tools/browser.sh; fi
PATH=$(cd "${W2VSCALE_VENV:-.venv}" && pwd)/bin:$PATH
export PATH
# Tests start many processes. Without cached byte code, each would spend about ten seconds compiling torch and lhotse.
unset PYTHONDONTWRITEBYTECODE

failed=()
joined() { local IFS=,; echo "$*"; }

# check NAME COMMAND… runs one check under a heading, prints its time and records a failure.
check() {
  local name=$1 start=$SECONDS verdict=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { verdict=FAILED; failed+=("$name"); }
  printf '== %s: %s in %d s\n' "$name" "$verdict" $((SECONDS - start))
}

scripts=()
while IFS= read -r script; do scripts+=("$script"); done < <(
  find . \( -name .git -o -name .venv -o -name exp \) -prune -o -type f \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print | sort
)

scratch=$(mktemp -d)
types=""
trap 'rm -rf "$scratch"; [[ -z $types ]] || kill "$types" 2>/dev/null || true' EXIT
if [[ $tier != long ]]; then
  mypy >"$scratch/mypy" 2>&1 & # beside the other checks, because it takes a minute; see below
  types=$!
  check "ruff check" ruff check
  check "ruff format" ruff format --check
  check "lint-imports" lint-imports --no-logo
  check "shellcheck" shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
  check "docs" env NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$scratch/site"
fi
if [[ $tier == long && $# -eq 0 ]]; then
  check "without kernels" env W2VSCALE_KERNELS=plain python -m pytest -q -n 2 --dist loadfile -m "not long" \
    tests/models tests/objectives tests/inference tests/distributed/test_golden.py
fi

# The log ends with the summary line of pytest; another line follows only if something failed.
if ((${#failed[@]})); then printf '\nfailed so far: %s\n' "$(joined "${failed[@]}")"; fi
printf '\n== pytest\n'
# Three files at a time on two cores, because many tests wait for something. The tests of a file stay together, so that
# its fixtures are made once; tests/conftest.py orders the files. (`--dist loadgroup` has no effect with pytest 9.2:
# pytest-xdist issue 1386.)
code=0
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 15 --durations-min 5 -m "$tier" "$@" || code=$?
# Exit code 5 means that no test was selected, e.g. because no long test matches the arguments.
if ((code != 0)) && ! { ((code == 5)) && [[ $tier == long ]]; }; then failed+=("pytest"); fi

if [[ -n $types ]]; then
  wait "$types" || { failed+=("mypy"); printf "\n== mypy\n"; cat "$scratch/mypy"; }
  types=""
fi
if ((${#failed[@]})); then
  printf 'failed: %s\n' "$(joined "${failed[@]}")" >&2
  exit 1
fi
