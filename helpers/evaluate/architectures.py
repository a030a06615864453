"""Which models `hf-dialogue` runs itself, what it has to know of each, and why it leaves the others to lm-eval.

An architecture is on the list if a test has seen it answer and score as HFLM does (tests/test_architectures.py). It
must hand its attention to transformers' attention interface, take positions from `position_ids`, and keep nothing from
token to token but keys and values."""

import torch

SUPPORTED = {
    *("arcee", "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox"),
    *("gpt_oss", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "nemotron"),
    *("olmo", "olmo2", "olmo3", "opt", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
    *("stablelm", "starcoder2"),
}
REASONS = {
    "bloom": "its attention is its own (ALiBi), not behind transformers' interface",
    "falcon": "its attention is its own, not behind transformers' interface",
    "gemma3": "is built for images and text: load its text model (gemma3_text)",
    "lfm2": "keeps the state of a convolution beside keys and values",
    "mamba": "keeps a state instead of keys and values",
}
LAYERS = {"full_attention", "sliding_attention"}


def unsupported(model) -> str | None:
    """Why this model can't be run over shared contexts, or None. Checked: architecture, wrappers, kinds of layers,
    placement."""
    config = model.config
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED:
        return f"architecture {kind}: {REASONS.get(kind, 'not one of ' + ', '.join(sorted(SUPPORTED)))}"
    if not type(model).__module__.startswith("transformers.models."):
        return f"model class {type(model).__module__}.{type(model).__name__}: not transformers' own"
    if odd := sorted(set(getattr(config, "layer_types", None) or []) - LAYERS):
        return f"layers of type {', '.join(odd)}"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention to later tokens"
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        return "weights that are split over devices (tensor parallel)"
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices:
        return "weights that are fetched when they are needed (offloaded)"
    if len(devices) > 1:
        return f"weights on {len(devices)} devices"
    return None


def longest(model) -> tuple[int, str] | None:
    """How many tokens, prompt and answer, a request may have here, and why no more; None if any number."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("dynamic", "longrope"):
        return None
    most = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return most, f"beyond {most} tokens its {kind} rotary embedding depends on the batch's longest context"


def sizes(config) -> tuple[int, int, int]:
    """Query heads, key heads, width of a head."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim(config)


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def finish(model, logits):
    """What a model does to its output layer's logits before it gives them out."""
    config = model.config
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def bytes_per_column(model) -> int:
    """Keys and values of one token in all layers, bytes."""
    _, kv_heads, head = sizes(model.config)
    return 2 * model.config.num_hidden_layers * kv_heads * head * model.dtype.itemsize


def bytes_per_token(model) -> int:
    """Activations of one token within a layer of a prefill, bytes: what the MLP and the attention hold at a time,
    rounded up."""
    config = model.config
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return (4 * wide + 8 * config.hidden_size) * model.dtype.itemsize
