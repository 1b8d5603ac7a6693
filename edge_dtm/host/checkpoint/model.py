"""The checkpoint as a torch module: transformers' own Llama, filled tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import ROPE_FACTORS, Checkpoint

_HF_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_HF_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}


def module_name(gguf_name: str) -> str:
    """`blk.3.ffn_down` -> `model.layers.3.mlp.down_proj`."""
    if gguf_name in _HF_TOP:
        return _HF_TOP[gguf_name]
    _, layer, part = gguf_name.split(".")
    return f"model.layers.{layer}.{_HF_PARTS[part]}"


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. EdgeDtmError when that GPU is absent."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise EdgeDtmError(
            f"--device {name}: torch sees {gpus or 'no'} GPU{'s' * (gpus > 1)} here; use --device "
            "cpu or auto"
        )
    return device


def load_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """transformers' causal LM in float32 on the device, in eval mode, without gradients for its
    weights (only activations' gradients are ever needed)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    c = checkpoint.config
    linear = {"rope_type": "linear", "factor": c.rope_linear}
    rope = linear if c.rope_linear else {"rope_type": "default"}
    # Mistral without its sliding window is a Llama, and llama.cpp runs it as one.
    config: Any = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_epsilon,
        max_position_embeddings=c.context_length,
        tie_word_embeddings=c.tied,
        attention_bias=c.attention_bias,
        mlp_bias=c.mlp_bias,
        rope_parameters={**rope, "rope_theta": c.rope_theta},
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    state = {}
    for name in checkpoint.shapes():
        if name != ROPE_FACTORS:
            stem, _, suffix = name.rpartition(".")
            data = torch.from_numpy(checkpoint.hf_tensor(name)).to(device)
            state[f"{module_name(stem)}.{suffix}"] = data
    if c.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in range(c.layers if c.attention_bias else 0):
        # GGUFs may have biases of q, k and v only.
        key = f"model.layers.{layer}.self_attn.o_proj.bias"
        state.setdefault(key, torch.zeros(c.hidden, device=device))
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    if c.rope_factors is not None:
        factors = torch.tensor(c.rope_factors, device=device)
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / factors
    return model.eval().requires_grad_(False)
