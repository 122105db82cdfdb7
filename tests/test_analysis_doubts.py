"""What ``fit`` says of a law that means less or nothing, and the names that trainers give."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from entropy_kernels import cli
from entropy_kernels.analysis import metric_names
from entropy_kernels.analysis.metric_names import LogError
from run_logs import course, fitted, jsonl, rows

# --- (i): where the law means less -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"tokens_dropped": 9}, "tokens whose gradient is dropped (Clip-Cov or a control) (metric tokens_dropped)"),
        ({"tokens_penalized": 9}, "a KL penalty on some tokens (KL-Cov or a control) (metric tokens_penalized)"),
        ({"target_entropy": 0.4}, "a target entropy (metric target_entropy)"),
        ({"entropy_coef": 0.01}, "an entropy bonus (metric entropy_coef)"),
        ({"train/entropy_coef": 0.01}, "an entropy bonus (metric train/entropy_coef)"),
        ({"entropy/threshold": 0.6}, "a loss on high-entropy tokens only (metric entropy/threshold)"),
    ],
)
def test_no_ceiling_where_something_holds_the_entropy(tmp_path, capsys, extra, what):
    entries = [{**row, **(extra if row["step"] > 3 else {})} for row in rows(*course(range(40)))]
    path = jsonl(tmp_path / "log.jsonl", entries)
    assert cli.main(["fit", str(path), "--json", "--no-plot"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["no_bound"] == [f"entropy is held by {what}"]
    assert found["fraction_of_ceiling"] is None
    assert cli.main(["fit", str(path), "--no-plot"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no bound of this run" in out
    assert out.count("entropy is held by") == 1
    assert "ceiling (H = 0)" not in out
    assert "fit a run without it for a ceiling" in out
    # the same columns at 0 hold nothing
    (fit,) = fitted(jsonl(path, [{**row, **dict.fromkeys(extra, 0)} for row in rows(*course(range(40)))]))
    assert fit.no_bound == []


def test_names_and_settings_that_say_what_holds_the_entropy(tmp_path):
    for name, what in (("grpo_clip-cov_s0", "Clip-Cov"), ("klcov", "KL-Cov"), ("dapo-clip-higher", "Clip-higher"),
                       ("entropy_bonus", "an entropy bonus"), ("target-entropy", "a target entropy")):  # fmt: skip
        (fit,) = fitted(jsonl(tmp_path / f"{name}.jsonl", rows(*course(range(40)))))
        assert fit.no_bound == [f"entropy is held by {what} (by the name of the run, {name})"]
    plain = ("no-clip-cov", "grpo", "noklcov", "kl-covariance", "entropy_coef-0.0", "entropy-regression")
    for folder, held in (("kl_cov-0", True), *((name, False) for name in plain)):
        (tmp_path / folder).mkdir()
        (fit,) = fitted(jsonl(tmp_path / folder / "metrics.jsonl", rows(*course(range(40)))))
        assert bool(fit.no_bound) == held
    path = jsonl(tmp_path / "metrics.jsonl", rows(*course(range(40))))
    for content, count in (({"method": "kl_cov"}, 1), ({"entropy_coef": 0.0, "target_entropy": None}, 0),
                           ({"entropy_coef": 0.01, "target_entropy": "0.4"}, 2)):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(content))
        found = metric_names.held_by(pd.DataFrame(), "", content)
        assert len(found) == count
        assert bool(fitted(path)[0].no_bound) == bool(count)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda h, r: (40 * h, r), "entropies reach 36 nats, more than ln V of any vocabulary"),
        (lambda h, r: (0.6 + h / 100, r), "nats only: in e^H, H = 0 lies"),
        (lambda h, r: (h[::-1], r[::-1]), "entropy rises over the run"),
        (lambda h, r: (np.concatenate([h[::2], h[::-2]]), np.concatenate([r[::2], r[::-2]])), "entropy rises again by"),
        (lambda h, r: (h, r - 0.5), "performance is negative at times"),
        (lambda h, r: (h, 100 * r), "performance exceeds 1"),
        (lambda h, r: (h, 1 - r), "a is negative"),
    ],
)
def test_doubts(tmp_path, change, note):
    steps, h, r = course(range(40))
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", rows(steps, h, r)))
    assert fit.notes == []
    (fit,) = fitted(jsonl(tmp_path / "log.jsonl", rows(steps, *change(h, r))))
    assert any(note in each for each in fit.notes), fit.notes
    assert bool(fit.no_bound) == (note.startswith("entropies reach") or note == "a is negative")


def test_kl_terms_estimates_and_sums_are_told(tmp_path):
    steps, h, r = course(range(40))

    def notes(entropy="entropy", **extra):
        entries = [{**row, **extra} for row in rows(steps, h, r, entropy)]
        return " ".join(fitted(jsonl(tmp_path / "log.jsonl", entries))[0].notes)

    assert "the run has a KL term (metric actor/kl_loss)" in notes(**{"actor/kl_loss": 0.01})
    assert "train/approx_entropy: it is an estimate" in notes("train/approx_entropy")
    assert "objective/entropy: it is a sum over a response's tokens" in notes("objective/entropy")
    assert notes("actor/entropy") == ""


# --- names -----------------------------------------------------------------------------------------------------------


# Columns that trainers write beside each other; the entropy comes first, the performance that is to be found second.
@pytest.mark.parametrize(
    ("columns", "training"),
    [
        ("train/entropy_loss eval/eval_math_pass1 eval/eval_math_pass8 train/reward train/kl eval/global_step", False),
        ("train/entropy_loss train/rollout/reward_mean train/return train/policy_loss", True),
        ("train/entropy_loss eval/aime-2024 eval/aime-2024/response_len/mean eval/aime-2024-truncated_ratio "
         "eval/aime-2024-pass@8 eval/step rollout/raw_reward", False),
        ("train/entropy_loss rollout/raw_reward rollout/log_probs rollout/correct_entropy", True),
        ("train/approx_entropy validation/accuracy train/reward train/loss", False),
        ("entropy/all/mean eval/aime/effective/solver/avg@16 eval/aime/all/solver/avg@16 entropy/math/mean "
         "train/agg/effective/solver/reward/mean", False),
        ("entropy/mean eval_reward entropy/max entropy/min reward", False),
        ("entropy/entropy_mean reward entropy/entropy_max rewards/acc/std", True),
        ("ppo_actor/update/entropy/avg eval-rollout/reward rollout/reward ppo_actor/update/entropy/min "
         "ppo_actor/task_reward/avg", False),
        ("trainer/entropy/mean validation_reward/_mean rollout_reward/_mean validation_reward/_max", False),
        ("trainer/entropy/mean rollout_reward/_mean", True),
        ("policy/entropy_avg objective/scores objective/entropy", True),
    ],
)  # fmt: skip
def test_names_of_more_trainers_are_known(columns, training):
    entropy, performance, *_ = columns.split()
    names = sorted(columns.split())
    assert metric_names.find_entropy(names).columns == (entropy,)
    found = metric_names.find_performance(names)
    assert (found.columns, found.training) == ((performance,), training)


def test_no_name_of_transformers_is_taken_for_a_score_of_slime():
    with pytest.raises(LogError, match="no known performance metric"):
        metric_names.find_performance(
            ["eval/loss", "eval/runtime", "eval/samples_per_second", "eval/step", "eval/entropy"]
        )


def test_the_docs_list_every_name_and_every_treatment():
    page = (Path(__file__).parents[1] / "docs" / "entropy-law.md").read_text()
    for names in (metric_names.ENTROPY, metric_names.VALIDATION, metric_names.TRAINING):
        assert metric_names.names_table(names) in page
    for treatment in (*metric_names.TREATMENTS, *metric_names.KL_TERMS):
        assert f"{treatment.pattern}`" in page


def test_an_entropy_that_performance_does_not_follow_gives_no_ceiling(tmp_path):
    random = np.random.default_rng(0)
    steps, h = np.arange(200), 0.5 + random.normal(0, 0.1, 200)
    noise, same = 0.5 + random.normal(0, 0.05, 200), np.full(200, 0.5)
    for r, told in ((noise, "does not differ from 0"), (same, "every performance is the same")):
        (fit,) = fitted(jsonl(tmp_path / "log.jsonl", rows(steps, h, r)))
        assert fit.no_bound == ["performance is not seen to follow entropy"]
        assert any(told in note for note in fit.notes)
    assert fit.extrapolated is None
    (fit,) = fitted(jsonl(tmp_path / "law.jsonl", rows(steps, h, 0.8 - 0.2 * np.exp(h))))
    assert fit.no_bound == []


def test_the_extrapolation_takes_three_points_unless_they_have_one_entropy(tmp_path):
    steps, h = np.arange(12), np.linspace(0.8, 0.2, 12)
    for entropy, count in ((h, 3), (np.maximum(h, 0.3), 3), (np.minimum(h, 0.5), None)):
        (fit,) = fitted(jsonl(tmp_path / "log.jsonl", rows(steps, entropy, 0.8 - 0.2 * np.exp(h))))
        assert (fit.extrapolated and fit.extrapolated.n) == count
