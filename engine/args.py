"""What a user may set about the engine: one field a flag, shared by the command line and by `LLM(**)`."""

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
"""A small LLaVA of the project's own."""


def _flag(default: Any, group: str, text: str, *, choices: tuple[str, ...] = (), kind: Any = None) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "choices": choices, "kind": kind})


@dataclass(slots=True)
class EngineArgs:
    """The flags of the groups model, vision, scheduler and parallel, with their defaults, as given and unchecked.

    `engine.config.create_config` checks them against each other and against the checkpoint.
    """

    model: str = _flag(
        str(DEMO_MODEL), "model", "Hub id or local folder of the checkpoint; default: the demo model that ships here"
    )
    revision: str | None = _flag(None, "model", "branch, tag or commit on the Hub")
    tokenizer: str | None = _flag(None, "model", "Hub id or folder of the tokenizer; default: the model's")
    served_model_name: list[str] | str | None = _flag(
        None, "model", "name or names that clients use; default: the value of --model", kind="names"
    )
    dtype: str = _flag(
        "auto",
        "model",
        "type of weights and activations; auto: the checkpoint's",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    device: str = _flag("auto", "model", "auto: the GPU where there is one", choices=("auto", "cuda", "cpu"))
    load_format: str = _flag(
        "auto",
        "model",
        "dummy: seeded random weights, for benchmarks",
        choices=("auto", "safetensors", "dummy"),
    )
    max_model_len: int | None = _flag(
        None, "model", "longest prompt plus answer in tokens; default: what the model allows", kind=int
    )
    seed: int = _flag(0, "model", "seed of random weights and of requests that bring none", kind=int)

    image_input_type: str | None = _flag(
        None,
        "vision",
        "pixel_values, or image_features (offline only); default: pixel_values",
        choices=("pixel_values", "image_features"),
    )
    image_token_id: int | None = _flag(
        None, "vision", "id of the image placeholder; default: the checkpoint's", kind=int
    )
    image_input_shape: str | tuple[int, ...] | None = _flag(
        None, "vision", "shape of one image, such as 1,3,336,336; default: the checkpoint's"
    )
    image_feature_size: int | None = _flag(None, "vision", "tokens of one image; default: the checkpoint's", kind=int)
    image_processor: str | None = _flag(
        None, "vision", "Hub id or folder whose image processor is used; default: the model's"
    )
    image_processor_revision: str | None = _flag(None, "vision", "revision of --image-processor")
    disable_image_processor: bool = _flag(
        False, "vision", "take prepared tensors only (offline); refuse images that need preparation"
    )
    limit_mm_per_prompt: str | dict[str, int] | None = _flag(
        None, "vision", "images a prompt may hold, such as image=4; default: as many as fit the context"
    )

    max_num_seqs: int | None = _flag(
        None, "scheduler and cache", "sequences that run at once; default: 256 on a GPU, 64 on a CPU", kind=int
    )
    max_num_batched_tokens: int | None = _flag(
        None,
        "scheduler and cache",
        "tokens of one step (default: 2048); beside requests that generate 768 at most",
        kind=int,
    )
    block_size: int = _flag(16, "scheduler and cache", "tokens of one cache block", kind=int)
    gpu_memory_utilization: float = _flag(
        0.9, "scheduler and cache", "share of GPU memory that the model, its steps and its cache may fill", kind=float
    )
    num_gpu_blocks_override: int | None = _flag(
        None, "scheduler and cache", "number of cache blocks, instead of what memory allows", kind=int
    )
    kv_cache_memory_bytes: int | None = _flag(
        None, "scheduler and cache", "bytes of the KV cache, instead of what memory allows", kind=int
    )
    kv_cache_dtype: str = _flag(
        "auto",
        "scheduler and cache",
        "type of the KV cache; auto: the model's; fp8: one byte a number, so that more tokens fit",
        choices=("auto", "fp8"),
    )
    enable_prefix_caching: bool = _flag(True, "scheduler and cache", "reuse the cache of equal prompt beginnings")
    enforce_eager: bool = _flag(False, "scheduler and cache", "never capture CUDA graphs")
    max_num_queued_reqs: int = _flag(
        1024, "scheduler and cache", "requests that may wait; more are answered 503", kind=int
    )

    profile_dir: str | None = _flag(
        None, "scheduler and cache", "folder for a trace of some steps (torch profiler); default: none is made"
    )
    profile_steps: int = _flag(50, "scheduler and cache", "steps of that trace", kind=int)

    tensor_parallel_size: int = _flag(1, "parallel", "GPUs that share the model; only 1 is available yet", kind=int)
    distributed_executor_backend: str | None = _flag(
        None, "parallel", "how several GPUs are driven; only mp is available", choices=("mp",)
    )

    @classmethod
    def flags(cls) -> tuple[Field[Any], ...]:
        """The fields, in the order of the help page."""
        return fields(cls)
