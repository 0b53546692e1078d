"""The mathematics of virtual heads, against numpy's singular values and constructions of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.compression import align as module
from megatron_mea.compression.align import align
from megatron_mea.compression.factorise import VirtualHeads, factorise

TURNS = ("any", "orthogonal", "rotary")


@st.composite
def sizes(draw) -> tuple[int, int, int, int, int]:
    """h, d, inputs, h', seed"""
    heads = draw(st.integers(1, 6))
    dim = 2 * draw(st.integers(1, 4))
    return heads, dim, draw(st.integers(1, 40)), draw(st.integers(1, heads)), draw(st.integers(0, 2**16))


def drawn(heads: int, dim: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (h, d, D) of heads of different sizes, and inputs (tokens, D) that are not white."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=(heads, dim, inputs)) * np.logspace(0, 1, heads)[:, None, None]
    return weights, generator.normal(size=(3 * inputs + 5, inputs)) * np.logspace(0, -2, inputs)


def moment_of(weights: np.ndarray, x: np.ndarray | None = None) -> torch.Tensor:
    rows = weights.reshape(-1, weights.shape[-1])
    outputs = rows if x is None else rows @ x.T / np.sqrt(len(x))
    return torch.from_numpy(outputs @ outputs.T)


def rebuilt(made: VirtualHeads, weights: np.ndarray) -> np.ndarray:
    """The composite heads (h, d, D) that the virtual ones give."""
    dim, inputs = weights.shape[1:]
    components = (made.selection.numpy() @ weights.reshape(-1, inputs)).reshape(-1, dim, inputs)
    found = np.einsum("ch,cax->hax", made.combination.numpy(), components)
    return found if made.turns is None else made.turns.numpy() @ found


class TestFactorise:
    @given(sizes())
    def test_of_weights_it_is_the_singular_value_decomposition(self, case):
        heads, dim, inputs, rank, seed = case
        weights, _ = drawn(heads, dim, inputs, seed)
        made = factorise(moment_of(weights), heads, rank)
        values = np.linalg.svd(weights.reshape(heads, -1), compute_uv=False)
        error = np.square(weights - rebuilt(made, weights)).sum()
        optimum, total = np.square(values[rank:]).sum(), np.square(values).sum()
        assert error == pytest.approx(optimum, rel=1e-9, abs=1e-12 * total)
        assert made.lost == pytest.approx(optimum / total, abs=1e-12)

    @given(sizes())
    def test_of_outputs_it_is_that_of_weights_times_a_root_of_the_moment(self, case):
        heads, dim, inputs, rank, seed = case
        weights, x = drawn(heads, dim, inputs, seed)
        made = factorise(moment_of(weights, x), heads, rank)
        root = np.linalg.cholesky(x.T @ x / len(x))
        values = np.linalg.svd((weights @ root).reshape(heads, -1), compute_uv=False)
        error = np.square((weights - rebuilt(made, weights)) @ x.T).sum() / len(x)
        optimum, total = np.square(values[rank:]).sum(), np.square(values).sum()
        assert error == pytest.approx(optimum, rel=1e-6, abs=1e-9 * total)
        assert made.lost == pytest.approx(optimum / total, abs=1e-9)

    @given(sizes())
    def test_with_all_heads_nothing_changes(self, case):
        heads, dim, inputs, _, seed = case
        weights, x = drawn(heads, dim, inputs, seed)
        for moment in (moment_of(weights), moment_of(weights, x)):
            for equal in (False, True):
                found = rebuilt(factorise(moment, heads, heads, equal), weights)
                np.testing.assert_allclose(found, weights, rtol=1e-12, atol=1e-12 * np.abs(weights).max())

    def test_equal_heads_minimise_relative_errors(self):
        weights, _ = drawn(4, 6, 20, 0)
        sizes = np.linalg.norm(weights.reshape(4, -1), axis=1)[:, None, None]
        made = rebuilt(factorise(moment_of(weights), 4, 2, equal_heads=True), weights)
        values = np.linalg.svd((weights / sizes).reshape(4, -1), compute_uv=False)
        assert np.square((weights - made) / sizes).sum() == pytest.approx(np.square(values[2:]).sum())
        plain = rebuilt(factorise(moment_of(weights), 4, 2), weights)
        assert np.square((weights - plain) / sizes).sum() > 1.1 * np.square(values[2:]).sum()

    def test_a_head_of_zeros(self):
        weights, _ = drawn(3, 4, 10, 0)
        weights[1] = 0
        for equal in (False, True):
            made = factorise(moment_of(weights), 3, 2, equal)
            np.testing.assert_allclose(rebuilt(made, weights), weights, atol=1e-12)
            assert made.lost < 1e-14


class TestAlign:
    @given(sizes(), st.sampled_from(TURNS))
    def test_what_is_lost_is_what_it_says_and_no_more_than_without_turns(self, case, turn):
        heads, dim, inputs, rank, seed = case
        weights, x = drawn(heads, dim, inputs, seed)
        moment = moment_of(weights, x)
        made = align(moment, heads, rank, turn)
        error = np.square((weights - rebuilt(made, weights)) @ x.T).sum() / np.square(weights @ x.T).sum()
        assert made.lost == pytest.approx(error, rel=1e-5, abs=1e-8)
        assert made.lost <= factorise(moment, heads, rank).lost + 1e-9

    @given(sizes(), st.sampled_from(TURNS))
    def test_factors_have_the_sizes_that_training_gives(self, case, turn):
        heads, dim, inputs, rank, seed = case
        weights, _ = drawn(heads, dim, max(inputs, heads * dim), seed)
        made = align(moment_of(weights), heads, rank, turn)
        mean = (made.turns.mT @ made.turns).mean(0)
        torch.testing.assert_close(mean, torch.eye(dim).double(), rtol=0, atol=1e-7)
        rows = made.combination @ made.combination.mT
        torch.testing.assert_close(rows, torch.eye(rank).double(), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("turn", TURNS)
    def test_heads_that_are_alike_but_for_a_turn_become_one(self, turn):
        generator = np.random.default_rng(0)
        basis = generator.normal(size=(8, 30))
        turns = generator.normal(size=(4, 8, 8))
        if turn == "orthogonal":
            turns = np.linalg.qr(turns)[0]
        elif turn == "rotary":
            numbers = generator.normal(size=(2, 4, 4))
            real, imaginary = (np.stack([np.diag(row) for row in part]) for part in numbers)
            turns = np.block([[real, -imaginary], [imaginary, real]])
        weights = turns @ basis
        made = align(moment_of(weights), 4, 1, turn)
        assert made.lost < 1e-6
        assert factorise(moment_of(weights), 4, 1).lost > 0.3
        np.testing.assert_allclose(rebuilt(made, weights), weights, atol=0.02)

    def test_turns_of_keys_commute_with_rotation(self):
        weights, x = drawn(3, 8, 20, 1)
        turns = align(moment_of(weights, x), 3, 1, "rotary").turns.numpy()
        angles = np.random.default_rng(0).normal(size=4)
        cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
        rotation = np.block([[cos, -sin], [sin, cos]])
        np.testing.assert_allclose(rotation @ turns, turns @ rotation, atol=1e-12)

    def test_turns_of_normed_values_are_orthogonal(self):
        weights, x = drawn(3, 8, 20, 1)
        turns = align(moment_of(weights, x), 3, 2, "orthogonal").turns
        torch.testing.assert_close(turns.mT @ turns, torch.eye(8).double().expand(3, 8, 8), atol=1e-10, rtol=0)

    def test_many_equal_singular_values_are_no_obstacle(self, monkeypatch):
        """Orthogonal T of 128 features give 128 times the same, of which LAPACK's decomposition does not converge."""
        monkeypatch.setattr(module, "_ROUNDS", 6)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(8 * 128, 1100, generator=generator, dtype=torch.float64)
        moment = rows @ rows.mT
        assert align(moment, 8, 6, "orthogonal").lost < factorise(moment, 8, 6).lost
