"""What a checkpoint can be asked to be."""

from dataclasses import dataclass, field
from typing import Any, Literal

from demo.tokenizer import EOS_ID


@dataclass(frozen=True)
class CheckpointSpec:
    """What to build; the defaults are a two-layer LLaVA whose image is 16 tokens."""

    seed: int = 0
    kind: Literal["llava", "llama", "mistral"] = "llava"
    text_model: Literal["llama", "mistral"] = "llama"
    """The language model of a `llava`; the other kinds are text-only and are what their name says."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int | None = None
    base_vocab: int = 700
    """The tokenizer's tokens before `<image>` and `<pad>`."""
    vocab_size: int = 704
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = field(default=None, hash=False)
    max_position_embeddings: int = 2048
    sliding_window: int | None = None

    vision_hidden_size: int = 32
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 56
    patch_size: int = 14
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_bias: bool = True
    pads_images: bool = False
    """Show whole pictures on a square, rather than their middle."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    shards: int = 1
    layout: Literal["classic", "new", "flat_clip"] = "classic"
    """How the keys of a `llava` are named; see `checkpoint_weights.KEY_LAYOUTS`."""
    legacy_buffers: bool = False
    """Store the buffers `position_ids` and `inv_freq` that checkpoints of old library versions hold."""
    chat_template_file: Literal["jinja", "json", "tokenizer"] | None = "jinja"
    eos_token_id: int | tuple[int, ...] = EOS_ID
    """What generation_config.json names. Greedy decoding never picks `</s>` itself: name another id to see an end."""

    greedy: bool = False
    """Whether generation_config.json asks for the likeliest token always."""

    def __post_init__(self) -> None:
        if self.language_model == "mistral" and (self.attention_bias or self.mlp_bias):
            raise ValueError("a mistral has no attention_bias and no mlp_bias")
        if self.language_model == "llama" and self.sliding_window is not None:
            raise ValueError("a llama has no sliding_window")
        if self.vocab_size <= self.pad_id:
            raise ValueError(f"vocab_size {self.vocab_size} is below the tokenizer's {self.pad_id + 1}")
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1, not {self.shards}")

    @property
    def image_id(self) -> int:
        """Of the image placeholder."""
        return self.base_vocab

    @property
    def pad_id(self) -> int:
        """Of the padding token."""
        return self.base_vocab + 1

    @property
    def language_model(self) -> Literal["llama", "mistral"]:
        """The architecture of the language model, whatever the kind."""
        return self.text_model if self.kind == "llava" else self.kind

    @property
    def size_of_head(self) -> int:
        """The width of one attention head of the language model."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def image_tokens(self) -> int:
        """How many prompt tokens one image takes."""
        patches = (self.image_size // self.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")

    @property
    def rope(self) -> dict[str, Any]:
        """The rope parameters as the configuration file states them."""
        return self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
