"""The mathematics of virtual heads, against numpy's singular values and constructions of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.compression import procrustes as module
from megatron_mea.compression.factorise import VirtualHeads, factorise
from megatron_mea.compression.procrustes import align_heads

ROTATIONS = ("any", "orthogonal", "rotary")


@st.composite
def sizes(draw) -> tuple[int, int, int, int, int]:
    """h, d, inputs, h', seed"""
    heads = draw(st.integers(1, 6))
    dim = 2 * draw(st.integers(1, 4))
    return heads, dim, draw(st.integers(1, 40)), draw(st.integers(1, heads)), draw(st.integers(0, 2**16))


def drawn(*, heads: int, dim: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (h, d, D) of heads of different sizes, and inputs (tokens, D) that are not white."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=(heads, dim, inputs)) * np.logspace(0, 1, heads)[:, None, None]
    return weights, generator.normal(size=(3 * inputs + 5, inputs)) * np.logspace(0, -2, inputs)


def moment_of(weights: np.ndarray, x: np.ndarray | None = None) -> torch.Tensor:
    rows = weights.reshape(-1, weights.shape[-1])
    outputs = rows if x is None else rows @ x.T / np.sqrt(len(x))
    return torch.from_numpy(outputs @ outputs.T)


def rebuilt(virtual: VirtualHeads, weights: np.ndarray) -> np.ndarray:
    """The composite heads (h, d, D) that the virtual ones give."""
    dim, inputs = weights.shape[1:]
    components = (virtual.selection.numpy() @ weights.reshape(-1, inputs)).reshape(-1, dim, inputs)
    composites = np.einsum("ch,cax->hax", virtual.combination.numpy(), components)
    return composites if virtual.rotations is None else virtual.rotations.numpy() @ composites


class TestFactorise:
    @given(sizes())
    def test_of_weights_it_is_the_singular_value_decomposition(self, case):
        heads, dim, inputs, rank, seed = case
        weights, _ = drawn(heads=heads, dim=dim, inputs=inputs, seed=seed)
        virtual = factorise(moment_of(weights), num_heads=heads, rank=rank)
        values = np.linalg.svd(weights.reshape(heads, -1), compute_uv=False)
        error = np.square(weights - rebuilt(virtual, weights)).sum()
        optimum, total = np.square(values[rank:]).sum(), np.square(values).sum()

        assert error == pytest.approx(optimum, rel=1e-9, abs=1e-12 * total)
        assert virtual.lost == pytest.approx(optimum / total, abs=1e-12)

    @given(sizes())
    def test_of_outputs_it_is_that_of_weights_times_a_root_of_the_moment(self, case):
        heads, dim, inputs, rank, seed = case
        weights, x = drawn(heads=heads, dim=dim, inputs=inputs, seed=seed)
        virtual = factorise(moment_of(weights, x), num_heads=heads, rank=rank)
        root = np.linalg.cholesky(x.T @ x / len(x))
        values = np.linalg.svd((weights @ root).reshape(heads, -1), compute_uv=False)
        error = np.square((weights - rebuilt(virtual, weights)) @ x.T).sum() / len(x)
        optimum, total = np.square(values[rank:]).sum(), np.square(values).sum()

        assert error == pytest.approx(optimum, rel=1e-6, abs=1e-9 * total)
        assert virtual.lost == pytest.approx(optimum / total, abs=1e-9)

    @given(sizes())
    def test_with_all_heads_nothing_changes(self, case):
        heads, dim, inputs, _, seed = case
        weights, x = drawn(heads=heads, dim=dim, inputs=inputs, seed=seed)
        for moment in (moment_of(weights), moment_of(weights, x)):
            for equal in (False, True):
                virtual = factorise(moment, num_heads=heads, rank=heads, equal_heads=equal)
                np.testing.assert_allclose(
                    rebuilt(virtual, weights), weights, rtol=1e-12, atol=1e-12 * np.abs(weights).max()
                )

    def test_equal_heads_minimise_relative_errors(self):
        weights, _ = drawn(heads=4, dim=6, inputs=20, seed=0)
        sizes = np.linalg.norm(weights.reshape(4, -1), axis=1)[:, None, None]
        balanced = rebuilt(factorise(moment_of(weights), num_heads=4, rank=2, equal_heads=True), weights)
        values = np.linalg.svd((weights / sizes).reshape(4, -1), compute_uv=False)
        assert np.square((weights - balanced) / sizes).sum() == pytest.approx(np.square(values[2:]).sum())

        plain = rebuilt(factorise(moment_of(weights), num_heads=4, rank=2), weights)
        assert np.square((weights - plain) / sizes).sum() > 1.1 * np.square(values[2:]).sum()

    def test_a_head_of_zeros(self):
        weights, _ = drawn(heads=3, dim=4, inputs=10, seed=0)
        weights[1] = 0
        for equal in (False, True):
            virtual = factorise(moment_of(weights), num_heads=3, rank=2, equal_heads=equal)
            np.testing.assert_allclose(rebuilt(virtual, weights), weights, atol=1e-12)
            assert virtual.lost < 1e-14


class TestAlign:
    @pytest.mark.slow
    @given(sizes(), st.sampled_from(ROTATIONS))
    def test_what_is_lost_is_what_it_says_and_no_more_than_without_rotations(self, case, rotation):
        heads, dim, inputs, rank, seed = case
        weights, x = drawn(heads=heads, dim=dim, inputs=inputs, seed=seed)
        moment = moment_of(weights, x)
        virtual = align_heads(moment, num_heads=heads, rank=rank, rotation=rotation)
        error = np.square((weights - rebuilt(virtual, weights)) @ x.T).sum() / np.square(weights @ x.T).sum()

        assert virtual.lost == pytest.approx(error, rel=1e-5, abs=1e-8)
        assert virtual.lost <= factorise(moment, num_heads=heads, rank=rank).lost + 1e-9

    @pytest.mark.slow
    @given(sizes(), st.sampled_from(ROTATIONS))
    def test_factors_have_the_sizes_that_training_gives(self, case, rotation):
        heads, dim, inputs, rank, seed = case
        weights, _ = drawn(heads=heads, dim=dim, inputs=max(inputs, heads * dim), seed=seed)
        virtual = align_heads(moment_of(weights), num_heads=heads, rank=rank, rotation=rotation)
        mean = (virtual.rotations.mT @ virtual.rotations).mean(0)
        torch.testing.assert_close(mean, torch.eye(dim).double(), rtol=0, atol=1e-7)
        rows = virtual.combination @ virtual.combination.mT
        torch.testing.assert_close(rows, torch.eye(rank).double(), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("rotation", ROTATIONS)
    def test_heads_that_are_alike_but_for_a_rotation_become_one(self, rotation):
        generator = np.random.default_rng(0)
        basis = generator.normal(size=(8, 30))
        rotations = generator.normal(size=(4, 8, 8))
        if rotation == "orthogonal":
            rotations = np.linalg.qr(rotations)[0]
        elif rotation == "rotary":
            numbers = generator.normal(size=(2, 4, 4))
            real, imaginary = (np.stack([np.diag(row) for row in part]) for part in numbers)
            rotations = np.block([[real, -imaginary], [imaginary, real]])

        weights = rotations @ basis
        virtual = align_heads(moment_of(weights), num_heads=4, rank=1, rotation=rotation)
        assert virtual.lost < 1e-6
        assert factorise(moment_of(weights), num_heads=4, rank=1).lost > 0.3

        np.testing.assert_allclose(rebuilt(virtual, weights), weights, atol=0.02)

    def test_rotations_of_keys_commute_with_rope(self):
        weights, x = drawn(heads=3, dim=8, inputs=20, seed=1)
        rotations = align_heads(moment_of(weights, x), num_heads=3, rank=1, rotation="rotary").rotations.numpy()
        angles = np.random.default_rng(0).normal(size=4)
        cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
        rope = np.block([[cos, -sin], [sin, cos]])
        np.testing.assert_allclose(rope @ rotations, rotations @ rope, atol=1e-12)

    def test_rotations_of_normed_values_are_orthogonal(self):
        weights, x = drawn(heads=3, dim=8, inputs=20, seed=1)
        rotations = align_heads(moment_of(weights, x), num_heads=3, rank=2, rotation="orthogonal").rotations
        torch.testing.assert_close(rotations.mT @ rotations, torch.eye(8).double().expand(3, 8, 8), atol=1e-10, rtol=0)

    @pytest.mark.slow
    def test_many_equal_singular_values_are_no_obstacle(self, monkeypatch):
        """Orthogonal T of 128 features give 128 times the same, of which LAPACK's decomposition does not converge."""
        monkeypatch.setattr(module, "_MAX_ROUNDS", 6)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(8 * 128, 1100, generator=generator, dtype=torch.float64)
        moment = rows @ rows.mT
        assert (
            align_heads(moment, num_heads=8, rank=6, rotation="orthogonal").lost
            < factorise(moment, num_heads=8, rank=6).lost
        )
