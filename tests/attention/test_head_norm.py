"""The head norm, by kernels and by torch's operations: values and gradients against the formula in float64.

Triton's kernels run on a GPU where there is one, else in Triton's interpreter; in a separate process, because Triton
reads its environment once.
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

from megatron_mea.attention.head_norm import INTERPRETED, MAX_HEAD_DIM, HeadNorm, head_norm
from megatron_mea.parallel.grid import NO_TP
from megatron_mea.parallel.layers import RMSNorm

EPS = 1e-3
BFLOAT16, FLOAT32 = "bfloat16", "float32"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, dtype and memory layout of inputs.

    Args:
        gain: whether there is a weight.
        layout: dimensions of x in memory, from the outermost to the innermost.
        stride: x is every `stride`-th row of a larger tensor.
    """

    batch: int = 2
    heads: int = 3
    seq: int = 5
    dim: int = 64
    gain: bool = True
    dtype: str = FLOAT32
    layout: str = "bshd"
    stride: int = 1

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """x (batch, H, seq, d), the gain (d,), dy (batch, seq, H d)"""
        sizes = {"b": self.batch, "h": self.heads, "s": self.seq, "d": self.dim}
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, getattr(torch, self.dtype))

        x = random(self.stride * sizes[self.layout[0]], *(sizes[dim] for dim in self.layout[1:]))[:: self.stride]
        x = x.permute(*(self.layout.index(dim) for dim in "bhsd"))
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
    "one row": Case(batch=1, heads=1, seq=1),
    "full tiles": Case(batch=2, heads=4, seq=8),
    "more tiles than programs": Case(batch=2, heads=4, seq=77),
    "heads outermost": Case(layout="bhsd"),
    "features not innermost": Case(layout="bdhs"),
    "every other sequence": Case(stride=2),
}


def reference(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y and both gradients by the formula, in float64."""
    x, gain, dy = case.tensors(device)
    x = x.double().requires_grad_()
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    if gain is not None:
        gain = gain.double().requires_grad_()
        y = y * gain

    # Heads are concatenated.
    y = torch.cat([y[:, head] for head in range(case.heads)], dim=-1)
    y.backward(dy.double())
    return y.detach(), x.grad, None if gain is None else gain.grad


def relative_errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors of y and both gradients, as multiples of what rounding explains (so <= 1).

    Sums are float32, and results are rounded once: in bfloat16 by a relative 2^-8 at most, or 2^-7 in Triton's
    interpreter, which truncates.
    """
    x, gain, dy = case.tensors(device)
    leaves = [x.requires_grad_()] if gain is None else [x.requires_grad_(), gain.requires_grad_()]
    y = head_norm(x, gain, eps=EPS)
    assert y.shape == dy.shape
    assert y.is_contiguous()

    gradients = torch.autograd.grad(y, leaves, dy)
    assert [gradient.dtype for gradient in gradients] == [x.dtype] * len(leaves) == [y.dtype] * len(leaves)

    relative = 0 if case.dtype == FLOAT32 else 2**-7 if INTERPRETED else 2**-8
    errors = {}
    for name, actual, expected in zip(("y", "x", "gain"), (y, *gradients), reference(case, device), strict=False):
        tolerance = relative * expected.abs() + 3e-6 * expected.abs().amax(-1, keepdim=True) + 1e-12
        errors[name] = float(((actual.detach().double() - expected).abs() / tolerance).max())

    return errors


def kernel_facts(device: str) -> dict[str, object]:
    """Errors of the kernels in all cases, and facts about saved tensors, layouts and determinism."""
    case = Case(batch=2, heads=4, seq=77, dtype=BFLOAT16)
    saved: list[torch.Tensor] = []
    x, gain, dy = case.tensors(device)
    leaves = x.requires_grad_(), gain.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = head_norm(*leaves, eps=EPS)

    kernel = y.grad_fn.next_functions[0][0].name()
    gradients, repeated = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    # The gradient of a sum is an expanded scalar, with strides of 0.
    sum_gradients = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    ones_gradients = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    # The registered shapes and strides are right, with a weight and without.
    for weight in (gain, None):
        torch.library.opcheck(torch.ops.megatron_mea.head_norm.default, (x, weight, EPS))

    compiled = torch.compile(head_norm, backend="aot_eager", fullgraph=True)
    compiled_gradients = torch.autograd.grad(compiled(*leaves, eps=EPS), leaves, dy)
    wide, double = torch.ones(1, 1, 1, MAX_HEAD_DIM + 1, device=device), x.double().detach()
    return {
        "errors": {name: relative_errors(case, device) for name, case in CASES.items()},
        "kernel": kernel,
        "saved": sorted(tuple(tensor.shape) for tensor in saved),
        "saves x itself": any(tensor.data_ptr() == x.data_ptr() for tensor in saved),
        "the same bits": all(map(torch.equal, gradients, repeated)),
        "of a sum": all(map(torch.equal, sum_gradients, ones_gradients)),
        "compiled": all(map(torch.equal, gradients, compiled_gradients)),
        "layout of x": gradients[0].stride() == x.stride(),
        "not fused": [head_norm(wide, None, eps=EPS).shape[-1], str(head_norm(double, None, eps=EPS).dtype)],
        "no rows": list(head_norm(x[:0], gain, eps=EPS).shape),
    }


@pytest.fixture(scope="module")
def kernels() -> dict:
    """`kernel_facts`, from a process with Triton."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")

    triton_env = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, __file__]
    process = subprocess.run(
        command, env=os.environ | triton_env | {"PYTHONPATH": path}, capture_output=True, text=True
    )

    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_formula(name, kernels):
    errors = kernels["errors"][name]
    assert set(errors) == ({"y", "x", "gain"} if CASES[name].gain else {"y", "x"})
    assert max(errors.values()) <= 1, errors


@pytest.mark.slow
def test_kernels_save_only_inputs_and_return_the_layout_of_x(kernels):
    assert "head_norm" in kernels["kernel"]
    assert kernels["saved"] == [[2, 4, 77, 64], [64]]

    for fact in ("saves x itself", "the same bits", "of a sum", "layout of x", "compiled"):
        assert kernels[fact], fact

    assert kernels["not fused"] == [MAX_HEAD_DIM + 1, "torch.float64"]
    assert kernels["no rows"] == [0, 77, 4 * 64]


@pytest.mark.parametrize("name", CASES)
def test_torchs_operations_equal_the_formula(name):
    errors = relative_errors(CASES[name], "cpu")
    assert max(errors.values()) <= 1, errors


def test_torch_compile_traces_torchs_operations_where_there_are_no_kernels():
    """One graph, without a custom operator."""
    x, gain, _ = Case().tensors("cpu")
    compiled = torch.compile(head_norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, gain, eps=EPS), head_norm(x, gain, eps=EPS))


@pytest.mark.parametrize("affine", [True, False])
def test_the_module_is_an_rmsnorm_and_concatenates_heads(affine):
    head_norm_module, rms_norm = (
        module_type(name="norm", size=6, eps=EPS, gain=0.5, affine=affine, tp=NO_TP, reduce_weight_grad=True)
        for module_type in (HeadNorm, RMSNorm)
    )
    for norm in (head_norm_module, rms_norm):
        if affine:
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))

    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head_norm_module(x), rms_norm(x).transpose(1, 2).reshape(2, 5, 18))


if __name__ == "__main__":
    print(json.dumps(kernel_facts("cuda" if torch.cuda.is_available() else "cpu")))
