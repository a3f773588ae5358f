#!/bin/sh
# Makes .venv and installs the project for one purpose: "run" or "test". Does nothing when that is already done.
# PYTHON=/path/to/python chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

case ${1-} in
    run) extras=cpu,optimize,quickstart ;;
    test) extras=cpu,rtx,optimize,quickstart,load,otel,test ;;
    *) echo "usage: $0 run|test" >&2; exit 2 ;;
esac

# The folder is part of the key: a virtual environment cannot be moved.
key=$( (pwd; cat pyproject.toml constraints.txt deploy/setup_venv.sh) | cksum)
done_for() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$key" ]; }
if .venv/bin/python -c '' 2>/dev/null && { done_for "$1" || done_for test; }; then exit 0; fi

fail() { echo "Error: $1" >&2; exit 1; }

# Sets python, or says in seen what there is instead.
find_python() {
    python='' seen=''
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        # Running it is the only proof: version managers put commands on the path that only say how to install them.
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            seen="$seen $candidate is $version;"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            seen="$seen $candidate is $version without the module venv or ensurepip;"
        else
            python=$candidate
            return
        fi
    done
}

find_python
[ -n "$python" ] || fail "Slipstream needs Python 3.11 or newer with venv.${seen:- There is no Python here;} \
on Debian and Ubuntu: apt-get install python3 python3-venv. Another interpreter: make PYTHON=/path/to/python"

# One that was copied or moved here still runs its old scripts.
made_here() { grep -q "^command = .* $(pwd -P)/.venv\$" .venv/pyvenv.cfg 2>/dev/null; }
if ! made_here || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    echo "making .venv with $python ($("$python" --version))"
    "$python" -m venv --clear .venv || fail "$python could not make a virtual environment in .venv"
fi
rm -f .venv/installed-*
echo "installing slipstream-server[$extras] into .venv (the first time this takes a minute or two)"
.venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]" \
    || fail "pip could not install the packages; the first start needs the package index: check the network and pip's settings"
echo "$key" > ".venv/installed-$1"
