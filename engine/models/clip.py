"""The CLIP vision tower (Radford et al., 2021), as far as the language model looks at it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.torch_ops import attend
from engine.models.activations import activation
from engine.models.linear import Linear


class ClipEmbeddings(nn.Module):
    """Patches, a class token in front, and learned positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        size, area = config.hidden_size, config.num_channels * config.patch_size**2
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.empty(size), requires_grad=False)
        self.patch_embedding = Linear(area, size, bias=False)
        self.position_embedding = nn.Embedding(positions, size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, 1 + patches, size)."""
        # A convolution whose stride is its kernel is a matrix product, which every dtype and device does exactly.
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        embedded = self.patch_embedding(patches)
        first = self.class_embedding.expand(len(embedded), 1, -1)
        return torch.cat((first, embedded), dim=1) + self.position_embedding.weight


class ClipAttention(nn.Module):
    """Full self-attention with fused projections."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, tokens, size) to the same."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ClipMLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, tokens, size) to the same."""
        return self.fc2(self.activation(self.fc1(hidden)))  # type: ignore[no-any-return]


class ClipLayer(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside a residual."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, tokens, size) to the same."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))  # type: ignore[no-any-return]


class ClipVisionModel(nn.Module):
    """The tower up to the highest layer that is looked at.

    Args:
        config: the checkpoint's vision configuration.
        feature_layers: indices into Hugging Face's `hidden_states`: 0 is the embedding, -1 the last layer.
        drop_class_token: whether the first token is cut off (the strategy `default`) or kept (`full`).
    """

    def __init__(self, config: Any, feature_layers: list[int], drop_class_token: bool) -> None:
        super().__init__()
        self.feature_layers = [resolve_layer(layer, config.num_hidden_layers) for layer in feature_layers]
        self.first_token = int(drop_class_token)
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(max(self.feature_layers)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, 3, height, width) to features (B, tokens, size * number of feature layers)."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        states = {0: hidden}
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden)
            if number in self.feature_layers:  # all others would hold memory to the end
                states[number] = hidden
        chosen = [states[layer][:, self.first_token :] for layer in self.feature_layers]
        return torch.cat(chosen, dim=-1)


def resolve_layer(layer: int, num_layers: int) -> int:
    """An index into `hidden_states` as the number of layers that lie before it."""
    resolved = layer if layer >= 0 else num_layers + 1 + layer
    if not 0 <= resolved <= num_layers:
        raise ValueError(f"vision_feature_layer {layer} is outside a vision tower of {num_layers} layers")
    return resolved
