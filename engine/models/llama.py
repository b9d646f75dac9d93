"""Llama and Mistral decoders (Touvron et al., 2023; Jiang et al., 2023) over a paged cache."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionBackend, AttentionMetadata
from engine.kernels import add_rms_norm, linear, rms_norm, silu_mul
from engine.models.activations import activation
from engine.models.linear import Linear
from engine.models.rotary import RotaryEmbedding


class LlamaAttention(nn.Module):
    """Grouped-query attention with fused projections: all queries, then keys, then values."""

    def __init__(self, config: Any, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.sliding_window = getattr(config, "sliding_window", None)
        self.backend = backend
        self.kv_scales: Tensor | None = None
        """See `AttentionBackend`; `engine.worker.kv_scales` finds them."""
        bias = getattr(config, "attention_bias", False)
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, bias=bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor, rotary: RotaryEmbedding, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """(T, hidden) to (T, hidden)."""
        attended = self.backend.forward(
            self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim)),
            rotary.cos,
            rotary.sin,
            cache,
            metadata,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            kv_scales=self.kv_scales,
        )
        return self.o_proj(attended.flatten(1))  # type: ignore[no-any-return]


class LlamaMLP(nn.Module):
    """Gated feed-forward network; the gate's rows come first in the fused weight."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.activation = None if config.hidden_act == "silu" else activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, hidden) to (T, hidden)."""
        gate_up = self.gate_up_proj(hidden)
        if self.activation is None:
            return self.down_proj(silu_mul(gate_up))  # type: ignore[no-any-return]
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """A weight and how it is used; `forward` adds to the residual first if there is something to add."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, residual: Tensor, x: Tensor | None = None) -> Tensor:
        """Norm of the residual (T, size), to which `x` is added in place."""
        if x is None:
            return rms_norm(residual, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class LlamaLayer(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside a residual."""

    def __init__(self, config: Any, backend: AttentionBackend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        residual: Tensor,
        added: Tensor | None,
        rotary: RotaryEmbedding,
        cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """What is to be added to the residual (T, hidden), once the layer before is: `added`, or nothing."""
        attended = self.self_attn(self.input_layernorm(residual, added), rotary, cache, metadata)
        return self.mlp(self.post_attention_layernorm(residual, attended))  # type: ignore[no-any-return]


class LlamaModel(nn.Module):
    """Embedding, layers and final norm."""

    rotary: RotaryEmbedding

    def __init__(self, config: Any, backend: AttentionBackend) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, backend) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, residual: Tensor, caches: list[Tensor], metadata: AttentionMetadata) -> Tensor:
        """Embeddings (T, hidden), which are overwritten, to the last layer's normed states (T, hidden)."""
        added = None
        for layer, cache in zip(self.layers, caches, strict=True):
            added = layer(residual, added, self.rotary, cache, metadata)
        return self.norm(residual, added)  # type: ignore[no-any-return]


class LlamaForCausalLM(nn.Module):
    """A text-only language model; `LlavaForConditionalGeneration` adds sight to it."""

    def __init__(self, config: Any, backend: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        self.language_model = LlamaModel(config, backend)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def finish(self, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make what is computed rather than loaded: the rotary tables up to `max_len` positions."""
        self.language_model.rotary = RotaryEmbedding(self.config, max_len, dtype, device)

    def set_kv_scales(self, scales: list[Tensor]) -> None:
        """Let each layer know its own, (2, kv_heads), of an fp8 cache."""
        for layer, of_layer in zip(self.language_model.layers, scales, strict=True):
            assert isinstance(layer, LlamaLayer)
            layer.self_attn.kv_scales = of_layer

    def head(self, hidden: Tensor) -> Tensor:
        """States (rows, hidden) to logits (rows, vocabulary) in the model's dtype."""
        tied = self.config.tie_word_embeddings
        weight = self.language_model.embed_tokens.weight if tied else self.lm_head.weight
        return linear(hidden, weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """States (rows, hidden) to float32 logits (rows, vocabulary)."""
        return self.head(hidden).float()


def head_dim(config: Any) -> int:
    """Size of one attention head; Mistral configurations may leave it out."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
