"""Noise from keys and counters: published vectors, moments, independence, and one kernel where it is compiled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mmgen.flow import philox
from mmgen.flow.philox import keyed_normal

# From kat_vectors of Random123 1.14 (Salmon et al. 2011): counter, key, result of philox4x32-10.
VECTORS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_the_published_vectors(counter: str, key: str, wanted: str) -> None:
    assert philox.philox(words(counter), words(key)) == words(wanted)


def cells(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def noise(keys: int, grid: tuple[int, int] = (8, 8), draws: int = 2, length: int = 12) -> torch.Tensor:
    """Noise [keys, N, K, P] of images with consecutive keys, which is the hardest case."""
    at = cells(*grid)
    each = torch.arange(keys).repeat_interleave(len(at))
    return keyed_normal(each, at.repeat(keys, 1), draws, length).view(keys, len(at), draws, length)


def test_moments_and_distribution() -> None:
    drawn = noise(600).flatten().double().numpy()
    count = len(drawn)
    assert count > 900_000
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        deviation = math.sqrt(math.prod(range(2 * power - 1, 0, -2)) / count)  # of the mean of z^power, at most
        assert abs((drawn**power).mean() - expected) < 5 * deviation, power
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert np.abs(drawn).max() > 4.5
    # Radius and angle of Box-Muller are independent, so that pairs of neighbours are.
    pairs = drawn.reshape(-1, 2)
    assert stats.kstest(np.hypot(*pairs.T) ** 2, "chi2", args=(2,)).pvalue > 1e-3


def test_neighbours_are_not_correlated() -> None:
    """Keys, patches, draws and elements: shift the noise by one along each axis and correlate."""
    drawn = noise(600).double()
    for axis in range(drawn.dim()):
        rest = drawn.shape[axis] - 1
        one, other = drawn.narrow(axis, 0, rest).flatten(), drawn.narrow(axis, 1, rest).flatten()
        for f in (lambda x: x, torch.square, torch.sign):
            r = float(torch.corrcoef(torch.stack([f(one), f(other)]))[0, 1])
            assert abs(r) < 5 / math.sqrt(len(one)), axis


def test_noise_depends_on_key_cell_draw_and_element_alone() -> None:
    at = cells(3, 4)
    keys = torch.tensor([5, -(2**63), 2**63 - 1, -1])
    whole = keyed_normal(keys.repeat_interleave(12), at.repeat(4, 1), 3, 10)
    assert whole.shape == (48, 3, 10)
    assert whole.dtype == torch.float32
    assert len(whole.flatten().unique()) == whole.numel()
    shuffled = torch.randperm(48)
    again = keyed_normal(keys.repeat_interleave(12)[shuffled], at.repeat(4, 1)[shuffled], 3, 10)
    assert torch.equal(again, whole[shuffled])
    for i in (0, 17, 47):
        alone = keyed_normal(keys[i // 12 : i // 12 + 1], at[i % 12 : i % 12 + 1], 2, 7)
        assert torch.equal(alone[0], whole[i, :2, :7])
    assert keyed_normal(keys[:0], at[:0], 3, 10).shape == (0, 3, 10)
    assert keyed_normal(keys, at[:4], 0, 10).shape == (4, 0, 10)


def test_every_bit_of_a_key_counts() -> None:
    base = keyed_normal(torch.tensor([0]), torch.zeros(1, 2, dtype=torch.long), 1, 4)
    for bit in range(64):
        key = torch.tensor([-(2**63) if bit == 63 else 1 << bit])
        assert not torch.isclose(keyed_normal(key, torch.zeros(1, 2, dtype=torch.long), 1, 4), base).any(), bit


def test_extreme_words_give_finite_numbers() -> None:
    low, high = torch.tensor(0), torch.tensor(2**32 - 1)
    for radius in (low, high):
        for angle in (low, high):
            both = torch.stack(philox.box_muller(radius, angle))
            assert both.isfinite().all()
            assert both.abs().max() < 6.8


@pytest.mark.slow
def test_compiled_noise_is_one_kernel_for_any_number_of_patches() -> None:
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    at = cells(4, 4)
    for images in (3, 5, 8):
        keys = torch.arange(images).repeat_interleave(16)
        drawn = philox.compiled_normal(keys, at.repeat(images, 1), 2, 12)
        torch.testing.assert_close(drawn, keyed_normal(keys, at.repeat(images, 1), 2, 12), rtol=0, atol=2e-6)
    assert metrics.generated_kernel_count == 1
