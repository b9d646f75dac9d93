"""Products with weights in the processor's own order."""

import pytest
import torch
from torch import Tensor, nn

from engine.kernels import cpu_packed, linear
from engine.kernels.cpu_features import multiplies_in
from engine.models.linear import Linear, pack_weights

needs_instructions = pytest.mark.skipif(
    not multiplies_in(torch.bfloat16), reason="the processor has no instructions for bfloat16"
)


def weights(out: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out * size)
    return torch.randn(out, size, generator=generator).bfloat16(), torch.randn(out, generator=generator).bfloat16()


@needs_instructions
@pytest.mark.parametrize("shape", [(1,), (8,), (33,), (2, 5), (0,)])
@pytest.mark.parametrize("size", [(64, 32), (77, 129)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_same_as_with_the_weight_as_it_is(shape: tuple[int, ...], size: tuple[int, int], has_bias: bool) -> None:
    weight, bias = weights(*size)
    packed = cpu_packed.pack(weight)
    assert packed is not None
    x = torch.randn(*shape, size[1]).bfloat16()
    found = linear(x, packed, bias if has_bias else None)
    exact = x.float() @ weight.float().T + (bias.float() if has_bias else 0)
    assert found.dtype == torch.bfloat16 and found.shape == (*shape, size[0])
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=1e-2)


@needs_instructions
def test_a_model_s_linear_layers_are_packed_and_nothing_else() -> None:
    model = nn.Sequential(Linear(32, 64), nn.Embedding(8, 32), nn.LayerNorm(32)).bfloat16()
    pack_weights(model)
    assert [name for name, weight in model.named_parameters() if weight.is_mkldnn] == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_stay_as_they_are(dtype: torch.dtype) -> None:
    assert cpu_packed.pack(torch.zeros(64, 32, dtype=dtype)) is None


def test_what_torch_cannot_do_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packed, "multiplies_in", lambda dtype: True)

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("not here")

    monkeypatch.setattr(cpu_packed, "packed_linear", refuse)
    assert cpu_packed.pack(torch.zeros(64, 32, dtype=torch.bfloat16)) is None
