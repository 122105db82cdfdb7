"""The page of the report, for jinja2. It refers to nothing outside itself."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2.5rem auto;
  padding: 0 1.2rem; } h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
  h2 { font-size: 1.2rem; margin-top: 2.4rem; }
  p, li { max-width: 48rem; }
  img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
  table.data { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
  table.data caption { text-align: left; color: #666; padding-bottom: .3rem; }
  table.data th, table.data td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3;
  white-space: nowrap; } table.data th[scope=row], table.data thead th:first-child { text-align: left; }
  .wide { overflow-x: auto; }
  .muted { color: #666; }
  code, pre { font: .86rem/1.5 ui-monospace, monospace; background: #f5f5f5; }
  pre { padding: .7rem .9rem; overflow-x: auto; }
  .yes::before { content: "\\2713 holds"; color: #1a7f37; font-weight: 600; }
  .no::before { content: "\\2717 does not hold"; color: #b3261e; font-weight: 600; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="muted">Seed{{ "s" if record.seeds|length > 1 else "" }} {{ record.seeds|join(", ") }} · {{ minutes }}
minutes · {{ record.hardware }} · {% for name, value in record.versions.items() %}{{ name }} {{ value }}{{ " · " if not
loop.last else "" }}{% endfor %}</p>
<pre>{{ record.command }}</pre>

<p>{{ about }} All runs start from the same model; they differ in which tokens lose their gradient (Clip-Cov), get a
penalty (KL-Cov), or neither (baseline). Dashed are controls, which treat as many tokens, chosen at random, and runs
that take torch's own operations in place of this library's.</p>

<h2>Where the runs end</h2>
<div class="wide">{{ end_table|safe }}</div>
<p class="muted">H: policy entropy in nats per token, mean of the last rollouts. pass@k: chance that one of k samples
is right, on held-out prompts, unbiased. Distinct right: different right answers among the samples of a prompt. Share of
ops: time in this library's ops, by default with the head's matrix products, over the time of a step.</p>

<h2>What a step costs</h2>
<div class="wide">{{ cost_table|safe }}</div>
<p class="muted">{{ costs }}{% if memory %} {{ memory }} Linear: from hidden states; logits:
materialised; torch: materialised, and torch's own operations.
Weights and optimizer state, the same under all, are not counted.{% endif %}</p>

<h2>Entropy</h2>
<img alt="Policy entropy over training steps" src="{{ pictures.entropy }}">
<p>Without intervention the policy spends its entropy early. The tokens that spend it are few: those whose
log-probability and advantage are both high. Taking their gradient, or holding them back, keeps the entropy; doing the
same to random tokens does not.</p>

<h2>pass@1 and pass@k</h2>
<img alt="pass@1 and pass@8 over training steps" src="{{ pictures.performance }}">

<h2>The law R = -a e<sup>H</sup> + b</h2>
<img alt="Validation accuracy against entropy, with the fitted law and a straight line" src="{{ pictures.law }}">
<ul>{% for line in laws %}<li>{{ line }}</li>{% endfor %}</ul>

<h2>Entropy change: measured against predicted</h2>
<img alt="Measured against predicted entropy change, three ways" src="{{ pictures.entropy_change }}">
<ul>{% for line in changes %}<li>{{ line }}</li>{% endfor %}</ul>
<p>Why the three differ. The theory takes each row of logits as its own parameter: there, for a small step, prediction
and measurement agree to rounding and curvature (first panel). In a network a step for one token moves the logits of
all others, and AdamW rescales the step of every weight, so a sum of per-token predictions keeps the direction and
loses the size (second panel; its prediction is for a unit step, so only correlation and sign mean something). The
gradient of the entropy in the weights, times the change of the weights in one update, contains all of this and is again
exact to first order (third panel). Over all updates of a rollout curvature
adds up, and the agreement is less close.</p>

<h2>Covariance is heavy-tailed</h2>
<div class="wide">{{ covariance_table|safe }}</div>
<img alt="Mean covariance of the top fractions of tokens" src="{{ pictures.covariance }}">

<h2>Checks</h2>
<table class="data"><thead><tr><th scope="col">claim</th><th scope="col">measured</th><th
scope="col"></th></tr></thead><tbody> {% for check in record.criteria %}<tr><th scope="row">{{ check.claim
}}</th><td>{{ check.figure }}</td><td class="{{ "yes" if check.holds else "no" }}"></td></tr> {% endfor
%}</tbody></table> {% if walk and record.seeds|length == 1 %}<p class="muted">The claims are stated for three
seeds, <code>make reproduce-toy</code>: one seed has no spread to compare with and may miss a claim (Clip-Cov was seen
to end with 1.8 to 2.1 times the baseline's entropy).</p>{% endif %}

<h2>What does not show at this scale</h2>
<ul>{% for line in record.limits %}<li>{{ line }}</li>{% endfor %}</ul>
</body>
</html>
"""
