#!/usr/bin/env bash
# Installs the Autobahn Testsuite (wstest) for tests/conformance/test_autobahn.py.
#
#     tests/conformance/install_autobahn.sh PYTHON27 DIR
#
# PYTHON27 is a Python 2.7 executable with pip. The environment becomes DIR/wst, so that
# WSTUNNEL_AUTOBAHN_DIR=DIR or WSTEST=DIR/wst/bin/wstest lets the tests find it.
# Running it again does nothing, unless a pin below has changed or the last run was cut short.
set -euo pipefail

# The suite runs on Python 2.7 only, and only with the last releases that still did. Everything is pinned,
# dependencies of dependencies included: pip for 2.7 is too old to avoid releases that no longer build there.
VIRTUALENV=virtualenv==20.15.1
TOOLS=(pip==20.3.4 setuptools==44.0.0 wheel==0.36.2)
# Each line is one call of pip: what stands in a later line imports the earlier ones while it is being built.
STEPS=(
  "incremental==16.10.1"
  "cryptography==3.3.2 pyOpenSSL==19.1.0"
  "Twisted==19.10.0"
  "six==1.16.0 txaio==2.1.0 zope.interface==4.6.0 autobahn[twisted]==0.10.9"
  "markupsafe==1.1.1 jinja2==2.11.3 Werkzeug==1.0.1 klein==17.10.0 service_identity==18.1.0 unittest2==1.1.0"
  "autobahntestsuite==25.10.1"
)

fail() {
  printf 'install_autobahn.sh: %s\n' "$*" >&2
  exit 1
}

[ $# -eq 2 ] || { printf 'usage: %s PYTHON27 DIR\n' "$0" >&2; exit 2; }
command -v "$1" >/dev/null || fail "$1 is not an executable: give the path of a python2.7"
python=$(command -v "$1")
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
[ "$version" = 2.7 ] || fail "$python is Python $version; the Autobahn Testsuite needs Python 2.7"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: run '$python -m ensurepip' first"

mkdir -p "$2" || fail "cannot make the directory $2"
cd "$2"
stamp=wst/pins
pins=$(printf '%s\n' "$python" "$VIRTUALENV" "${TOOLS[@]}" "${STEPS[@]}")
if [ -x wst/bin/wstest ] && [ "$(cat "$stamp" 2>/dev/null)" = "$pins" ]; then
  printf 'already installed: %s\n' "$PWD/wst/bin/wstest"
  exit 0
fi

# pip warns about Python 2.7 on every call; its real errors still show.
export PYTHONWARNINGS=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_PYTHON_VERSION_WARNING=1
rm -rf wst virtualenv
"$python" -m pip install --quiet --target virtualenv "$VIRTUALENV" || fail "could not install $VIRTUALENV"
# --no-download: the bundled wheels are the ones made for 2.7.
PYTHONPATH=virtualenv "$python" -m virtualenv --quiet --no-download wst || fail "could not make the environment $PWD/wst"
wst/bin/python -m pip install --quiet "${TOOLS[@]}" || fail "could not install ${TOOLS[*]}"
for step in "${STEPS[@]}"; do
  printf 'installing %s\n' "$step"
  # shellcheck disable=SC2086  # a step is a list of words
  # No build isolation: it would fetch build tools that are too new for 2.7.
  wst/bin/python -m pip install --quiet --no-build-isolation $step || fail "could not install '$step' (see pip's message above)"
done
wst/bin/wstest --help >/dev/null || fail "wstest was installed but does not start"
rm -rf virtualenv
printf '%s\n' "$pins" >"$stamp"
printf 'installed: %s\n' "$PWD/wst/bin/wstest"
