"""Predicted entropy change: finite differences, the dense covariance in float64, and the paper's Theorem 1."""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.backends import registry

V = 11


def entropy(z, temperature):
    logp = torch.log_softmax(z / temperature, -1)
    return -(logp.exp() * logp).sum(-1)


def covariance(p, f, g):
    """Cov_{a~p}(f, g), dense."""
    return (p * f * g).sum(-1) - (p * f).sum(-1) * (p * g).sum(-1)


def rows(seed=0, n=6, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, V, dtype=torch.float64, generator=generator) * 2
    y = torch.randint(0, V, (n,), generator=generator)
    a = torch.randn(n, dtype=torch.float64, generator=generator)
    logp = torch.log_softmax(z / temperature, -1)
    p = logp.exp()
    step = torch.nn.functional.one_hot(y, V).double() - p
    return z, y, a, covariance(p, logp, step), step


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_equals_the_finite_difference(temperature):
    z, _, a, c, step = rows(temperature=temperature)
    ratio = torch.linspace(0.8, 1.2, 6, dtype=torch.float64)
    eta = 1e-6
    delta = (eta * a * ratio / temperature)[:, None] * step
    # central: the error is O(η³)
    measured = (entropy(z + delta, temperature) - entropy(z - delta, temperature)) / 2
    predicted = ek.predicted_entropy_change(c, a, step_size=eta, temperature=temperature, ratio=ratio)
    assert predicted.dtype == torch.float64
    torch.testing.assert_close(predicted, measured, rtol=2e-8, atol=2e-8 * eta)


def test_one_gradient_step_of_the_loss_changes_entropy_by_it():
    # η includes the loss's normalisation: a token mean over N rows multiplies each row's step by lr / N
    z, y, a, c, _ = rows(seed=1, n=8)
    z.requires_grad_()
    learning_rate = 1e-5
    logprob = torch.log_softmax(z, -1).gather(1, y[:, None])[:, 0]
    loss = -(a * logprob).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    measured = entropy(z.detach() - learning_rate * gradient, 1.0) - entropy(z.detach(), 1.0)
    predicted = ek.predicted_entropy_change(c, a, step_size=learning_rate / 8)
    torch.testing.assert_close(predicted, measured, rtol=1e-5, atol=1e-15)


def test_lemma_1_with_the_dense_covariance():
    z, _, a, c, step = rows(seed=2)
    logp = torch.log_softmax(z, -1)
    dense = -covariance(logp.exp(), logp, 0.01 * a[:, None] * step)
    torch.testing.assert_close(ek.predicted_entropy_change(c, a, step_size=0.01), dense, rtol=1e-12, atol=1e-18)


def test_expectation_over_the_policy_is_theorem_1():
    # bandit with deterministic advantages of mean 0 under π: E_{y~π}[ΔH] = -η·Cov_{a~π}(log π, π·A)
    generator = torch.Generator().manual_seed(5)
    logp = torch.log_softmax(torch.randn(V, dtype=torch.float64, generator=generator) * 2, -1)
    p = logp.exp()
    reward = torch.randn(V, dtype=torch.float64, generator=generator)
    advantage = reward - (p * reward).sum()
    step = torch.eye(V, dtype=torch.float64) - p  # row y: e_y - π
    c = covariance(p, logp.expand(V, V), step)
    eta = 0.02
    expected = (p * ek.predicted_entropy_change(c, advantage, step_size=eta)).sum()
    torch.testing.assert_close(expected, -eta * covariance(p, logp, p * advantage), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_the_covariance_of_token_stats(temperature):
    z, y, a, c, _ = rows(seed=3, n=16, temperature=temperature)
    stats = ek.token_stats(z.float(), y, temperature=temperature, backend="torch")
    predicted = ek.predicted_entropy_change(stats.vocab_covariance, a, step_size=0.1, temperature=temperature)
    exact = ek.predicted_entropy_change(c, a, step_size=0.1, temperature=temperature)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted.double(), exact, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_finite_difference_through_token_stats_in_float64(backend):
    reason = registry.unavailable("token_stats", backend)
    if reason is not None:
        pytest.skip(reason)
    temperature, eta = 0.8, 1e-5
    z, y, a, _, step = rows(seed=6, n=12, temperature=temperature)
    delta = (eta * a / temperature)[:, None] * step

    def stats(logits):
        return ek.token_stats(logits, y, temperature=temperature, backend=backend)

    measured = (stats(z + delta).entropy - stats(z - delta).entropy) / 2
    predicted = ek.predicted_entropy_change(stats(z).vocab_covariance, a, step_size=eta, temperature=temperature)
    torch.testing.assert_close(predicted, measured, rtol=2e-8, atol=2e-8 * eta)


def test_under_softcap_it_holds_in_the_capped_logits():
    softcap = 5.0
    z, y, a, _, _ = rows(seed=4)
    capped = softcap * torch.tanh(z / softcap)
    stats = ek.token_stats(z, y, softcap=softcap, backend="torch")
    eta = 1e-6
    p = torch.softmax(capped, -1)
    delta = (eta * a)[:, None] * (torch.nn.functional.one_hot(y, V).double() - p)
    measured = (entropy(capped + delta, 1.0) - entropy(capped - delta, 1.0)) / 2
    predicted = ek.predicted_entropy_change(stats.vocab_covariance, a, step_size=eta)
    torch.testing.assert_close(predicted, measured, rtol=1e-7, atol=1e-7 * eta)


def test_shapes_dtypes_and_broadcasting():
    c = torch.randn(3, 5)
    per_sequence = torch.randn(3, 1)
    full = ek.predicted_entropy_change(c, per_sequence.expand(3, 5), step_size=0.5)
    torch.testing.assert_close(ek.predicted_entropy_change(c, per_sequence, step_size=0.5), full)
    torch.testing.assert_close(full, -0.5 * per_sequence * c)
    assert ek.predicted_entropy_change(c.bfloat16(), per_sequence, step_size=1).dtype == torch.float32
    assert ek.predicted_entropy_change(c, per_sequence.double(), step_size=1).dtype == torch.float32
    assert ek.predicted_entropy_change(c[:0], 1, step_size=1).shape == (0, 5)
    t = torch.full((5,), 2.0)
    torch.testing.assert_close(ek.predicted_entropy_change(c, 1, step_size=1.0, temperature=t), -c / 4)
    masked = ek.predicted_entropy_change(c, per_sequence, step_size=0.5, ratio=torch.tensor([1.0, 0, 1, 0, 1]))
    assert bool((masked[:, [1, 3]] == 0).all())
    assert ek.predicted_entropy_change(torch.tensor(0.3), 2.0, step_size=0.1).shape == ()


def test_compiles_without_a_graph_break():
    compiled = torch.compile(ek.predicted_entropy_change, fullgraph=True, backend="aot_eager")
    c, a = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(
        compiled(c, a, step_size=0.1, temperature=0.9),
        ek.predicted_entropy_change(c, a, step_size=0.1, temperature=0.9),
    )


def test_numbers_that_change_do_not_compile_again():
    graphs = []

    def count_graphs(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ek.predicted_entropy_change, fullgraph=True, backend=count_graphs)
    c, a = torch.randn(4), torch.randn(4)
    for step in range(1, 5):
        numbers = {"step_size": 0.1 * step, "temperature": 0.3 * step}
        torch.testing.assert_close(compiled(c, a, **numbers), ek.predicted_entropy_change(c, a, **numbers))
    assert len(graphs) == 2  # the numbers of the first call as constants, then any number


@pytest.mark.parametrize("temperature", [torch.tensor(0.7), torch.tensor([0.5, 0.7, 1.0, 2.0])])
def test_compiles_with_a_temperature_tensor(temperature):
    compiled = torch.compile(ek.predicted_entropy_change, fullgraph=True, backend="eager")
    c, a = torch.randn(4), torch.randn(4)
    numbers = {"step_size": 0.1, "temperature": temperature}
    torch.testing.assert_close(compiled(c, a, **numbers), ek.predicted_entropy_change(c, a, **numbers))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_covariance": [0.1]}, TypeError, "vocab_covariance: expected a floating-point tensor, got list"),
        ({"vocab_covariance": torch.ones(3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        (
            {"advantages": torch.ones(4)},
            ValueError,
            r"advantages: expected a shape that broadcasts to \(3,\), got \(4,\)",
        ),
        ({"advantages": torch.ones(2, 3)}, ValueError, "advantages: expected a shape that broadcasts"),
        ({"ratio": torch.ones(2)}, ValueError, "ratio: expected a shape that broadcasts"),
        ({"step_size": torch.ones(2)}, ValueError, "step_size: expected a shape that broadcasts"),
        ({"advantages": "high"}, TypeError, "advantages: expected a number or a torch.Tensor, got str"),
        ({"temperature": 0.0}, ValueError, "temperature: expected > 0, got 0"),
        ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, ValueError, "temperature: expected > 0, got -2"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected > 0, got nan"),
        ({"temperature": 1e-39}, ValueError, "temperature: expected within .*, got 1e-39"),
        ({"temperature": 1e39}, ValueError, "temperature: expected a number within .*, got 1e.39"),
        ({"step_size": 1e300}, ValueError, "step_size: expected a number within .*, got 1e.300"),
        ({"ratio": 10**400}, ValueError, "ratio: expected a number within .*, got an int of 1329 bits"),
        ({"advantages": -1e39}, ValueError, "advantages: expected a number within .*, got -1e.39"),
    ],
)
def test_clear_errors(change, error, message):
    arguments = {"vocab_covariance": torch.ones(3), "advantages": torch.ones(3), "step_size": 0.1} | change
    with pytest.raises(error, match=message):
        ek.predicted_entropy_change(arguments.pop("vocab_covariance"), arguments.pop("advantages"), **arguments)
