"""The head norm as Triton kernels, forward and backward. Imported by `head_norm.py` where Triton is installed.

Rows are numbered in the order of the output, (batch, seq, head), which is also the layout of fused attention's output.
A program takes a tile of several rows of d features at a time. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 2048
"""Elements that a program holds at a time: 32 rows of 64 features, 16 elements per thread."""
PROGRAMS_PER_SM = 8
"""Programs per multiprocessor in backward, each with its own partial sum of the weight's gradient. With 64 registers
per thread all of them run at once."""


@triton.jit
def _tile_offsets(
    tile, rows, seq, batch_stride, head_stride, seq_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Offsets (ROWS, COLUMNS) of a tile's elements in a tensor (batch, H, seq, d), and a mask of those that exist."""
    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token = row // HEADS
    # Rows are fewer than 2^31, elements may be more.
    start = (token // seq).to(tl.int64) * batch_stride + (token % seq).to(tl.int64) * seq_stride
    start += (row % HEADS).to(tl.int64) * head_stride
    return start[:, None] + column[None, :], (row < rows)[:, None] & (column < DIM)[None, :]


@triton.jit
def _forward(
    x, weight, y, eps, rows, seq, x_batch, x_head, x_seq, y_batch, y_head, y_seq,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    offsets, exists = _tile_offsets(tile, rows, seq, x_batch, x_head, x_seq, HEADS, DIM, ROWS, COLUMNS)
    values = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    if weight is not None:
        column = tl.arange(0, COLUMNS)
        values *= tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]

    offsets, exists = _tile_offsets(tile, rows, seq, y_batch, y_head, y_seq, HEADS, DIM, ROWS, COLUMNS)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    x, weight, dy, dx, sums, eps, rows, seq,
    x_batch, x_head, x_seq, dy_batch, dy_head, dy_seq, dx_batch, dx_head, dx_seq,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)

    # Not `range`, whose bounds Triton's interpreter reads in a way that numpy 2.4 removed (until Triton 3.9).
    tile = tl.program_id(0)
    while tile * ROWS < rows:
        offsets, exists = _tile_offsets(tile, rows, seq, x_batch, x_head, x_seq, HEADS, DIM, ROWS, COLUMNS)
        normed = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
        offsets, exists = _tile_offsets(tile, rows, seq, dy_batch, dy_head, dy_seq, HEADS, DIM, ROWS, COLUMNS)
        gradient = tl.load(dy + offsets, mask=exists, other=0.0).to(tl.float32)

        # Recomputed rather than saved: x is read anyway.
        inverse_rms = tl.rsqrt(tl.sum(normed * normed, 1) / DIM + eps)[:, None]
        normed *= inverse_rms
        if weight is not None:
            total += gradient * normed
            gradient *= scale

        mean_product = (tl.sum(gradient * normed, 1) / DIM)[:, None]
        gradient = inverse_rms * (gradient - normed * mean_product)
        offsets, exists = _tile_offsets(tile, rows, seq, dx_batch, dx_head, dx_seq, HEADS, DIM, ROWS, COLUMNS)
        tl.store(dx + offsets, gradient.to(dx.dtype.element_ty), mask=exists)
        tile += tl.num_programs(0)

    if weight is not None:
        tl.store(sums + tl.program_id(0) * DIM + column, tl.sum(total, 0), mask=column < DIM)


def forward(x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """The head norm of x (batch, H, seq, d), whose last stride is 1, as contiguous (batch, seq, H, d)."""
    batch, heads, seq, dim = x.shape
    y = x.new_empty(batch, seq, heads, dim)
    rows, tile = batch * seq * heads, _tile_shape(dim)

    strides = *x.stride()[:3], *y.transpose(1, 2).stride()[:3]
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows, tile[0]),)](x, weight, y, eps, rows, seq, *strides, heads, dim, *tile)

    return y


def backward(
    x: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x, in the layout of x, and of the weight; the same bits every time.

    Args:
        x: (batch, H, seq, d), whose last stride is 1.
        weight: (d,), or None for 1.
        dy: gradient of the output, like x.
    """
    _, heads, seq, dim = x.shape
    dx = torch.empty_like(x)
    rows, tile = x.numel() // dim, _tile_shape(dim)

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(triton.cdiv(rows, tile[0]), PROGRAMS_PER_SM * processors)
    sums = None if weight is None else x.new_empty(programs, dim, dtype=torch.float32)

    strides = *x.stride()[:3], *dy.stride()[:3], *dx.stride()[:3]
    with torch.cuda.device_of(x):
        _backward[(programs,)](x, weight, dy, dx, sums, eps, rows, seq, *strides, heads, dim, *tile)

    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


def _tile_shape(dim: int) -> tuple[int, int]:
    """Rows and columns of a tile for heads of `dim` features, powers of two."""
    columns = triton.next_power_of_2(dim)
    return max(TILE_ELEMENTS // columns, 1), columns
