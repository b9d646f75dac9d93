"""What the engine runs with: the arguments, checked against each other and against the checkpoint."""

import json
import operator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from engine.args import DEMO_MODEL, EngineArgs
from engine.errors import ModelLoadError
from engine.image_processor import ImageProcessor
from engine.models.checkpoint_config import (
    ARCHITECTURES,
    eos_token_ids,
    max_model_len,
    read_config,
    read_generation_config,
    sampling_defaults,
)
from engine.models.hub import resolve_model, resolve_processor_config, resolve_tokenizer
from engine.models.llava import feature_layers

_KINDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    tuple: "a tuple",
    dict: "a dict",
}


@dataclass(slots=True)
class VisionConfig:
    """How images enter a prompt."""

    input_type: str
    """`pixel_values` or `image_features`."""
    image_token_id: int
    input_shape: tuple[int, int, int, int]
    """(1, 3, height, width) of a prepared image."""
    feature_size: int
    """Tokens of one image."""
    feature_dim: int
    """Width of the vision tower's output, before the projector."""
    max_images: int
    """In one prompt."""
    processor: ImageProcessor | None
    """None: images that need preparation are refused."""


@dataclass(slots=True)
class EngineConfig:
    """Everything the engine needs to know; plain enough to be sent to another process."""

    model_path: Path
    model_name: str
    served_names: list[str]
    tokenizer_path: Path
    hf_config: Any
    architecture: str
    dtype: torch.dtype
    device: torch.device
    load_format: str
    max_model_len: int
    seed: int
    vision: VisionConfig | None
    max_num_seqs: int
    max_num_batched_tokens: int
    """Of a step that computes prompts only."""
    block_size: int
    gpu_memory_utilization: float
    num_blocks: int | None
    """Cache blocks that the user wants; None: what memory allows."""
    kv_cache_dtype: torch.dtype
    kv_cache_memory_bytes: int | None
    enable_prefix_caching: bool
    max_num_queued_reqs: int
    eos_token_ids: list[int]
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    """From the checkpoint's generation_config.json."""
    max_mixed_tokens: int = 768
    """Of a step in which requests generate, or as many as generate and half of it. On an H100 a 7B model's products
    take prompts at full speed from here on; more would only make the others wait longer for their tokens."""
    enforce_eager: bool = False
    """Never capture CUDA graphs."""
    profile_dir: Path | None = None
    """Where to write a trace of `profile_steps` steps; None: nowhere."""
    profile_steps: int = 50
    pipeline_depth: int = 1
    """Steps that may be launched before the oldest one's tokens are read."""

    @property
    def text_config(self) -> Any:
        """The language model's part of the checkpoint's configuration."""
        return self.hf_config if self.vision is None else self.hf_config.text_config

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer."""
        return int(self.text_config.vocab_size)

    @property
    def encoder_cache_tokens(self) -> int:
        """Image tokens whose features are kept; at least one image's."""
        if self.vision is None:
            return 0
        return max(2 * self.max_num_batched_tokens, 16 * self.vision.feature_size)


def create_config(args: EngineArgs) -> EngineConfig:
    """Resolve the arguments.

    Raises:
        ValueError: an argument is out of range, contradicts another or the checkpoint.
        ModelLoadError: the checkpoint cannot be found, read or served.
    """
    _check(args)
    if not args.model:
        raise ValueError("--model is empty: give a Hub id or a folder")
    path = resolve_model(args.model, args.revision, weights=args.load_format != "dummy")
    hf_config = read_config(path)
    text = hf_config.text_config if hf_config.model_type == "llava" else hf_config
    device = _device(args.device)
    generation = read_generation_config(path)
    max_len = max_model_len(args.max_model_len, text)
    on_gpu = device.type == "cuda"
    dtype = _dtype(args.dtype, hf_config, text)
    names = args.served_model_name or ["demo" if args.model == str(DEMO_MODEL) else args.model]
    return EngineConfig(
        model_path=path,
        model_name=args.model,
        served_names=[names] if isinstance(names, str) else list(names),
        tokenizer_path=path if args.tokenizer is None else resolve_tokenizer(args.tokenizer),
        hf_config=hf_config,
        architecture=ARCHITECTURES[hf_config.model_type],
        dtype=dtype,
        device=device,
        load_format=args.load_format,
        max_model_len=max_len,
        seed=args.seed,
        vision=_vision(args, hf_config, path, max_len),
        max_num_seqs=args.max_num_seqs or (256 if on_gpu else 64),
        max_num_batched_tokens=args.max_num_batched_tokens or 2048,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        num_blocks=args.num_gpu_blocks_override,
        kv_cache_dtype=torch.float8_e4m3fn if args.kv_cache_dtype == "fp8" else dtype,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        enable_prefix_caching=args.enable_prefix_caching,
        max_num_queued_reqs=args.max_num_queued_reqs,
        eos_token_ids=eos_token_ids(generation, hf_config, text),
        sampling_defaults=sampling_defaults(generation),
        enforce_eager=args.enforce_eager,
        profile_dir=None if args.profile_dir is None else Path(args.profile_dir),
        profile_steps=args.profile_steps,
        pipeline_depth=2 if on_gpu else 1,
    )


def _check(args: EngineArgs) -> None:
    _check_types(args)
    for flag in EngineArgs.flags():
        value, choices = getattr(args, flag.name), flag.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{_name(flag.name)} is {value!r}: it must be one of {', '.join(choices)}")
    positive = ("max_model_len", "image_feature_size", "max_num_seqs", "max_num_batched_tokens",
                "block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes", "profile_steps",
                "tensor_parallel_size")  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{_name(name)} is {value}: it must be an integer of at least 1")
    if args.max_num_queued_reqs < 0:
        raise ValueError(f"--max-num-queued-reqs is {args.max_num_queued_reqs}: it must be at least 0")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}: it must be from 0 to 2^63 - 1")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ValueError(f"--gpu-memory-utilization is {args.gpu_memory_utilization}: it must be above 0, at most 1")
    if args.block_size % 16:
        raise ValueError(f"--block-size is {args.block_size}: it must be a multiple of 16")
    if args.num_gpu_blocks_override is not None and args.kv_cache_memory_bytes is not None:
        raise ValueError("--num-gpu-blocks-override and --kv-cache-memory-bytes exclude each other")
    if args.tensor_parallel_size != 1:
        raise ValueError(
            f"--tensor-parallel-size is {args.tensor_parallel_size}: only 1 is available yet: start one server a GPU"
        )
    if args.disable_image_processor and args.image_processor is not None:
        raise ValueError("--disable-image-processor and --image-processor exclude each other")
    if args.image_processor is not None and args.image_input_type == "image_features":
        raise ValueError("--image-processor and --image-input-type image_features exclude each other")
    names = args.served_model_name
    if isinstance(names, list) and not (names and all(isinstance(name, str) and name for name in names)):
        raise ValueError(f"--served-model-name is {names!r}: it must hold names")
    if args.image_processor_revision is not None and args.image_processor is None:
        raise ValueError("--image-processor-revision needs --image-processor")


def _check_types(args: EngineArgs) -> None:
    """`LLM` passes on what its caller gave, of whatever type."""
    for name, hint in get_type_hints(EngineArgs).items():
        value = getattr(args, name)
        kinds = {get_origin(kind) or kind for kind in get_args(hint) or (hint,)}
        also = {float: int, tuple: list}
        accepted = kinds | {also[kind] for kind in kinds & also.keys()}
        if not isinstance(value, tuple(accepted)) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(sorted(_KINDS[kind] for kind in kinds - {NoneType}))
            raise ValueError(f"{_name(name)} is {value!r}: it must be {wanted}")


def _name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device is cuda, but torch sees no GPU: leave it out to run on the CPU")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def _dtype(name: str, config: Any, text: Any) -> torch.dtype:
    if name != "auto":
        dtype = getattr(torch, name)
    else:
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelLoadError(f"the checkpoint's dtype {dtype} is not supported")
    return dtype


def _vision(args: EngineArgs, config: Any, path: Path, max_len: int) -> VisionConfig | None:
    if config.model_type != "llava":
        given = [name for name in ("image_input_type", "image_token_id", "image_input_shape", "image_feature_size",
                                   "image_processor", "limit_mm_per_prompt")
                 if getattr(args, name) is not None]  # fmt: skip
        given += ["disable_image_processor"] if args.disable_image_processor else []
        if given:
            raise ValueError(f"{_name(given[0])} is given, but {args.model} is a text-only model")
        return None
    tower = config.vision_config
    side = tower.image_size
    tokens = (side // tower.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    shape = (1, tower.num_channels, side, side)
    token_id = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    _match("image_token_id", args.image_token_id, token_id)
    _match("image_feature_size", args.image_feature_size, tokens)
    if args.image_input_shape is not None:
        _match("image_input_shape", _shape(args.image_input_shape), shape)
    if not 0 <= token_id < config.text_config.vocab_size:
        raise ModelLoadError(f"image token {token_id} is outside the vocabulary of {config.text_config.vocab_size}")
    return VisionConfig(
        input_type=args.image_input_type or "pixel_values",
        image_token_id=token_id,
        input_shape=shape,
        feature_size=tokens,
        feature_dim=tower.hidden_size * len(feature_layers(config)),
        max_images=_max_images(args.limit_mm_per_prompt, tokens, max_len),
        processor=None if args.image_input_type == "image_features" else _processor(args, path, shape),
    )


def _match(name: str, given: Any, found: Any) -> None:
    if given is not None and given != found:
        raise ValueError(f"{_name(name)} is {_show(given)}, but the checkpoint says {_show(found)}: leave it out")


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _shape(given: str | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    try:
        return tuple(map(int, given.split(","))) if isinstance(given, str) else tuple(map(operator.index, given))
    except (TypeError, ValueError):
        raise ValueError(f"--image-input-shape is {given!r}: it must look like 1,3,336,336") from None


def _max_images(limit: str | dict[str, int] | None, tokens: int, max_len: int) -> int:
    fitting = max_len // tokens
    if limit is None:
        return fitting
    try:
        given = _pairs(limit) if isinstance(limit, str) else dict(limit)
        counts = {
            kind: int(wanted) if isinstance(wanted, str) else operator.index(wanted) for kind, wanted in given.items()
        }
    except (TypeError, ValueError):
        raise ValueError(f"--limit-mm-per-prompt is {limit!r}: it must look like image=4") from None
    images = counts.pop("image", fitting)
    for kind, count in counts.items():
        if count:
            raise ValueError(f"--limit-mm-per-prompt is {limit!r}: {kind} is not served: only image may be above 0")
    if images < 0:
        raise ValueError(f"--limit-mm-per-prompt is {limit!r}: image must be at least 0")
    return images


def _pairs(text: str) -> dict[str, Any]:
    """`image=4`, or `{"image": 4}`."""
    return dict(json.loads(text)) if text.startswith("{") else dict(part.split("=") for part in text.split(","))


def _processor(args: EngineArgs, path: Path, shape: tuple[int, ...]) -> ImageProcessor | None:
    if args.disable_image_processor:
        return None
    source = args.image_processor
    described = (
        resolve_processor_config(str(path), None)
        if source is None
        else resolve_processor_config(source, args.image_processor_revision)
    )
    try:
        processor = ImageProcessor.from_dict(described)
    except ValueError as error:
        raise ModelLoadError(f"the image processor of {source or args.model} cannot be served: {error}") from error
    if processor.output_shape != shape[1:]:
        raise ValueError(
            f"the image processor of {source or args.model} makes images of {_show(processor.output_shape)}, "
            f"but the vision tower takes {_show(shape[1:])}"
        )
    return processor
