#!/usr/bin/env bash
# Installs what the tests of the report in a browser need from the system: Chromium, and Java for the HTML checker.
# It does nothing if they are there. It needs root and apt-get; without them, or if the installation fails, one line says
# what is missing, and these tests skip.
set -euo pipefail

say() { printf 'browser: %s\n' "$*"; }

packages=()
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
  packages+=(chromium)
fi
if ! command -v java >/dev/null; then packages+=(default-jre-headless); fi
if ((${#packages[@]} == 0)); then exit 0; fi

if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
  say "missing: ${packages[*]}; install them to run the tests of the report in a browser"
  exit 0
fi
say "installing ${packages[*]} (takes a minute)"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { timeout 300 apt-get update && timeout 900 apt-get install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
  say "cannot install ${packages[*]}: $(tail -n 1 "$log")"
fi
