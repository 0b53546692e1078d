"""The head norm: both ways to compute it against the formula in float64, its gradients included.

Triton's kernels run on a GPU where there is one, else in Triton's interpreter, in a process of its own because Triton
looks at its environment once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_mea.attention.head_norm import INTERPRETED, WIDEST, HeadNorm, head_norm
from megatron_mea.parallel.grid import ALONE
from megatron_mea.parallel.layers import RMSNorm

EPS = 1e-3
BFLOAT16, FLOAT32 = "bfloat16", "float32"


@dataclass(frozen=True)
class Case:
    """Sizes, a gain or none, a type, and how x lies in memory: the dimensions from the outermost to the innermost.

    Args:
        of: every how manieth row of a larger tensor is x.
    """

    batch: int = 2
    heads: int = 3
    seq: int = 5
    dim: int = 64
    gain: bool = True
    dtype: str = FLOAT32
    layout: str = "bshd"
    of: int = 1

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """x (batch, H, seq, d), the gain (d,), dy (batch, seq, H d)"""
        sizes = {"b": self.batch, "h": self.heads, "s": self.seq, "d": self.dim}
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, getattr(torch, self.dtype))

        x = random(self.of * sizes[self.layout[0]], *(sizes[each] for each in self.layout[1:]))[:: self.of]
        x = x.permute(*(self.layout.index(each) for each in "bhsd"))
        # Rows of very different length, among them one of zeros.
        x = x * torch.logspace(-3, 2, self.seq, device=device, dtype=x.dtype)[:, None]
        x[0, 0, 0] = 0
        return x, 1 + random(self.dim) / 2 if self.gain else None, random(self.batch, self.seq, self.heads * self.dim)


CASES = {
    "d = 64": Case(),
    "d = 80": Case(dim=80),
    "d = 128": Case(dim=128, dtype=BFLOAT16),
    "pairs, d = 256": Case(dim=256),
    "d = 6": Case(dim=6),
    "no gain": Case(gain=False),
    "no gain, bfloat16": Case(gain=False, dtype=BFLOAT16, dim=80),
    "bfloat16": Case(dtype=BFLOAT16),
    "one row": Case(1, 1, 1),
    "full tiles": Case(2, 4, 8),
    "more tiles than programs": Case(2, 4, 77),
    "heads outermost": Case(layout="bhsd"),
    "features not innermost": Case(layout="bdhs"),
    "every other sequence": Case(of=2),
}


def reference(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y and both gradients by the formula, in float64."""
    x, gain, dy = case.tensors(device)
    x = x.double().requires_grad_()
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    if gain is not None:
        gain = gain.double().requires_grad_()
        y = y * gain
    # Head by head, side by side.
    y = torch.cat([y[:, head] for head in range(case.heads)], dim=-1)
    y.backward(dy.double())
    return y.detach(), x.grad, None if gain is None else gain.grad


def excess(case: Case, device: str) -> dict[str, float]:
    """How far y and both gradients are from the reference: the largest share of what rounding explains, <= 1.

    Sums are float32, and what is stored is rounded once: in bfloat16 by 2^-8 of itself at most, or by 2^-7 in
    Triton's interpreter, which cuts off.
    """
    x, gain, dy = case.tensors(device)
    leaves = [x.requires_grad_()] if gain is None else [x.requires_grad_(), gain.requires_grad_()]
    y = head_norm(x, gain, EPS)
    assert y.shape == dy.shape
    assert y.is_contiguous()
    gradients = torch.autograd.grad(y, leaves, dy)
    assert [each.dtype for each in gradients] == [x.dtype] * len(leaves) == [y.dtype] * len(leaves)
    relative = 0 if case.dtype == FLOAT32 else 2**-7 if INTERPRETED else 2**-8
    errors = {}
    for name, found, expected in zip(("y", "x", "gain"), (y, *gradients), reference(case, device), strict=False):
        allowed = relative * expected.abs() + 3e-6 * expected.abs().amax(-1, keepdim=True) + 1e-12
        errors[name] = float(((found.detach().double() - expected).abs() / allowed).max())
    return errors


def facts(device: str) -> dict[str, object]:
    """Of the kernels: errors of all cases, and what else must hold of them."""
    case = Case(2, 4, 77, dtype=BFLOAT16)
    kept: list[torch.Tensor] = []
    x, gain, dy = case.tensors(device)
    leaves = x.requires_grad_(), gain.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = head_norm(*leaves, EPS)
    kernel = y.grad_fn.next_functions[0][0].name()
    once, again = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    # What a sum hands back has no memory of its own.
    of_sum = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    of_ones = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    # A compiler is told the right shapes and strides, with a gain and without.
    for weight in (gain, None):
        torch.library.opcheck(torch.ops.megatron_mea.head_norm.default, (x, weight, EPS))
    compiled = torch.compile(head_norm, backend="aot_eager", fullgraph=True)
    of_compiled = torch.autograd.grad(compiled(*leaves, EPS), leaves, dy)
    wide, double = torch.ones(1, 1, 1, WIDEST + 1, device=device), x.double().detach()
    return {
        "errors": {name: excess(each, device) for name, each in CASES.items()},
        "kernel": kernel,
        "keeps": sorted(tuple(each.shape) for each in kept),
        "keeps x itself": any(each.data_ptr() == x.data_ptr() for each in kept),
        "the same bits": all(map(torch.equal, once, again)),
        "of a sum": all(map(torch.equal, of_sum, of_ones)),
        "compiled": all(map(torch.equal, once, of_compiled)),
        "layout of x": once[0].stride() == x.stride(),
        "not taken": [head_norm(wide, None, EPS).shape[-1], str(head_norm(double, None, EPS).dtype)],
        "no rows": list(head_norm(x[:0], gain, EPS).shape),
    }


@pytest.fixture(scope="module")
def kernels() -> dict:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    own = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, __file__]
    ended = subprocess.run(command, env=os.environ | own | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_formula(name, kernels):
    errors = kernels["errors"][name]
    assert set(errors) == ({"y", "x", "gain"} if CASES[name].gain else {"y", "x"})
    assert max(errors.values()) <= 1, errors


def test_kernels_keep_x_alone_and_give_its_layout(kernels):
    assert "head_norm" in kernels["kernel"]
    assert kernels["keeps"] == [[2, 4, 77, 64], [64]]
    for fact in ("keeps x itself", "the same bits", "of a sum", "layout of x", "compiled"):
        assert kernels[fact], fact
    assert kernels["not taken"] == [WIDEST + 1, "torch.float64"]
    assert kernels["no rows"] == [0, 77, 4 * 64]


@pytest.mark.parametrize("name", CASES)
def test_torchs_operations_are_the_formula(name):
    errors = excess(CASES[name], "cpu")
    assert max(errors.values()) <= 1, errors


def test_a_compiler_sees_torchs_operations_where_there_are_no_kernels():
    """One graph, without a call that it could not look into."""
    x, gain, _ = Case().tensors("cpu")
    compiled = torch.compile(head_norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, gain, EPS), head_norm(x, gain, EPS))


@pytest.mark.parametrize("affine", [True, False])
def test_the_layer_is_an_rmsnorm_and_heads_side_by_side(affine):
    ours, plain = (kind("norm", 6, EPS, 0.5, affine, ALONE, partial=True) for kind in (HeadNorm, RMSNorm))
    for norm in (ours, plain):
        if affine:
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(x), plain(x).transpose(1, 2).reshape(2, 5, 18))


if __name__ == "__main__":
    print(json.dumps(facts("cuda" if torch.cuda.is_available() else "cpu")))
