# Sourced by tools/demo and tools/test: `setup_venv EXTRA` makes .venv in the repository root,
# installs edge-dtm[EXTRA] into it and activates it. Set PYTHON to use another interpreter.

setup_venv() {
    local extra=$1 python=${PYTHON:-python3.11} stamp wanted
    if [[ ! -x .venv/bin/python ]]; then
        if ! command -v "$python" > /dev/null; then
            echo "error: $python was not found: install Python 3.11 or set PYTHON" >&2
            return 1
        fi
        # Half a venv would pass for a whole one on the next run.
        "$python" -m venv .venv || { rm -rf .venv; return 1; }
    fi
    stamp=.venv/.installed-$extra
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [[ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]]; then
        # llama-cpp-python is compiled where it has no wheel for the machine.
        if ! .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llama_cpp") is None)' \
            && ! command -v "${CXX:-c++}" > /dev/null \
            && ! command -v g++ > /dev/null && ! command -v clang++ > /dev/null; then
            echo "error: no C++ compiler, which llama-cpp-python needs: install g++ or clang++" >&2
            return 1
        fi
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt -e ".[$extra]" || return 1
        echo "$wanted" > "$stamp"
    fi
    # shellcheck source=/dev/null
    source .venv/bin/activate
}
