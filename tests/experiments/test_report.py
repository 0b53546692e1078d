"""The verb: its table, its pairs, its refusals, and the page in a real browser."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.curves import noisy_loss, write_run

from megatron_mea.cli import main
from megatron_mea.experiments.page import render
from megatron_mea.experiments.results import best_rate, cautions, differences, evaluate_runs
from megatron_mea.experiments.runs import find_runs

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
ASYMPTOTES = {("plain", 1e-3): 3.2, ("plain", 3e-3): 3.1, ("mea", 1e-3): 3.15, ("mea", 3e-3): 3.0}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two variants at three rates, two seeds each; the highest rate spikes. Runs of MEA recorded their heads."""
    out = tmp_path_factory.mktemp("sweep")
    for (variant, lr), asymptote in ASYMPTOTES.items():
        for seed in (1, 2):
            write_run(
                folder=out / f"{variant}-lr{lr}-seed{seed}",
                variant=variant,
                lr=lr,
                seed=seed,
                loss=noisy_loss(seed, asymptote=asymptote)[1],
            )

    for variant in ("plain", "mea"):
        loss = noisy_loss(5, asymptote=3.5)[1]
        loss[200:205] += 2
        write_run(folder=out / f"{variant}-lr0.01-seed1", variant=variant, lr=0.01, seed=1, loss=loss)

    (out / "slurm").mkdir()
    random = np.random.default_rng(0)
    # Heads are drawn of the best run, which noise may make any of these.
    for run in out.glob("mea-*"):
        with (run / "heads.jsonl").open("w") as stream:
            for step in (0, 100, 200, 300, 400):
                row = {"step": step, "tokens": 0}
                for layer in range(6):
                    for matrix_name in ("hlc_k", "hlc_v"):
                        matrix = np.eye(4) + 1e-3 * step * random.normal(size=(4, 4))
                        row[f"hlc/layers.{layer}.self_attn.{matrix_name}"] = matrix.tolist()
                    row[f"head_rms/layers.{layer}.self_attn"] = (random.random(8) + 0.1).tolist()
                stream.write(json.dumps(row) + "\n")

    return out


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new/report.html"
    assert main(["report", str(sweep), "--out", str(out), "--tokens", "1e7", "5e11"]) == 0
    return out


@pytest.mark.slow
def test_the_table(page):
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    assert list(rows[0]) == ["variant", "lr", "seed", "L0", "L0_low", "L0_high", "alpha", "stable", "best"]
    assert len(rows) == 10

    for row in rows:
        if row["lr"] == "0.01":
            assert (row["stable"], row["best"]) == ("false", "false")
            continue

        truth = ASYMPTOTES[row["variant"], float(row["lr"])]
        # Two in twenty intervals of 95 % may miss; these eight do not by much.
        assert float(row["L0_low"]) - 0.02 <= truth <= float(row["L0_high"]) + 0.02
        assert float(row["alpha"]) == pytest.approx(0.6, abs=0.2)
        assert row["stable"] == "true"

    best = {row["variant"]: row for row in rows if row["best"] == "true"}
    assert set(best) == {"plain", "mea"}

    for variant, row in best.items():
        lowest = min(float(r["L0"]) for r in rows if r["variant"] == variant and r["stable"] == "true")
        assert float(row["L0"]) == lowest

    assert len([row for row in rows if row["best"] == "true"]) == 2


def test_files_beside_the_page(page):
    names = {path.name for path in page.parent.iterdir()}
    figures = {"rates", "curves-mea", "curves-plain", "hlc_k-mea", "hlc_v-mea", "heads-mea"}
    assert names == {"report.html", "report.csv", "report-curves.csv", *(f"report-{name}.png" for name in figures)}

    rows = list(csv.DictReader((page.parent / "report-curves.csv").open()))
    assert len(rows) == 10 * 400
    assert rows[399]["validation_loss"] != ""


def test_pairs_of_seeds(sweep):
    results = evaluate_runs(find_runs([str(sweep)]))
    by_rates = {(difference.rates, difference.metric): difference for difference in differences(results)}
    assert {(difference.variant, difference.baseline) for difference in by_rates.values()} == {("mea", "plain")}

    best = by_rates["best of each: 0.003, 0.003", "validation loss"]
    # The same noise in both: what is left is the difference of the asymptotes.
    assert best.values == pytest.approx([-0.1, -0.1], abs=1e-6)
    assert best.interval == pytest.approx((-0.1, -0.1), abs=1e-5)

    single = by_rates["0.01", "validation loss"]
    assert (len(single.values), single.interval) == (1, None)
    assert ("0.003", "validation loss") not in by_rates


def test_latent_keys_and_values_are_a_variant_of_their_own(tmp_path):
    asymptotes = {"plain": 3.1, "mea": 3.0, "mea-latent": 2.9}
    for name, asymptote in asymptotes.items():
        write_run(
            folder=tmp_path / name,
            variant=name.removesuffix("-latent"),
            lr=1e-3,
            seed=1,
            loss=noisy_loss(1, asymptote=asymptote)[1],
            model={"hlc_form": "latent", "key_latent_dim": 8} if name.endswith("latent") else {},
        )

    runs = find_runs([str(tmp_path)])
    assert [run.variant for run in runs] == ["mea", "mea-latent", "plain"]
    pairs = {(item.variant, item.baseline): item.mean for item in differences(evaluate_runs(runs))}
    expected = {("mea", "plain"): -0.1, ("mea-latent", "plain"): -0.2, ("mea-latent", "mea"): -0.1}
    assert pairs == pytest.approx(expected, abs=1e-6)
    assert cautions(runs) == [
        "Not the same in all runs, so that differences may be theirs: model.key_latent_dim, model.value_latent_dim."
    ]
    out = tmp_path / "report/page.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    assert out.with_name("page-curves-mea-latent.png").exists()


def test_mea_is_compared_with_its_parts_too(tmp_path):
    for variant, asymptote in (("plain", 3.1), ("plain_norm", 3.06), ("mea_no_norm", 3.12), ("mea", 3.0)):
        write_run(
            folder=tmp_path / variant, variant=variant, lr=1e-3, seed=1, loss=noisy_loss(1, asymptote=asymptote)[1]
        )

    results = evaluate_runs(find_runs([str(tmp_path)]))
    actual = {
        (difference.variant, difference.baseline): difference.mean
        for difference in differences(results)
        if difference.metric == "validation loss"
    }
    expected = {("mea", "plain"): -0.1, ("mea", "plain_norm"): -0.06, ("mea", "mea_no_norm"): -0.12}
    expected |= {("plain_norm", "plain"): -0.04, ("mea_no_norm", "plain"): 0.02}
    assert actual == pytest.approx(expected)


def test_a_rate_at_which_one_seed_diverged_is_no_best_rate(tmp_path):
    for name, lr, asymptote in (("low", 1e-3, 3.1), ("high", 1e-2, 3.0)):
        write_run(folder=tmp_path / name, variant="mea", lr=lr, seed=1, loss=noisy_loss(1, asymptote=asymptote)[1])

    assert best_rate(evaluate_runs(find_runs([str(tmp_path)])), "mea") == 1e-2

    other = write_run(
        folder=tmp_path / "diverged", variant="mea", lr=1e-2, seed=2, loss=noisy_loss(2)[1][:100], finished=False
    )
    (other / "DIVERGED").write_text('{"step": 101, "reason": "the loss is nan"}')
    assert best_rate(evaluate_runs(find_runs([str(tmp_path)])), "mea") == 1e-3


def test_a_t_interval_is_scipys():
    from scipy.stats import ttest_1samp

    from megatron_mea.experiments.results import Difference

    values = np.array([0.1, -0.2, 0.05, 0.3])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert Difference(variant="mea", baseline="plain", metric="", rates="", values=values).interval == pytest.approx(
        (expected.low, expected.high)
    )


def test_runs_that_go_on_are_reported(tmp_path, capsys):
    """Unfinished, with half a line at the end, and with too little to fit."""
    run = write_run(folder=tmp_path / "run", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1][:25], finished=False)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 26, "tok')

    assert main(["report", str(run), str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    (row,) = csv.DictReader((tmp_path / "r.csv").open())
    assert (row["L0"], row["alpha"], row["stable"]) == ("", "", "true")

    text = (tmp_path / "r.html").read_text()
    assert "not identified" in text
    assert "(unfinished)" in text
    assert "5 rows after warm-up are too few" in text
    assert "no records of heads" in text


def test_runs_that_failed_or_diverged_before_they_had_a_loss_are_reported(tmp_path):
    for name, mark in (("failed", "FAILED"), ("diverged", "DIVERGED")):
        run = write_run(folder=tmp_path / "sweep" / name, variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1][:30])
        (run / "FINISHED").unlink()
        (run / mark).write_text('{"step": 1, "status": 1, "reason": "no <luck> at all"}')
        (run / "metrics.jsonl").unlink()

    # Nothing but what the sweep wrote before it began.
    (tmp_path / "sweep/failed/slurm").mkdir()
    (tmp_path / "sweep/failed/config.yaml").rename(tmp_path / "sweep/failed/slurm/config.yaml")
    write_run(folder=tmp_path / "sweep/whole", variant="mea", lr=1e-2, seed=2, loss=noisy_loss(2)[1])
    assert main(["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "r.html")]) == 0
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["stable"], row["best"]) for row in rows] == [("false", "false"), ("false", "false"), ("true", "true")]

    text = (tmp_path / "r.html").read_text()
    assert "no &lt;luck&gt; at all" in text
    assert "no <luck>" not in text
    assert "unknown</span> (failed)" in text


def test_names_of_strangers_are_escaped(tmp_path):
    loss, script = noisy_loss(1)[1][:30], """<script>alert("it's")<!--"""
    run = write_run(folder=tmp_path / script, variant="mea", lr=1e-3, seed=1, loss=loss, finished=False)
    (run / "FAILED").write_text(json.dumps({"step": 1, "status": 1, "reason": f"{script} {run}"}))
    (run / "metrics.jsonl").unlink()
    results = evaluate_runs(find_runs([str(tmp_path)]))
    text = render(results=results, differences=[], tokens=[], figures={script: (script, b"PNG")}, notes=[script])
    assert "<script" not in text
    assert "<!--" not in text
    # The reason and the name of the run, the caption twice and the note; nothing ends an attribute.
    assert text.count("&lt;script&gt;alert(&#34;it&#39;s&#34;)&lt;!--") == 5
    assert f'src="data:image/png;base64,{base64.b64encode(b"PNG").decode()}"' in text


def test_what_makes_runs_hard_to_compare_is_said(tmp_path):
    loss = noisy_loss(1)[1]
    write_run(folder=tmp_path / "a", variant="mea", lr=1e-3, seed=1, loss=loss, model={"num_component_heads": 4})
    write_run(folder=tmp_path / "b", variant="plain", lr=2e-3, seed=2, loss=loss)
    assert cautions(find_runs([str(tmp_path)])) == []

    write_run(folder=tmp_path / "c", variant="mea", lr=1e-3, seed=1, loss=loss, model={"hlc_mixes": "keys"})
    differ, twice = cautions(find_runs([str(tmp_path)]))
    assert differ.endswith(": model.hlc_mixes.")
    assert twice.endswith(": mea 0.001 seed 1.")


def test_a_falling_rate_is_said(tmp_path):
    write_run(
        folder=tmp_path / "run", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1], schedule={"kind": "cosine"}
    )
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0
    assert "the rate falls during the run" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("heads", "note"),
    [
        ('{"step": 0}\n{"step": 1}\n', "{run}/heads.jsonl:1: no row of head statistics."),
        ('{"step": 1e300}\n', "{run}/heads.jsonl:1 has a number that no run has."),
        (None, "{run}/heads.jsonl is no regular file."),
    ],
)
def test_statistics_of_heads_that_are_none_cost_their_figures_alone(heads, note, tmp_path):
    run, page = tmp_path / "run", tmp_path / "r.html"
    write_run(folder=run, variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1])
    (run / "heads.jsonl").mkdir() if heads is None else (run / "heads.jsonl").write_text(heads)
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert "mea, rate 0.001, seed 1: " in page.read_text()
    assert note.format(run=run) in page.read_text()
    assert len(list(csv.DictReader(page.with_suffix(".csv").open()))) == 1


@pytest.mark.parametrize(
    ("arguments", "where", "message"),
    [
        (["none", "--out", "r.html"], "none", "no such folder"),
        (["empty", "--out", "r.html"], "empty", "no run in it"),
        (["run/config.yaml", "--out", "r.html"], "run/config.yaml", "a file"),
        (["run", "--out", "r.pdf"], "--out", "r.pdf"),
        (["run", "--out", "folder.html"], "folder.html", "a folder"),
        (["run", "--out", "r.html", "--tokens", "-1"], "--tokens", "-1.0"),
        (["broken", "--out", "r.html"], "metrics.jsonl:2", "no row of metrics"),
        (["words", "--out", "r.html"], "metrics.jsonl:2", "no row of metrics"),
        (["strange", "--out", "r.html"], "strange/config.yaml", "an unknown key"),
        (["run", "--out", "run/config.yaml/r.html"], "error: run/config.yaml/r.html", "exists"),
    ],
)
def test_what_cannot_be_reported(arguments, where, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(folder=tmp_path / "run", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1][:40])
    write_run(folder=tmp_path / "broken", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1][:40])
    lines = (tmp_path / "broken/metrics.jsonl").read_text().splitlines()
    (tmp_path / "broken/metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]))
    write_run(folder=tmp_path / "words", variant="mea", lr=1e-3, seed=1, loss=noisy_loss(1)[1][:40])
    (tmp_path / "words/metrics.jsonl").write_text("\n".join([lines[0], lines[1].replace(" 1,", ' "one",'), *lines[2:]]))
    write_run(
        folder=tmp_path / "strange",
        variant="mea",
        lr=1e-3,
        seed=1,
        loss=noisy_loss(1)[1][:40],
        model={"hiden_size": 3},
    )
    for name in ("empty", "folder.html"):
        (tmp_path / name).mkdir()

    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert where in error
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium: bash tests/experiments/install.sh")
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900)])
def test_the_page_in_a_browser(page, width, height, tmp_path):
    """Nothing is asked of a network, nothing complains, every figure is drawn, and a phone scrolls in tables alone."""
    from playwright.sync_api import sync_playwright

    requests, complaints = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        images = tab.evaluate(
            "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
        )
        wide = tab.evaluate("document.documentElement.scrollWidth")
        tables = tab.evaluate(
            "[...document.querySelectorAll('table')].map(t => getComputedStyle(t.parentElement).overflowX)"
        )
        font = tab.evaluate("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)")
        tab.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()

    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    assert len(images) == len(list(page.parent.glob("*.png")))
    assert all(complete and natural > 300 and 200 < drawn <= width and alt for complete, natural, drawn, alt in images)
    assert wide <= width
    assert set(tables) == {"auto"}
    assert font >= 12
    assert (tmp_path / "page.png").stat().st_size > 50_000
