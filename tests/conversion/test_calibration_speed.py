"""What makes a calibration fast, each against the direct computation in float64; and when a fit ends early."""

from dataclasses import replace

import pytest
import torch
from planted_pairs import CONTEXT, copied_first_layer, first_layer

from conversion.calibration import gradient_fit
from conversion.calibration.candidates import HeadOutputs, left_over
from conversion.calibration.closed_form import OTHER_LAMBDA, head_moments, refit_outputs
from conversion.calibration.gradient_fit import RATES, LocalFit, fit_layer, is_too_fast, steps_to_skip
from conversion.calibration.refit import COLUMNS, NormalEquations


@pytest.fixture
def problem(tmp_path):
    """The first layer of a planted LLaMA: 4 sequences judge, 28 are fitted."""
    return first_layer(tmp_path)


@pytest.fixture
def start(problem):
    return copied_first_layer(problem)


@pytest.mark.parametrize("num_features", [5, COLUMNS + 3])
def test_float32_blocks_sum_to_the_direct_float64_product(num_features):
    torch.manual_seed(0)
    features = torch.randn(3000, num_features) + 1
    targets = torch.randn(3000, 4)
    weights = torch.rand(3000)
    sums = NormalEquations(num_features, 4, torch.device("cpu"))
    sums.add(features, targets, weights)
    weighted = features.double() * weights.double()[:, None]
    # float32 products: 2^-24 of a block's sum of squares, of which many errors cancel
    torch.testing.assert_close(sums.gram, weighted.t() @ features.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(sums.cross, weighted.t() @ targets.double(), rtol=1e-5, atol=1e-3)
    assert torch.equal(sums.gram, sums.gram.t())


def test_an_indefinite_sum_is_solved_with_more_ridge():
    """Two equal columns, one sum rounded up: an eigenvalue of -1e-6, below any ridge asked for."""
    sums = NormalEquations(2, 1, torch.device("cpu"))
    features = torch.ones(8, 2)
    sums.add(features, features[:, :1], torch.ones(8))
    sums._upper[0, 1] *= 1 + 1e-6
    torch.testing.assert_close(sums.solve(0.0).sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_heads_outputs_of_two_lambdas_give_those_of_any(problem, start):
    at = {
        value: HeadOutputs.gather(problem, start.replaced({}, lambda_init=value)) for value in (0, OTHER_LAMBDA, 0.2)
    }
    mixed = at[0].mixed(at[OTHER_LAMBDA], 0.2 / OTHER_LAMBDA)
    for ours, theirs in ((mixed.fitted, at[0.2].fitted), (mixed.judging, at[0.2].judging)):
        # float32, an average of two
        torch.testing.assert_close(ours.inputs["sub_norm"], theirs.inputs["sub_norm"], rtol=1e-5, atol=1e-6)


def test_head_outputs_judge_as_the_whole_layer_does(problem, start):
    outputs = HeadOutputs.gather(problem, start)
    assert left_over(problem, start, outputs, refit=False) == pytest.approx(problem.residual(start), rel=1e-5)
    # The sample is all of the text here, so its refit is the refit.
    refit = problem.residual(refit_outputs(problem, start))
    assert left_over(problem, start, outputs, refit=True) == pytest.approx(refit, rel=1e-4)
    assert refit < 0.9 * problem.residual(start)


def test_moments_of_heads_are_blocks_of_the_gram_matrix():
    torch.manual_seed(0)
    num_tokens = 50
    num_kv_heads = 2
    group = 3
    head_dim = 4
    heads = torch.randn(num_tokens, num_kv_heads, group, head_dim)
    weights = torch.rand(num_tokens)
    sums = NormalEquations(num_kv_heads * group * head_dim, 1, torch.device("cpu"))
    sums.add(heads.flatten(1), torch.zeros(num_tokens, 1), weights)
    wide = heads.double()
    expected = torch.einsum("nkgd,nkge,n->kde", wide, wide, weights.double())
    torch.testing.assert_close(head_moments(sums, num_kv_heads, head_dim), expected, rtol=1e-5, atol=1e-5)


def test_a_check_without_progress_skips_steps_of_the_schedule():
    options = LocalFit(check_steps=20, worth_going_on=0.01)
    assert steps_to_skip(0.98, 1.0, options) == 0
    assert steps_to_skip(0.995, 1.0, options) == steps_to_skip(1.5, 1.0, options) == 20
    assert steps_to_skip(1.0, float("inf"), options) == 0


@pytest.mark.parametrize(("falls", "expected"), [(True, 40), (False, 25)])
def test_a_fit_that_stops_falling_ends_early(problem, start, monkeypatch, falls, expected):
    """40 steps, a check every 5: of 8 checks the first helps, and each other one skips 5 steps."""
    losses = iter(0.5**count if falls else 1.0 for count in range(100))
    monkeypatch.setattr(gradient_fit, "held_back_loss", lambda *arguments: next(losses))
    steps = []
    fit = LocalFit(steps=40, check_steps=5, batch_tokens=2 * CONTEXT)
    fit_layer(problem, start, fit, steps.append)
    assert len(steps) == expected and steps[-1] == 40


def test_a_rate_that_a_layer_does_not_bear_is_lowered(problem, start):
    """A hundred times too high: the layer comes out nearer all the same, and of rates too high for it, as it was."""
    residual = problem.residual(start)
    options = LocalFit(steps=30, check_steps=5, batch_tokens=8 * CONTEXT)
    high = replace(options, learning_rate=3.0, lambda_learning_rate=0.02)
    assert problem.residual(fit_layer(problem, start, high, lambda step: None)) < residual
    steps: list[int] = []
    hopeless = replace(options, learning_rate=1e6)
    assert fit_layer(problem, start, hopeless, steps.append) is start
    assert steps == sorted(steps) and len(steps) == RATES * (options.check_steps - 1)


@pytest.mark.parametrize(
    ("reached", "position", "too_fast"),
    [(1.5, 20, False), (1.51, 20, True), (1.01, 100, True), (1.0, 100, False), (float("nan"), 20, True)],
)
def test_a_loss_above_the_start_is_borne_for_a_third_of_the_schedule(reached, position, too_fast):
    assert is_too_fast(reached, 1.0, position, LocalFit(steps=200)) == too_fast
