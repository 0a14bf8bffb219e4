"""Triton's product of matrices: every tile of its tables, and which tensors have descriptors."""

from __future__ import annotations

import pytest
import torch
from op_cases import INTERPRETED, check, normal
from product_cases import loading
from torch import Tensor

from videopure_fast.ops import linear_moments
from videopure_fast.ops.backend import use_backend
from videopure_fast.ops.folded_linear import fold_norm
from videopure_fast.ops.linear_moments import part_columns, row_moments

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="checks Triton's code in its interpreter")
KINDS = ("half, sm_90", "half, sm_80", "half, unaligned", "float32")
GATED = {True: "GATED_TILES", False: "TILES"}


@pytest.fixture(params=["triton"], ids=["triton-interpreted"])
def product():
    """The module of the product, which needs Triton and has its tiles."""
    from videopure_fast.kernels import matrix_product

    return matrix_product


def tensors_of(kind: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.float() if kind == "float32" else t.half() for t in tensors]


def check_gated(kind: str, rows: int, inputs: int) -> None:
    x, bias = normal(rows, inputs), normal(2 * 80, seed=2)
    weight = normal(2 * 80, inputs, seed=1, scale=inputs**-0.5)
    check("triton", "cpu", "linear_geglu", *tensors_of(kind, x, weight, bias), scale=4)
    x, *layer = tensors_of(kind, x, normal(inputs), normal(inputs, seed=3), weight, bias)
    tensors = x, row_moments(x), *fold_norm(*layer)
    check("triton", "cpu", "folded_linear_geglu", *tensors, eps=1e-5, scale=8)


def check_plain(kind: str, rows: int, inputs: int, outputs: int) -> None:
    x, skip = normal(rows, inputs), normal(rows, 48, seed=2)
    bias, residual = normal(outputs), normal(rows, outputs, seed=1)
    weight = normal(outputs, inputs + 48, seed=3, scale=(inputs + 48) ** -0.5)
    check("triton", "cpu", "linear_residual", *tensors_of(kind, x, weight, bias, residual, skip))
    clips, residual = normal(2, 2, rows // 2, 1, inputs), normal(2, 2, rows // 2, 1, outputs, seed=5)
    taps = normal(3, outputs, inputs, seed=4, scale=(3 * inputs) ** -0.5)
    check("triton", "cpu", "temporal_conv", *tensors_of(kind, clips, taps, bias, residual))
    x, *layer = tensors_of(kind, x, normal(inputs), normal(inputs, seed=3), weight[:, :inputs], bias)
    check("triton", "cpu", "folded_linear", x, row_moments(x), *fold_norm(*layer), eps=1e-5, scale=4)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile(product, monkeypatch, kind, gated):
    """More rows than a tile has, and outputs and inputs that no tile divides."""
    monkeypatch.setattr("videopure_fast.kernels.linear_geglu.MAX_FUSED_INPUTS", {"half": 1000, "float32": 1000})
    with loading("descriptors" if kind == "half, sm_90" else "pointers"):
        others = product.OTHER_GATED_TILES.get(kind, ()) if gated else ()
        for tile in (*getattr(product, GATED[gated])[kind], *others):
            monkeypatch.setattr(product, GATED[gated], {kind: (tile,)})
            odd, rows = kind == "half, unaligned", tile.block_m + 2
            if gated:
                check_gated(kind, rows, 150 if odd else 144)
            else:
                check_plain(kind, rows, 150 if odd else 144, 180 if odd else 176)


@pytest.mark.parametrize("gated", GATED)
def test_tables_cover_every_kind_and_part(product, gated):
    table = getattr(product, GATED[gated])
    assert set(table) == set(KINDS)
    for tiles in (*table.values(), *(product.OTHER_GATED_TILES.values() if gated else ())):
        assert gated or {128, 160} <= {tile.width for tile in tiles}
        assert not gated or all(tile.second == tile.block_n for tile in tiles)


@pytest.mark.parametrize("columns", [1, 100, 128, 160, 256, 320, 480, 512, 640, 1280])
def test_parts_are_those_of_the_op(product, columns):
    assert product.part_columns(columns) == part_columns(columns)


def test_which_tensors_have_descriptors(product):
    """Rows that begin at multiples of 16 bytes and do not overlap."""
    x = torch.zeros(1, 12, 64, dtype=torch.float16)
    kinds = {
        product.DESCRIBED: [x, x[..., :24], x[:, ::2, 8:], x[:, :1, :8]],
        "half, sm_80": [x[:, :1].expand(1, 12, 64), x.float()[..., :16].half()[:, :1, :16].expand(1, 5, 16)],
        "half, unaligned": [x[..., :12].contiguous(), x.as_strided((1, 3, 16), (0, 8, 1))],
    }
    with loading("descriptors"):
        for kind, tensors in kinds.items():
            assert {product.kind_of([x, tensor]) for tensor in tensors} == {kind}
        assert product.kind_of([x, x[..., 4:20]]) != product.DESCRIBED
        assert product.kind_of([x.float()]) == "float32"
    assert product.kind_of([x]) == "half, sm_80"


def test_tiles_of_the_models_widths_waste_nothing(product):
    """Each width of the UNet is a multiple of the tile's; a grid that leaves most of a GPU idle takes smaller tiles."""
    from videopure_fast.kernels.launch import choose_tile

    tiles = product.TILES[product.DESCRIBED]
    for rows, columns in ((25088, 320), (6272, 640), (1568, 1280), (25088, 960), (6272, 1920), (1568, 3840)):
        assert columns % choose_tile(tiles, rows, columns).width == 0
    assert choose_tile(tiles, 25088, 320).width == 160
    assert choose_tile(tiles, 200, 320).block_m * choose_tile(tiles, 200, 320).width < 128 * 128


def test_a_large_grid_is_computed_in_groups(product, monkeypatch):
    """More rows and columns of tiles than a group has."""
    monkeypatch.setattr(product, "GROUP_M", 2)
    x, weight, residual = normal(330, 16), normal(200, 16, seed=1), normal(330, 200, seed=2)
    check("triton", "cpu", "linear_residual", x, weight, None, residual, None, scale=4)
    with use_backend("triton"):
        y, moments = linear_moments(x, weight, None, residual)
    torch.testing.assert_close(moments, row_moments(y), rtol=1e-4, atol=1e-4)
