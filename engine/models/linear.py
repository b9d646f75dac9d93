"""The models' linear layers."""

from torch import Tensor, nn

from engine.kernels import linear
from engine.kernels.cpu_packed import pack


class Linear(nn.Linear):
    """`nn.Linear` in the fastest way that the device and the number of rows allow."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return linear(x, self.weight, self.bias)


def pack_weights(model: nn.Module) -> None:
    """Bring the weights of linear layers, once they are loaded, into the order in which this processor reads them."""
    for module in model.modules():
        packed = pack(module.weight) if isinstance(module, Linear) else None
        if packed is not None:
            module.weight = nn.Parameter(packed, requires_grad=False)
