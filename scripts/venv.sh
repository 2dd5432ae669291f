# Sourced, not run: sets up .venv at the top of the project (if it is not complete already) and activates it.
# PYTHON=/path/to/python3.11 chooses the interpreter.
# A stamp is written last, so an installation that was killed half-way is started anew.

_venv_fail() {
    echo "fairseq_deq: $*" >&2
    return 1
}

# Prints a Python that the pinned packages support, or fails.
_venv_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || { _venv_fail "PYTHON=$PYTHON is not a program; give the path of a Python 3.11 or 3.12."; return 1; }
        _venv_supports "$PYTHON" || { _venv_fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), but Python 3.11 or 3.12 with the venv module is needed."; return 1; }
        echo "$PYTHON"
        return 0
    fi
    for candidate in python3.11 python3.12 python3 python; do
        if command -v "$candidate" >/dev/null && _venv_supports "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    _venv_fail "found no Python 3.11 or 3.12 with the venv module on PATH; install one, or name it with PYTHON=/path/to/python3.11."
}

_venv_supports() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# What the environment must have been made from: the requirements, the place (scripts hold absolute paths).
_venv_fingerprint() {
    { cat "$1/setup.py" "$1/scripts/constraints.txt" "$1/scripts/venv.sh"; echo "$2"; } | cksum
}

_venv_is_complete() {
    [ -x "$2/bin/python" ] && [ "$(cat "$2/.fairseq_deq_stamp" 2>/dev/null)" = "$(_venv_fingerprint "$1" "$2")" ] \
        && "$2/bin/python" -c '' 2>/dev/null \
        && { [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -V 2>&1)" = "$("$2/bin/python" -V 2>&1)" ]; }
}

_venv_install() {
    local root=$1 venv=$2 python
    python=$(_venv_find_python) || return 1
    # Where the environment itself is active, its Python is about to go: take the one that it was made with.
    case $python in "$venv"/*) python=$(readlink -f "$python") ;; esac
    echo "Setting up $venv with $("$python" --version) (once; needs about 1.5 GB)." >&2
    rm -rf "$venv" || { _venv_fail "cannot remove the incomplete environment $venv; remove it by hand."; return 1; }
    "$python" -m venv "$venv" || { _venv_fail "$python -m venv $venv failed; see the lines above."; return 1; }
    set -- "$venv/bin/python" -m pip --disable-pip-version-check --no-input install
    "$@" -c "$root/scripts/constraints.txt" "$(grep '^torch==' "$root/scripts/constraints.txt")" >&2 \
        || { _venv_fail "torch could not be installed; see pip's lines above, then run the same command again."; return 1; }
    "$@" -c "$root/scripts/constraints.txt" -e "$root[fairseq,text,test,plot]" >&2 \
        || { _venv_fail "the requirements could not be installed; see pip's lines above, then run the same command again."; return 1; }
    _venv_fingerprint "$root" "$venv" >"$venv/.fairseq_deq_stamp"
}

_venv_main() {
    local root venv
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    venv=$root/.venv
    if ! _venv_is_complete "$root" "$venv"; then
        # Two scripts started together must not install into one folder at once.
        if command -v flock >/dev/null; then
            (
                flock 9 || exit 1
                _venv_is_complete "$root" "$venv" || _venv_install "$root" "$venv"
            ) 9>"$venv.lock" || return 1
        else
            _venv_install "$root" "$venv" || return 1
        fi
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}

_venv_main
