# Sourced by the other scripts: makes `python` one that can import the modules it is given.
#
#   source scripts/setup_env.sh jettclip pytest ...
#
# An active environment (virtualenv or conda) that has them is used as it is. Otherwise .venv at the top of the clone is
# used; it is created on first use, and brought up to date when requirements.txt has changed since.
# PYTHON names the interpreter to create it with; python3.11, else python3, by default.

jettclip_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

jettclip_has() {  # whether `python` finds all the modules
    python - "$@" <<'PY' 2>/dev/null
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
PY
}

jettclip_set_up() {
    if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] && jettclip_has "$@"; then
        return
    fi
    local venv="$jettclip_root/.venv" stamp wanted
    stamp="$venv/installed"
    wanted="$(cat "$jettclip_root/requirements.txt" "$jettclip_root/pyproject.toml" | cksum)"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        local interpreter="${PYTHON:-$(command -v python3.11 || command -v python3)}"
        "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "the pinned packages need Python 3.11 or newer, $interpreter is older; name another with PYTHON=..." >&2; return 1; }
        echo "Installing the packages of requirements.txt into $venv (once; a few minutes)" >&2
        "$interpreter" -m venv "$venv" &&
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$jettclip_root/requirements.txt" &&
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
                --no-deps --no-build-isolation --editable "$jettclip_root" &&
            echo "$wanted" > "$stamp" || return 1
    fi
    source "$venv/bin/activate"
}

jettclip_set_up "$@"
