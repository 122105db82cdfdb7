"""The ``entropy-kernels`` command as its users run it: a process, its output and its exit code."""

import io
import json
import math
import os
import re
import runpy
import string
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints, version

import matplotlib.figure
import pytest
import torch

from entropy_kernels import cli, doctor
from entropy_kernels._console import print_table, print_text
from entropy_kernels.analysis import plots
from entropy_kernels.analysis.entropy_law import fit_entropy_law
from entropy_kernels.backends import registry
from entropy_kernels.integrations._patch import Patch


def entropy_at(step):
    return 0.15 + 0.8 * math.exp(-step / 20)


def performance_at(step):
    # a wiggle that no law of e^H follows, so that errors are not 0
    return 0.6 - 0.15 * math.exp(entropy_at(step)) + 0.004 * math.sin(step)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(101):
            row = {"step": step, "entropy": entropy_at(step), "loss": 0.0}
            if step % 4 == 0:
                row["val_pass1"] = performance_at(step)
            file.write(json.dumps(row) + "\n")
    return path


def law_of_log():
    steps = range(0, 101, 4)
    return fit_entropy_law([entropy_at(s) for s in steps], [performance_at(s) for s in steps])


def test_fit_prints_the_law_and_saves_the_plot(log, capsys):
    assert cli.main(["fit", str(log)]) == 0
    law, printed = law_of_log(), capsys.readouterr().out
    text = " ".join(printed.split())
    low, high = law.ceiling_interval
    for part in (
        f"a {law.a:.5g} ± {law.a_se:.2g}",
        f"b {law.b:.5g} ± {law.b_se:.2g}",
        f"R² {law.r2:.4f}",
        f"RMSE {law.rmse:.4g}",
        f"straight line in H R² {law.r2_linear:.4f}, RMSE {law.rmse_linear:.4g}",
        f"{law.ceiling:.4g}, 95% interval [{low:.4g}, {high:.4g}]",
        f"{performance_at(100) / law.ceiling:.1%} of the ceiling",
        "Extrapolation from the first 3 points of ",
        "error on the rest RMSE",
        "final step measured",
    ):
        assert part in text, part
    plot = log.with_name("metrics.entropy-law.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(plot) in printed


@pytest.fixture
def undrawn(monkeypatch):
    """Plots without anything on them, which are written as others are: for tests that do not look at them."""
    monkeypatch.setattr(plots, "fit_figure", lambda *arguments, **keywords: matplotlib.figure.Figure())


@pytest.fixture
def piped():
    """A function that pipes a text into this process."""
    before = os.dup(0)

    def pipe(text):
        reader, writer = os.pipe()
        with os.fdopen(writer, "w") as file:  # what a pipe holds is more than what the tests write
            file.write(text)
        os.dup2(reader, 0)
        os.close(reader)

    yield pipe
    os.dup2(before, 0)
    os.close(before)


@pytest.mark.parametrize(
    ("arguments", "plot"), [(["-", "--output", "mine"], "mine.png"), (["/dev/stdin"], "entropy-law.png")]
)
def test_a_piped_log_is_read_and_a_plot_without_suffix_is_named_as_it_is(
    log, tmp_path, monkeypatch, capsys, piped, undrawn, arguments, plot
):
    monkeypatch.chdir(tmp_path)
    piped(log.read_text())
    assert cli.main(["fit", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"R² {law_of_log().r2:.4f}" in " ".join(out.split())
    assert out.endswith(f"plot: {plot}\n")
    assert (tmp_path / plot).exists()
    piped("")
    assert cli.main(["fit", arguments[0]]) == 2
    assert "/dev/stdin is empty" in capsys.readouterr().err


def test_fit_json_equals_the_library(log, tmp_path, capsys):
    plot = tmp_path / "other.svg"
    assert cli.main(["fit", str(log), "--json", "--fit-fraction", "0.4", "--output", str(plot)]) == 0
    report, law = json.loads(capsys.readouterr().out), law_of_log()
    assert report["law"]["a"] == pytest.approx(law.a)
    assert report["law"]["ceiling_interval"] == pytest.approx(list(law.ceiling_interval))
    assert report["law"]["covariance"][0] == pytest.approx(law.covariance[0].tolist())
    assert report["fraction_of_ceiling"] == pytest.approx(performance_at(100) / law.ceiling)
    assert report["law_of_first_part"]["n"] == 10
    assert report["law_of_first_part"]["extrapolation"]["n"] == 16
    assert report["steps"] == list(range(0, 101, 4))
    assert (report["entropy"], report["performance"]) == (["entropy"], ["val_pass1"])
    assert report["plot"] == str(plot)
    assert "<svg" in plot.read_text()


def test_fit_of_named_columns_in_csv(tmp_path, capsys):
    path = tmp_path / "log.csv"
    lines = ["iteration,H,acc_a,acc_b", *(f"{s},{entropy_at(s)},{performance_at(s)},0.5" for s in range(40))]
    path.write_text("\n".join(lines))
    names = ["--entropy", "H", "--performance", "acc_*"]
    assert cli.main(["fit", str(path), *names, "--no-plot", "--standard-errors", "hac", "--align", "mean"]) == 0
    out = capsys.readouterr().out
    assert "mean of acc_a, acc_b" in out
    assert "Newey–West" in out
    assert "note: no step column" in out
    assert not list(tmp_path.glob("*.png"))


def test_fit_of_a_tensorboard_directory(tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(60):
            writer.add_scalar("actor/entropy", entropy_at(step), step + 1)
            if step % 3 == 0:
                writer.add_scalar("val-core/openai/gsm8k/acc/mean@1", performance_at(step), step + 1)
    assert cli.main(["fit", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["performance"] == ["val-core/openai/gsm8k/acc/mean@1"]
    assert report["law"]["n"] == 20
    assert (tmp_path / "entropy-law.png").exists()


def test_fit_says_what_to_doubt(tmp_path, capsys):
    path = tmp_path / "log.csv"
    # training reward only, in per cent, falling while entropy falls
    rows = [f"{s},{entropy_at(s)},{10 + 40 * entropy_at(s)}" for s in range(12)]
    path.write_text("\n".join(["step,entropy,reward", *rows]))
    assert cli.main(["fit", str(path), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "reward is measured on the training prompts" in out
    assert "a is negative" in out
    assert "performance exceeds 1" in out
    assert "Extrapolation from the first 3 points of 12" in out  # 15 % of 12 would be 1


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "no such file or directory"),
        ("", [], "is empty"),
        ("step,entropy\n0,0.5\n", [], "no known performance metric in the log; name one with --performance: it has e"),
        ("step,H,reward\n0,0.5,0.1\n", [], "no known entropy metric in the log; name one with --entropy"),
        ("step,entropy,reward\n0,0.5,0.1\n", ["--entropy", "nope"], "--entropy: no column 'nope'"),
        ("step,entropy,reward\n0,0.5,0.1\n", [], "expected at least 3 steps with both entropy and reward, got 1"),
        ("step,entropy,reward\n0,.5,.1\n1,.5,.2\n2,.5,.3\n", [], "entropy: expected values that differ"),
        ("step,entropy,reward\n0,900,.1\n1,800,.2\n2,.5,.3\n", [], "entropy: expected nats per token"),
        ("step,entropy,reward\n0,.5,.1\n1,.4,.2\n2,.3,.3\n", ["--output", "no/such/x.png"],
         "error: --output: folder no/such does not exist"),
        ("step,entropy,reward\n0,.5,.1\n1,.4,.2\n2,.3,.3\n", ["--output", "x.unknown"], "webp, got x.unknown"),
    ],
)  # fmt: skip
def test_fit_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, content, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_text(content)
    assert cli.main(["fit", str(path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("entropy-kernels fit: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("name", ["plot.png", "plot.svg", "plot.pdf", "metrics.entropy-law.png", "metrics.jsonl"])
def test_a_plot_replaces_an_earlier_one_and_no_other_file(log, name, capsys, undrawn):
    plot = log.with_name(name)
    arguments = ["fit", str(log), *([] if "law" in name else ["--output", str(plot)])]
    if name != "metrics.jsonl":
        plot.write_text("my thesis")
    before = plot.read_text()
    assert cli.main(arguments) == 2
    assert f"--output: expected a new file or an earlier plot, got {plot}" in capsys.readouterr().err
    assert plot.read_text() == before
    if name != "metrics.jsonl":
        plot.unlink()
        assert cli.main(arguments) == cli.main(arguments) == 0


@pytest.mark.parametrize("kind", ["png", "svg", "svgz", "pdf", "eps", "jpg", "tif", "webp"])
def test_a_plot_of_any_kind_is_known_by_its_metadata(log, kind, capsys, undrawn):
    plot = log.with_name(f"plot.{kind}")
    arguments = ["fit", str(log), "--output", str(plot)]
    assert cli.main(arguments) == cli.main(arguments) == 0, capsys.readouterr().err
    figure = matplotlib.figure.Figure()
    figure.text(0, 0, "entropy-kernels fit\n%%Creator: entropy-kernels fit\n/Creator (entropy-kernels fit)")
    metadata = {"Title" if kind != "eps" else "Creator": "notes on entropy-kernels fit"}
    pictures = ("jpg", "tif", "webp")
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.compression": 0}):
        figure.savefig(plot, metadata=None if kind in pictures else metadata)
    before = plot.read_bytes()
    assert cli.main(arguments) == 2
    assert "name another file or remove it" in capsys.readouterr().err
    assert plot.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ("entropy_kernels doctor --no-check", 1, ""),
        ("entropy_kernels.trainer --help", 1, ""),
        (
            "entropy_kernels.cli fit no.csv",
            2,
            "python -m entropy_kernels.cli fit: error: no such file or directory: no.csv\n",
        ),
    ],
)
def test_neither_a_closed_pipe_nor_an_error_leaves_a_traceback(words, code, error):
    call = [sys.executable, "-m", *words.split()]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == error
    assert process.wait() == code


def test_a_missing_package_names_the_extra(log, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert cli.main(["fit", str(log)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("entropy-kernels fit: error: reading a log needs pandas, which is not installed: pip ")
    assert message.endswith("pip install scipy statsmodels pandas matplotlib tensorboard rich\n")


def test_usage_errors_and_help(capsys):
    for arguments in ([], ["nonsense"], ["fit"], ["fit", "x", "--align", "nearest"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    for arguments in (["--help"], ["fit", "--help"], ["doctor", "--help"], ["verify", "--help"], ["tune", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    for part in ("doctor", "train", "bench", "--fit-fraction", "--no-check", "in float64", "--second-order"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "entropy-kernels: error: COMMAND: expected one of doctor, verify, tune, train, bench, fit, got "
         "'trian'; did you mean train? (entropy-kernels --help explains)\n"),
        (["quickstrat"], "; did you mean train quickstart?"),
        (["doctor", "--jsno"], "entropy-kernels doctor: error: there is no flag --jsno; did you mean --json? "),
        (["fit", "x", "--align", "maen"], "--align: expected one of last, mean, got 'maen'; did you mean mean?"),
        (["fit", "x", "--fit-fraction", "15"],
         "--fit-fraction: expected a number between 0 and 1, got 15; for 15 % type 0.15 "),
        (["train", "quickstrat"], "got quickstrat; did you mean quickstart? (entropy-kernels train --help explains)"),
        (["bench", "--quik"], "entropy-kernels bench: error: there is no flag --quik; did you mean --quick?"),
    ],
)  # fmt: skip
def test_a_slip_is_answered_with_the_nearest_name_in_one_line(arguments, said, capsys):
    try:
        assert cli.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy's: python -m takes it anew
def test_the_name_of_the_program_is_what_was_typed(monkeypatch, capsys):
    for module, words in (("trainer", []), ("cli", ["train"])):
        monkeypatch.setattr(sys, "argv", ["-m", *words, "--stpes", "3"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(f"entropy_kernels.{module}", run_name="__main__", alter_sys=True)
        prog = " ".join([f"python -m entropy_kernels.{module}", *words])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and all(part in error for part in ("--stpes", "--steps INT", f"{prog} --help"))


def test_dispatch_passes_arguments_and_exit_code(monkeypatch):
    seen = []

    class Program:
        @staticmethod
        def main(argv, prog):
            seen.append((argv, prog))
            return 3

    for name, module in (("train", "entropy_kernels.trainer.__main__"), ("bench", "benchmarks.run")):
        monkeypatch.setitem(sys.modules, module.rpartition(".")[0], Program)
        monkeypatch.setitem(sys.modules, module, Program)
        assert cli.main([name, "--help", "x"]) == 3
    assert seen == [(["--help", "x"], f"entropy-kernels {name}") for name in ("train", "bench")]


def test_bench_outside_a_checkout_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("benchmarks", "benchmarks.run"):  # the latter is there if another test has imported it
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["bench", "--list"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_train_without_its_packages_names_the_extra(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["train"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("entropy-kernels train: error: train needs tyro, which is not installed: pip install ")
    assert all(f" {name}" in message for name in ("pandas", "'transformers>=", "jinja2"))


def test_doctor_prints_everything_and_passes(only_torch, capsys):
    code, out = cli.main(["doctor"]), capsys.readouterr().out
    assert code == 0, out
    for part in ("torch", torch.__version__.partition("+")[0], "CPU capability", "token_stats", "OK", "checks passed"):
        assert part in out, part
    assert "left out" in out
    assert "FAIL" not in out


def test_piped_tables_have_a_line_per_row_and_no_trailing_blanks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    doctor.print_table("A title", [("a", "b"), ("longer", "words " * 60 + "end")], ("one", "two"))
    assert capsys.readouterr().out == f"A title\n  one     two\n  a       b\n  longer  {'words ' * 60}end\n\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", [40, 80])
def test_whole_cells_are_in_lists_where_a_table_is_too_wide(monkeypatch, rich, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    if not rich:
        monkeypatch.setattr("entropy_kernels._console.importlib.util.find_spec", lambda name: None)
    rows = [(f"qwen2.5-7b-grpo-{i}", f"0.4{i} (0.46 to 0.48)", "0.1 ± 0.02") for i in range(2)]
    print_table("Laws", rows, ("run", "R at H = 0 (95%)", "a"), terminal := Terminal(), whole=True)
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= columns
    for row in rows:
        assert [sum(cell in line for line in lines) for cell in row[:2]] == [1, 1]
        assert any(set(row) == {cell for cell in row if cell in line} for line in lines) == (columns == 80)


@pytest.mark.parametrize("terminal", [True, False])
def test_text_is_cut_between_words_on_a_terminal_only(monkeypatch, terminal):
    monkeypatch.setenv("COLUMNS", "40")
    text = "note: several logs with metrics-in-common are taken for several runs"
    print_text(text, file := Terminal() if terminal else io.StringIO())
    lines = file.getvalue().splitlines()
    assert " ".join(lines) == text
    assert (max(map(len, lines)) <= 40) == terminal


@pytest.mark.parametrize("rich", [True, False])
def test_doctor_fits_a_terminal_without_breaking_words(only_torch, monkeypatch, rich):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")  # a path breaks where it has to
    monkeypatch.setattr(doctor.ek, "__file__", "/usr/lib/entropy_kernels/__init__.py")
    if not rich:
        monkeypatch.setattr("entropy_kernels._console.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(doctor.ek, "budget_tokens", lambda score, *a, **k: score > 0)  # one that is wrong
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert doctor.run() == 1
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    cells = [*doctor.versions(), *doctor.hardware(), *doctor._backend_rows(), *doctor._auto_rows()]
    assert {word for row in cells for cell in row for word in cell.split()} <= words


@pytest.mark.parametrize(("window", "word"), [(("99.0", "99.1"), "older"), (("1.0", "2.1"), "newer")])
def test_doctor_says_what_is_outside_of_the_support_window(only_torch, monkeypatch, capsys, window, word):
    assert doctor.outside() == []
    monkeypatch.setitem(doctor.WINDOW, "torch", window)
    assert cli.main(["doctor", "--no-check"]) == 0
    found = re.search(r"^torch 2\.\S+ is (\w+) than what is tested, (.*) to (.*)\.$", capsys.readouterr().out, re.M)
    assert found is not None and found.groups() == (word, *window)


def test_doctor_names_what_an_extra_lacks(only_torch, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_installed", lambda requirement: requirement != "pandas")
    assert cli.main(["doctor", "--no-check"]) == 0
    assert "entropy-kernels fit, figures: lacks pandas; pip install scipy" in " ".join(capsys.readouterr().out.split())


def _as_installed(monkeypatch, found_version, points=("entropy_kernels",)):
    """verl in a version, and the entry points of its plugins."""
    of = {"verl": found_version}
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: of.get(name) or version(name))
    found = EntryPoints(EntryPoint(name, f"{name}.plugin", "verl.plugins") for name in points)
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: found.select(group=group))


@pytest.mark.parametrize(
    ("switch", "state"),
    [
        (None, "loaded when verl is imported (VERL_USE_EXTERNAL_PLUGINS=auto)"),
        ("mine, entropy_kernels", "loaded when verl is imported (VERL_USE_EXTERNAL_PLUGINS=mine, entropy_kernels)"),
        ("none", "not loaded: VERL_USE_EXTERNAL_PLUGINS=none does not name entropy_kernels"),
    ],
)
def test_doctor_shows_what_verl_would_be_given(only_torch, monkeypatch, capsys, switch, state):
    _as_installed(monkeypatch, "0.9.1")
    if switch is None:
        monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", switch)
    assert cli.main(["doctor", "--no-check"]) == 0
    out = capsys.readouterr().out
    assert f"verl's plugin  {state}" in out and re.search(r"^  verl +0\.9\.1, tested$", out, re.M)
    assert re.search(r"^  linear_cross_entropy +ready +\S", out, re.M)
    assert {"verl", "trl", "ray"}.isdisjoint(sys.modules)


def test_doctor_says_what_is_refused(only_torch, monkeypatch, capsys):
    _as_installed(monkeypatch, "0.10.0", points=())
    assert cli.main(["doctor", "--no-check"]) == 0
    out = capsys.readouterr().out
    assert "verl           0.10.0, not tested, no function of it is replaced: 0.9.1 is\n" in out
    assert re.search(r"^  linear_cross_entropy +refused +\S", out, re.M)
    assert "verl's plugin  no entry point: install entropy_kernels again, with pip\n" in out
    assert cli.main(["doctor", "--json", "--no-check"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verl_plugin"].startswith("no entry point")
    rows = {row["target"]: row for row in report["integrations"]}
    assert rows["verl.utils.torch_functional:entropy_from_logits"]["state"] == "refused"
    assert all(row["what"] for row in rows.values())


def test_doctor_counts_what_ours_has_served(monkeypatch):
    patch = Patch(
        "string:capwords", lambda original: str.upper, "(s, sep=None)", "numpy", (version("numpy"),), "a test"
    )
    assert doctor.patch_state(patch) == "ready"
    with patch:
        string.capwords("a")
        assert doctor.patch_state(patch) == "in place; calls: 1"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert f"(torch {torch.__version__}, Python 3." in capsys.readouterr().out


def test_doctor_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
    assert set(report["backends"]) == set(registry.OPS)
    assert {row["op"] for row in report["auto"]} == set(registry.OPS)
    checked = {(c["op"], c["backend"]) for c in report["checks"]}
    available = {(op, b) for op, states in report["backends"].items() for b, s in states.items() if s == "available"}
    assert checked == available
    assert all(c["ok"] for c in report["checks"])
    assert cli.main(["doctor", "--json", "--no-check"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"] == []


@pytest.fixture
def only_torch(monkeypatch):
    """The other backends look missing: one is enough to see what doctor makes of a wrong result."""
    states = {op: {"torch": "available", "triton": "left out"} for op in registry.OPS}
    monkeypatch.setattr(doctor.ek, "backends", lambda: states)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda stats: stats._replace(entropy=stats.entropy * 1.001),
        lambda stats: stats._replace(logprob=stats.logprob.detach() + 0 * stats.entropy),
        lambda stats: stats._replace(vocab_covariance=-stats.vocab_covariance),
        lambda stats: stats._replace(collision=stats.collision * float("nan")),
    ],
)
def test_doctor_finds_a_wrong_backend(only_torch, monkeypatch, capsys, break_it):
    right = doctor.ek.token_stats
    monkeypatch.setattr(doctor.ek, "token_stats", lambda *a, **k: break_it(right(*a, **k)))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "checks failed" in out


@pytest.mark.parametrize(
    ("op", "break_it"),
    [
        ("token_covariance", lambda covariance: covariance + 1e-4),
        ("token_covariance", lambda covariance: torch.where(covariance == 0, math.nan, covariance)),
        ("kl_cov_mask", lambda mask: mask.roll(1)),
        ("budget_mask", lambda mask: torch.zeros_like(mask)),
        ("clip_cov_mask", lambda mask: torch.ones_like(mask)),
        ("clip_cov_mask", lambda mask: torch.zeros_like(mask)),
    ],
)
def test_doctor_finds_a_wrong_selection(only_torch, monkeypatch, op, break_it):
    function = {"budget_mask": "budget_tokens"}.get(op, op)
    right = getattr(doctor.ek, function)
    assert all(c.ok for c in doctor.self_check())
    monkeypatch.setattr(doctor.ek, function, lambda *a, **k: break_it(right(*a, **k)))
    assert {c.op for c in doctor.self_check() if not c.ok} == {op}


def test_doctor_reports_a_backend_that_raises(only_torch, monkeypatch, capsys):
    def broken(*arguments, **keywords):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(doctor.ek, "token_stats", broken)
    assert cli.main(["doctor"]) == 1
    assert "RuntimeError: no kernel image" in " ".join(capsys.readouterr().out.split())
