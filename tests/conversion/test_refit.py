"""Least squares from Gram matrices against torch.linalg.lstsq on all tokens at once."""

import pytest
import torch

from conversion.calibration.refit import NormalEquations, ridge_refit
from conversion.errors import ConversionError


def gathered(features, targets, weights):
    sums = NormalEquations(features.shape[1], targets.shape[1], torch.device("cpu"))
    for part in zip(features.split(7), targets.split(7), weights.split(7), strict=True):
        sums.add(*part)
    return sums


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return torch.randn(60, 5), torch.randn(60, 3), torch.rand(60) + 0.1


def test_solution_in_chunks_is_that_of_all_tokens(problem):
    features, targets, weights = problem
    root = weights.double().sqrt()[:, None]
    expected = torch.linalg.lstsq(root * features.double(), root * targets.double()).solution
    sums = gathered(features, targets, weights)
    torch.testing.assert_close(sums.solve(0.0), expected, rtol=1e-6, atol=1e-6)
    error = (root * (features.double() @ expected - targets.double())).square().sum()
    assert sums.residual(expected) == pytest.approx((error / (root * targets).square().sum()).item(), rel=1e-5)


def test_ridge_is_that_of_the_augmented_system(problem):
    features, targets, weights = problem
    sums = gathered(features, targets, weights)
    prior = torch.randn(5, 3)
    strength = (0.3 * sums.gram.diagonal()).sqrt()[:, None]
    root = weights.double().sqrt()[:, None]
    rows = torch.cat((root * features.double(), strength * torch.eye(5)))
    expected = torch.linalg.lstsq(rows, torch.cat((root * targets.double(), strength * prior))).solution
    torch.testing.assert_close(sums.solve(0.3, prior), expected, rtol=1e-6, atol=1e-6)


def test_singular_gram_keeps_the_prior_where_nothing_is_said(problem):
    features, targets, weights = problem
    features = torch.cat((features, torch.zeros(60, 2), features[:, :1]), dim=1)  # two idle columns, one said twice
    prior = torch.arange(24.0).view(8, 3)
    solution = gathered(features, targets, weights).solve(0.0, prior)
    assert solution.isfinite().all()
    torch.testing.assert_close(solution[5:7], prior[5:7].double())
    fitted = gathered(features[:, :5], targets, weights)
    assert gathered(features, targets, weights).residual(solution) == pytest.approx(
        fitted.residual(fitted.solve(0.0)), rel=1e-6
    )


def test_feature_of_rounding_alone_keeps_the_prior(problem):
    """Else its weight would be its inverse: a product that is exact here and overflows in half precision."""
    features, targets, weights = problem
    features = torch.cat((features, 1e-9 * torch.randn(60, 1)), dim=1)
    solution = gathered(features, targets, weights).solve(0.0, torch.ones(6, 3))
    assert torch.equal(solution[5], torch.ones(3, dtype=torch.float64))


def test_refit_never_leaves_more_than_the_prior(problem):
    features, targets, _ = problem
    prior = torch.linalg.lstsq(features, targets).solution
    noise = gathered(torch.randn(6, 5), torch.randn(6, 3), torch.ones(6))
    judge = gathered(features, targets, torch.ones(60))
    chosen, residual = ridge_refit(noise, judge, prior, (0.0, 1e-3))
    assert residual <= judge.residual(prior)
    torch.testing.assert_close(chosen, prior.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(problem, value):
    features, targets, weights = problem
    features[3, 2] = value
    with pytest.raises(ConversionError, match="not finite"):
        gathered(features, targets, weights).solve(1e-3)
