# setup_venv.sh has CMake read this inside llama.cpp's project: llama-cpp-python insists on building
# the library that llama.cpp's own programs share, which nothing here uses.
set(LLAMA_BUILD_COMMON OFF)
