#!/usr/bin/env bash
# Installs websocat for tests/integration/test_websocat.py; no package of Debian 12 has it.
#
#     tests/integration/install_websocat.sh DIR
#
# The program becomes DIR/bin/websocat: put DIR/bin into PATH. Needs cargo. Running it again does nothing, unless the
# pin below has changed.
set -euo pipefail

# Not 1.14.0: with its locked dependencies today's compiler refuses one of them.
VERSION=1.14.1

fail() {
  printf 'install_websocat.sh: %s\n' "$*" >&2
  exit 1
}

[ $# -eq 1 ] || { printf 'usage: %s DIR\n' "$0" >&2; exit 2; }
command -v cargo >/dev/null || fail "cargo is not installed"
mkdir -p "$1" || fail "cannot make the directory $1"
cd "$1"
# Not optimised and without what debuggers want: that takes a third of the time. No TLS: tests speak ws:// to it.
export CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0
for attempt in 1 2 3; do  # a registry does not answer now and then
  if cargo install --quiet --locked --debug --no-default-features --root . --target-dir target --version "$VERSION" websocat; then
    rm -rf target
    printf 'installed: %s\n' "$PWD/bin/websocat"
    exit 0
  fi
  sleep "$attempt"
done
fail "cargo could not install websocat $VERSION (see its message above)"
