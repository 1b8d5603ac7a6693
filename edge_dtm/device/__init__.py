"""The device side: replays and judges. Needs llama_cpp, never torch or transformers."""
