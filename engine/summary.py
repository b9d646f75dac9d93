"""What has been started, in one line for whoever started it."""

from engine.config import EngineConfig


def summary(config: EngineConfig, num_blocks: int) -> str:
    """Model, precision, attention, and what the cache has room for."""
    tokens = num_blocks * config.block_size
    most = min(config.max_num_seqs, tokens // config.max_model_len)
    room = f"{most} requests of {config.max_model_len:,} tokens at once"
    if config.vision is not None:
        room += f", or {tokens // config.vision.feature_size:,} images ({config.vision.feature_size} tokens each)"
    device, attention = ("GPU", "Triton") if config.device.type == "cuda" else ("CPU", "torch")
    kinds = " and ".join(dict.fromkeys(_name(kind) for kind in (config.dtype, config.kv_cache_dtype)))
    return (
        f"{config.served_names[0]}: {config.architecture} in {kinds} on the {device}, attention by {attention}, "
        f"up to {config.max_num_seqs} requests in a step; the cache of {tokens:,} tokens holds {room}"
    )


def _name(kind: object) -> str:
    return str(kind).removeprefix("torch.")
