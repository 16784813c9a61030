#!/usr/bin/env bash
# All checks: the linters, then pytest with the given arguments. Everything runs, whatever fails before it.
#
#   bash tools/test.sh              all of it, without the tests marked `long`
#   bash tools/test.sh --slow       the tests marked `long` only, without the linters (--slow comes first)
#   bash tools/test.sh -k plan      all linters, and of the tests those about the plan
#   bash tools/test.sh -n 0         the tests one after another instead of two at a time
set -euo pipefail

tier="not long"
if [[ ${1-} == --slow ]]; then
  tier=long
  shift
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
PATH=$(cd "${W2VSCALE_VENV:-.venv}" && pwd)/bin:$PATH
export PATH
# Tests start many processes; without written byte code each would compile torch and lhotse anew, in some ten seconds.
unset PYTHONDONTWRITEBYTECODE

failed=()
joined() { local IFS=,; echo "$*"; }

# check NAME COMMAND… runs one step under a heading, times it and remembers a failure.
check() {
  local name=$1 start=$SECONDS verdict=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { verdict=FAILED; failed+=("$name"); }
  printf '== %s: %s in %d s\n' "$name" "$verdict" $((SECONDS - start))
}

scripts=()
while IFS= read -r script; do scripts+=("$script"); done < <(
  find . \( -name .git -o -name .venv -o -name exp \) -prune -o -type f \( -name '*.sh' -o -path ./.ci/run \) -print | sort
)

if [[ $tier != long ]]; then
  check "ruff check" ruff check
  check "ruff format" ruff format --check
  check "mypy" mypy
  check "lint-imports" lint-imports --no-logo
  check "shellcheck" shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
  check "docs" env NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$(mktemp -d)"
fi

# pytest's own closing line ends the log, with the time; one more line follows only when something failed.
if ((${#failed[@]})); then printf '\nfailed so far: %s\n' "$(joined "${failed[@]}")"; fi
printf '\n== pytest\n'
# Two files at a time. Within a file the order stays, so that its fixtures are made once; tests/conftest.py orders the
# files. (`--dist loadgroup`, which could keep more together, does nothing with pytest 9.2: pytest-xdist issue 1386.)
code=0
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$tier" "$@" || code=$?
# 5: no test was selected, as where the arguments name none of the long ones.
if ((code != 0)) && ! { ((code == 5)) && [[ $tier == long ]]; }; then failed+=("pytest"); fi

if ((${#failed[@]})); then
  printf 'failed: %s\n' "$(joined "${failed[@]}")" >&2
  exit 1
fi
