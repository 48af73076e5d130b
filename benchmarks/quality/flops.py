"""Floating-point operations of training, counted as the field does."""

from dipaco.config import ModelConfig


def training_flops_per_token(model: ModelConfig) -> float:
    """Of one token: forward and twice as much backward, 2 per multiplication and addition.

    Matrices, the head among them, and causal attention, in which a token sees half the sequence.
    """
    query = model.num_heads * model.head_width
    key = model.num_kv_heads * model.head_width
    attention = model.width * (2 * query + 2 * key)
    block = attention + 3 * model.width * model.ffn_width
    scores = 2 * query * model.sequence_tokens / 2
    forward = 2 * (model.num_blocks * (block + scores) + model.width * model.vocab_size)
    return 3.0 * forward
