"""Activations by the names that checkpoints give them."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from engine.kernels import quick_gelu

Activation = Callable[[Tensor], Tensor]

_USUAL: dict[str, Activation] = {"quick_gelu": quick_gelu, "gelu": functional.gelu, "silu": functional.silu}


def activation(name: str) -> Activation:
    """The function of that name, as transformers has it; `KeyError` where it has none."""
    if name in _USUAL:
        return _USUAL[name]
    from transformers.activations import ACT2FN  # which takes seconds to import

    found: Activation = ACT2FN[name]
    return found
