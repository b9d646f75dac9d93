"""LLaVA (Liu et al., 2023): a CLIP tower whose features a small network projects into a language model's embeddings."""

from typing import Any

from torch import Tensor, nn

from engine.attention import AttentionBackend
from engine.models.activations import activation
from engine.models.clip import ClipVisionModel
from engine.models.linear import Linear
from engine.models.llama import LlamaForCausalLM


class LlavaProjector(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: Any, num_feature_layers: int) -> None:
        super().__init__()
        bias = getattr(config, "multimodal_projector_bias", True)
        size = config.text_config.hidden_size
        self.linear_1 = Linear(config.vision_config.hidden_size * num_feature_layers, size, bias=bias)
        self.linear_2 = Linear(size, size, bias=bias)
        self.activation = activation(config.projector_hidden_act)

    def forward(self, features: Tensor) -> Tensor:
        """(…, vision features) to (…, hidden)."""
        return self.linear_2(self.activation(self.linear_1(features)))  # type: ignore[no-any-return]


class LlavaForConditionalGeneration(LlamaForCausalLM):
    """A language model that sees; without the tower when features are given to it ready-made."""

    def __init__(self, config: Any, backend: AttentionBackend, *, with_tower: bool = True) -> None:
        super().__init__(config.text_config, backend)
        layers = feature_layers(config)
        self.multi_modal_projector = LlavaProjector(config, len(layers))
        if with_tower:
            drop = config.vision_feature_select_strategy == "default"
            self.vision_tower = ClipVisionModel(config.vision_config, layers, drop)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, 3, height, width) to embeddings (B, tokens, hidden)."""
        return self.project(self.vision_tower(pixels))

    def project(self, features: Tensor) -> Tensor:
        """The tower's output (B, tokens, features) to embeddings (B, tokens, hidden)."""
        return self.multi_modal_projector(features)  # type: ignore[no-any-return]


def feature_layers(config: Any) -> list[int]:
    """The configuration's `vision_feature_layer`, one or several, as a list."""
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)
