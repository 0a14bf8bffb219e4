"""The tiles of the product of matrices, by the kind of its tensors."""

from __future__ import annotations

from torch import Tensor

from .launch import Tile, aligned, has_wgmma, precision

# The kind of product whose tensors have descriptors.
DESCRIBED = "half, sm_90"
# Chosen by reasoning, which tuned.json overrules where it was measured; all compile without spills and without waits
# between matrix instructions, by triton 3.6 and 3.9. Two programs share a multiprocessor of sm_90, so that one writes
# its result while the other multiplies.
TILES = {
    DESCRIBED: (
        Tile(128, 128, 64, 8, 3, second=32),
        Tile(64, 128, 64, 4, 3, second=32),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
    ),
    "half, sm_80": (
        Tile(128, 128, 32, 8, 4, second=32),
        Tile(64, 128, 32, 8, 4, second=32),
        Tile(128, 128, 32, 8, 4),
        Tile(64, 128, 32, 4, 4),
        Tile(64, 64, 64, 4, 3),
    ),
    # Unaligned rows load value by value, for which larger tiles have no registers left.
    "half, unaligned": (Tile(32, 128, 16, 8, 2, second=32), Tile(32, 128, 16, 8, 2), Tile(64, 64, 32, 8, 2)),
    "float32": (
        Tile(64, 128, 16, 8, 3, second=32),
        Tile(64, 128, 16, 8, 2),
        Tile(64, 64, 16, 8, 3),
        Tile(32, 32, 16, 4, 3),
    ),
}
# The second sum is that of the gates.
GATED_TILES = {
    DESCRIBED: (Tile(128, 64, 64, 8, 3, second=64), Tile(64, 64, 64, 4, 3, second=64)),
    "half, sm_80": (Tile(128, 64, 32, 8, 4, second=64),),
    "half, unaligned": (Tile(64, 32, 32, 8, 2, second=32),),
    "float32": (Tile(32, 32, 16, 4, 3, second=32),),
}
# Taken only where they were measured to be the fastest: this one has a multiprocessor to itself, so that nothing is
# multiplied while it writes. On an H200 it took 82 us in place of 88 for 1,568 rows, 1,280 inputs and 10,240 outputs,
# and 3 to 14 % more than the first above at the other shapes. Other tiles of 256 rows or columns won at none.
OTHER_GATED_TILES = {DESCRIBED: (Tile(128, 128, 64, 8, 3, second=128),)}
# Registers of a thread with which two programs of 8 warps share a multiprocessor. With a norm to apply, ptxas alone
# would take a few more.
SHARING_REGISTERS, SHARING_VALUES = 128, 128 * 160


def most_registers(kind: str, normed: bool, tile: Tile) -> int | None:
    """What a thread is limited to, so that two programs share a multiprocessor; None for no limit."""
    shared = kind == DESCRIBED and normed and tile.warps == 8 and tile.block_m * tile.width <= SHARING_VALUES
    return SHARING_REGISTERS if shared else None


def kind_of(tensors: list[Tensor]) -> str:
    """The key in tables of tiles of a product of such tensors."""
    if precision(tensors[0].dtype) == "float32":
        return "float32"
    if has_wgmma() and all(map(_described, tensors)):
        return DESCRIBED
    sizes = (size for tensor in tensors for size in (tensor.shape[-1], *tensor.stride()[:-1]))
    return "half, sm_80" if aligned(*sizes) else "half, unaligned"


def _described(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe the tensor: rows that do not overlap begin at multiples of 16 bytes."""
    starts = tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1])
    dense = min(tensor.stride()) > 0 and tensor.stride(-2) >= tensor.shape[-1]
    return dense and not any(start % 16 for start in starts)
