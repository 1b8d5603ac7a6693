# Sourced by tools/demo and tools/test: `setup_venv EXTRA` makes .venv in the repository root,
# installs edge-dtm[EXTRA] into it and activates it. Set PYTHON to use another interpreter.

setup_venv() {
    local extra=$1 python=${PYTHON:-python3.11} stamp wanted
    if [[ ! -x .venv/bin/python ]]; then
        if ! command -v "$python" > /dev/null; then
            echo "error: $python was not found: install Python 3.11 or set PYTHON" >&2
            return 1
        fi
        echo "Making the Python environment .venv"
        # Half a venv would pass for a whole one on the next run.
        "$python" -m venv .venv || { rm -rf .venv; return 1; }
    fi
    stamp=.venv/.installed-$extra
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [[ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]]; then
        install_llama_cpp || return 1
        echo "Installing edge-dtm and what it needs: a download of several hundred MB, some minutes"
        quiet_pip -e ".[$extra]" || return 1
        echo "$wanted" > "$stamp"
    fi
    # shellcheck source=/dev/null
    source .venv/bin/activate
}

# Compile llama-cpp-python, without what nothing here uses: the multimodal library and the one that
# llama.cpp's own programs share. Without a wheel for the machine pip would compile both.
install_llama_cpp() {
    local start=$SECONDS code=0 ticker
    .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llama_cpp") is None)' \
        && return
    if ! command -v "${CXX:-c++}" > /dev/null \
        && ! command -v g++ > /dev/null && ! command -v clang++ > /dev/null; then
        echo "error: no C++ compiler, which llama-cpp-python needs: install g++ or clang++" >&2
        return 1
    fi
    echo "Compiling llama.cpp on $(nproc) cores: about 4 minutes on two, once"
    # Says now and then that it goes on, until this shell ends or has finished it.
    (while sleep 30 && kill -0 $$; do echo "  ... still compiling llama.cpp, $((SECONDS - start)) s"; done) 2> /dev/null &
    ticker=$!
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$PWD/tools/llama_cpp_only.cmake ${CMAKE_ARGS:-}" \
        quiet_pip llama-cpp-python || code=$?
    kill $ticker
    return $code
}

quiet_pip() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}
