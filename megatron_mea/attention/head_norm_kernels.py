"""The head norm in Triton: a kernel each way. Imported where Triton is (`head_norm.py`).

Rows are numbered as the result stores them, (batch, seq, head), which is also how fused attention stores its own
output; a program takes several rows of d features at a time. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUMBERS = 2048
"""Numbers that a program holds at a time: 32 rows of 64 features, 16 a thread."""
PROGRAMS = 8
"""Programs a multiprocessor in the backward pass, each with a sum of its own of the gain's gradient. With 64
registers a thread all of them run at once."""


@triton.jit
def _places(
    tile, rows, seq, batch_stride, head_stride, seq_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where a tile's numbers are in a tensor (batch, H, seq, d) of these strides, and which of them exist."""
    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token = row // HEADS
    # Rows are fewer than 2^31, numbers may be more.
    start = (token // seq).to(tl.int64) * batch_stride + (token % seq).to(tl.int64) * seq_stride
    start += (row % HEADS).to(tl.int64) * head_stride
    return start[:, None] + column[None, :], (row < rows)[:, None] & (column < DIM)[None, :]


@triton.jit
def _forward(
    x, weight, y, eps, rows, seq, x_batch, x_head, x_seq, y_batch, y_head, y_seq,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    place, exists = _places(tile, rows, seq, x_batch, x_head, x_seq, HEADS, DIM, ROWS, COLUMNS)
    values = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    if weight is not None:
        column = tl.arange(0, COLUMNS)
        values *= tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    place, exists = _places(tile, rows, seq, y_batch, y_head, y_seq, HEADS, DIM, ROWS, COLUMNS)
    tl.store(y + place, values.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    x, weight, dy, dx, sums, eps, rows, seq,
    x_batch, x_head, x_seq, dy_batch, dy_head, dy_seq, dx_batch, dx_head, dx_seq,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if weight is not None:
        gain = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Not `range`, whose bounds Triton's interpreter reads with what numpy 2.4 took away (until Triton 3.9).
    tile = tl.program_id(0)
    while tile * ROWS < rows:
        place, exists = _places(tile, rows, seq, x_batch, x_head, x_seq, HEADS, DIM, ROWS, COLUMNS)
        normed = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
        place, exists = _places(tile, rows, seq, dy_batch, dy_head, dy_seq, HEADS, DIM, ROWS, COLUMNS)
        gradient = tl.load(dy + place, mask=exists, other=0.0).to(tl.float32)
        # Computed again rather than kept: x is read anyway.
        scale = tl.rsqrt(tl.sum(normed * normed, 1) / DIM + eps)[:, None]
        normed *= scale
        if weight is not None:
            total += gradient * normed
            gradient *= gain
        along = (tl.sum(gradient * normed, 1) / DIM)[:, None]
        gradient = scale * (gradient - normed * along)
        place, exists = _places(tile, rows, seq, dx_batch, dx_head, dx_seq, HEADS, DIM, ROWS, COLUMNS)
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=exists)
        tile += tl.num_programs(0)
    if weight is not None:
        tl.store(sums + tl.program_id(0) * DIM + column, tl.sum(total, 0), mask=column < DIM)


def forward(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(batch, H, seq, d) of any strides but the last, which is 1, -> (batch, seq, H, d), contiguous."""
    batch, heads, seq, dim = x.shape
    y = x.new_empty(batch, seq, heads, dim)
    rows, tile = batch * seq * heads, _tile(dim)
    strides = *x.stride()[:3], *y.transpose(1, 2).stride()[:3]
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows, tile[0]),)](x, weight, y, eps, rows, seq, *strides, heads, dim, *tile)
    return y


def backward(
    x: torch.Tensor, weight: torch.Tensor | None, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x, in the layout of x, and of the gain; the same bits every time.

    Args:
        x: (batch, H, seq, d) of any strides but the last.
        dy: the same.
    """
    _, heads, seq, dim = x.shape
    dx = torch.empty_like(x)
    rows, tile = x.numel() // dim, _tile(dim)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(triton.cdiv(rows, tile[0]), PROGRAMS * processors)
    sums = None if weight is None else x.new_empty(programs, dim, dtype=torch.float32)
    strides = *x.stride()[:3], *dy.stride()[:3], *dx.stride()[:3]
    with torch.cuda.device_of(x):
        _backward[(programs,)](x, weight, dy, dx, sums, eps, rows, seq, *strides, heads, dim, *tile)
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


def _tile(dim: int) -> tuple[int, int]:
    """Rows and columns, powers of two."""
    columns = triton.next_power_of_2(dim)
    return max(NUMBERS // columns, 1), columns
