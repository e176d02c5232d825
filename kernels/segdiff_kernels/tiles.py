"""The part of a tensor that one program of the norms' kernels takes. Plain numbers, no Triton.

Tiles are powers of two, as Triton requires for blocks.
"""

from __future__ import annotations

from segdiff_kernels.partials import slice_pixels

# 8 KiB a tile: 4 loads of 16 bytes for each of 128 threads and each tensor.
_TILE_BYTES = 8192
# Programs for a tile of channels, which share the rows of the bias's gradient: four for each of 132 multiprocessors.
MOST_CHUNKS = 512
# More than run at once, four to six for each of 132 multiprocessors: a part's sums are complete when its dx is begun.
RESIDENT_PROGRAMS = 1024
SMALLEST_PART = 32
# Of x and dy of a part. Three such parts are in flight at 256x256: half of an H100's L2 cache of 50 MB, which may hold
# lines twice.
PART_BYTES = 2**23


def channel_tile(*channels: int) -> int:
    """Channels of a row that a program takes: a power of two, at most 128 (256 bytes of bfloat16).

    The largest of 128, 64, 32 that divides all counts, so that no lane idles and every row starts aligned; else enough
    for the largest count, with a mask.
    """
    for tile in (128, 64, 32):
        if all(c % tile == 0 for c in channels):
            return tile
    return max(8, min(128, _next_power_of_2(max(channels))))


def pixel_tile(num_pixels: int, block_c: int, element_size: int) -> int:
    """Pixels a program holds at once: a power of two, at most a slice."""
    return min(slice_pixels(num_pixels), max(1, _TILE_BYTES // (block_c * element_size)))


def merge_tiles(num_channels: int, num_groups: int, num_slices: int) -> dict[str, int]:
    """Blocks of the kernels that merge slices: groups of 32 channels together, so that whole sectors are read."""
    block_k = _next_power_of_2(num_channels // num_groups)
    block_g = max(1, min(_next_power_of_2(num_groups), 32 // block_k))
    block_s = max(1, min(_next_power_of_2(num_slices), 2048 // (block_g * block_k)))
    return {"BLOCK_S": block_s, "BLOCK_G": block_g, "BLOCK_K": block_k}


def one_pass_channels(
    num_pixels: int, c1: int, c2: int, num_groups: int, element_size: int, *, reads_twice: bool = True
) -> int:
    """Channels of a sample that a norm sums up and then reads again from the L2 cache; 0 where that cannot be.

    Both tensors must consist of such parts, and these of whole groups. reads_twice=False: of a norm that has its sums
    and reads once, so that nothing must fit in the cache. PART_BYTES = 0 turns both off.
    """
    per_group = (c1 + c2) // num_groups
    merged = merge_tiles(c1 + c2, num_groups, 1)["BLOCK_G"] * per_group
    for part in (128, 64, SMALLEST_PART):
        if (
            c1 % part == 0
            and c2 % part == 0
            and part % merged == 0
            and (2 * num_pixels * part * element_size if reads_twice else 1) <= PART_BYTES
        ):
            return part
    return 0


def parts_in_flight(num_parts: int, num_programs: int) -> int:
    """Parts whose sums are begun before the first one is read again, or written; num_programs: of a part."""
    return min(num_parts, -(-RESIDENT_PROGRAMS // num_programs))


def num_counters(num_samples: int, num_channels: int) -> int:
    """Counters (_turns.py) that suffice for norms of so many samples and at most so many channels."""
    return 1 + -(-num_channels // SMALLEST_PART) * (1 + 2 * num_samples)


def chunk_rows(num_rows: int, block_p: int) -> int:
    """Rows that a program adds up: whole tiles, and enough of them that at most 512 programs share a tile of
    channels."""
    return -(-num_rows // (MOST_CHUNKS * block_p)) * block_p


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
