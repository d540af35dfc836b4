"""Layers and linear maps are found by structure in every family, and what cannot be decided is refused by name."""

import pytest
from torch import nn

from stiefel_lora._models import find_layers, find_linears, is_linear, linear_shape, named_linears
from stiefel_lora.errors import InputError
from tests.models import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_linears_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    found, blocks = find_layers(model)
    assert found == family.layers
    assert len(blocks) == family.n_layers
    prefix = f"{found}.0."
    assert set(find_linears(model)[0]) == {prefix + linear for linear in family.linears}


def test_conv1d_has_its_shape_the_other_way_round() -> None:
    block = FAMILIES["gpt2"].build().transformer.h[0]
    assert linear_shape(block.attn.c_attn) == (32, 96)
    assert tuple(block.attn.c_attn.weight.shape) == (32, 96)
    assert linear_shape(nn.Linear(5, 3)) == (5, 3)


def test_what_is_no_linear_map() -> None:
    for module in (nn.Conv1d(2, 3, 1), nn.Embedding(3, 4), nn.Bilinear(2, 2, 3), nn.Sequential(nn.Linear(2, 2))):
        assert not is_linear(module)
    with pytest.raises(TypeError, match="expected a linear module, got Embedding"):
        linear_shape(nn.Embedding(3, 4))
    assert dict(named_linears(nn.MultiheadAttention(4, 2))) == {}


def test_two_equally_long_lists_are_refused_and_can_be_named() -> None:
    model = nn.ModuleDict({side: nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for side in ("left", "right")})
    with pytest.raises(InputError, match="2 equally long lists of layers: 'left' .2 x Linear., 'right'"):
        find_layers(model)
    assert find_layers(model, "right")[0] == "right"
    with pytest.raises(InputError, match="the list of layers 'middle' does not exist"):
        find_layers(model, "middle")
