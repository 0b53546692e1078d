"""Sweeps: which runs they are, what is skipped, and what a failing one does to the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.desk import BASH

from megatron_mea.config import Config
from megatron_mea.errors import UserError
from megatron_mea.experiments.sweep import combinations, run_here

FAILS = "echo 'sbatch: error: Batch job submission failed' >&2; exit 1"


def combined(*overrides: str, variants=(), rates=(), seeds=()) -> dict[str, Config]:
    configs, _ = combinations(
        path="tiny.yaml", overrides=overrides, variants=variants, learning_rates=rates, seeds=seeds, out=Path("out")
    )
    assert all(Path(config.run.dir).parent == Path("out") for config in configs)
    return {Path(config.run.dir).name: config for config in configs}


def test_every_combination_is_a_run(desk):
    configs = combined(variants=["plain", "mea"], rates=["1e-3", "3e-3"], seeds=["1", "2"])
    assert list(configs) == [f"{v}-lr{lr}-seed{s}" for v in ("plain", "mea") for lr in ("1e-3", "3e-3") for s in "12"]
    for name, config in configs.items():
        variant, rate, seed = config.model.attention_variant, config.optimizer.lr, config.training.seed
        assert name == f"{variant}-lr{rate * 1000:.0f}e-3-seed{seed}"


def test_what_is_not_listed_is_the_files(desk):
    ((name, config),) = combined("optimizer.lr=0.25", "training.seed=7", "run.dir=elsewhere").items()
    assert name == "mea-lr0.25"
    assert (config.optimizer.lr, config.training.seed, config.model.attention_variant) == (0.25, 7, "mea")


def test_only_variants_with_a_combination_have_their_own_component_heads(desk):
    """The file has 1 of them for 2 composite heads."""
    names = ["plain", "plain_norm", "mea", "mea_no_norm"]
    configs = combined(variants=names)
    assert [configs[f"{name}-lr0.01"].model.component_heads for name in names] == [[2, 2], [2, 2], [1, 1], [1, 1]]


def test_a_variant_reads_its_own_sizes_of_the_file(desk):
    """One file has the sizes of all forms; latent keys and values stand beside component heads."""
    sizes = ["model.key_latent_dim=12", "model.value_latent_dim=[9, 10]"]
    configs = combined(*sizes, variants=["plain", "mea", "mea-latent", "mea_no_norm-latent"])
    models = {name.removesuffix("-lr0.01"): config.model for name, config in configs.items()}
    assert {name: (model.hlc_form, model.component_heads) for name, model in models.items()} == {
        "plain": ("head", [2, 2]),
        "mea": ("head", [1, 1]),
        "mea-latent": ("latent", [2, 2]),
        "mea_no_norm-latent": ("latent", [2, 2]),
    }
    assert (models["mea-latent"].key_latent_dim, models["mea-latent"].value_latent_dim) == (12, [9, 10])

    # The file's own form, where no variants are listed.
    (name,) = combined(*sizes, "model.hlc_form=latent", "model.num_component_heads=null")
    assert name == "mea-latent-lr0.01"


@pytest.mark.parametrize(
    ("lists", "where", "message"),
    [
        ({"seeds": ["1", "2", "1"]}, "sweep", "mea-lr0.01-seed1 and mea-lr0.01-seed1"),
        ({"variants": ["mea", "mea"]}, "sweep", "mea-lr0.01 and mea-lr0.01"),
        ({"rates": ["1e-3", "0.001"]}, "sweep", "mea-lr1e-3 and mea-lr0.001"),
        ({"seeds": ["1", "+1"]}, "sweep", "mea-lr0.01-seed1 and mea-lr0.01-seed+1"),
        ({"variants": ["plane"]}, "model.attention_variant", "plane"),
        ({"variants": ["plain-latent"]}, "model.hlc_form", "`plain` has no head combination"),
        ({"rates": ["1e-3", "fast"]}, "optimizer.lr", "fast"),
        ({"rates": ["-1"]}, "optimizer.lr", "-1"),
        ({"seeds": ["1.5"]}, "training.seed", "1.5"),
    ],
)
def test_what_is_no_sweep_is_refused(lists, where, message, desk):
    with pytest.raises(UserError) as caught:
        combined(**lists)
    assert caught.value.problems[0].where == where
    assert message in str(caught.value)


@pytest.fixture
def python(desk, monkeypatch) -> Path:
    """A script that replaces Python in a sweep: it finishes runs, but those of 3e-3 fail, and those of 0.1 diverge."""
    path = desk.folder / "python"
    path.write_text(rf"""#!{BASH}
run=${{4%/slurm/config.yaml}}
echo "begin $*" >> trained
read -rt 0.3 _ <> <(:)
echo "end $4 threads=$OMP_NUM_THREADS" >> trained
case $4 in
  *lr3e-3*) echo 'no luck'; printf '1\nRunError: no luck\n' > "$MEA_FAILURE_FILE"; exit 1 ;;
  *lr0.1/*) echo '{{"step": 2, "reason": "the loss is nan"}}' > "$run/DIVERGED"; exit 1 ;;
esac
echo '{{"step": 4, "loss": 2.5, "validation_loss": 2.25}}' > "$run/metrics.jsonl"
echo '{{"step": 4}}' > "$run/FINISHED"
""")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


SWEEP = ("sweep", "tiny.yaml", "--learning-rates", "1e-3,3e-3,1e-2", "--out", "out", "training.steps=4")


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(python, ask):
    (python.parent / "out/mea-lr1e-3").mkdir(parents=True)
    (python.parent / "out/mea-lr1e-3/FINISHED").write_text('{"step": 4}')
    status, out, err = ask(*SWEEP)
    assert status == 1
    assert err.endswith("megatron-mea: 1 of 3 runs failed:\n  out/mea-lr3e-3: RunError: no luck\n")

    runs = [line.partition(" | ")[0] for line in out.splitlines() if line.startswith("run ")]
    assert runs == [
        "run 1 of 2: out/mea-lr3e-3 failed",
        "run 2 of 2: out/mea-lr1e-2 at step 4, loss 2.5000, validation loss 2.2500",
    ]

    trained = [f"begin -m megatron_mea train out/mea-lr{rate}/slurm/config.yaml" for rate in ("3e-3", "1e-2")]
    assert (python.parent / "trained").read_text().splitlines()[::2] == trained
    assert (python.parent / "out/mea-lr3e-3/train.log").read_text() == "no luck\n"

    failed = python.parent / "out/mea-lr3e-3/FAILED"
    assert json.loads(failed.read_text()) == {"status": 1, "reason": "RunError: no luck"}

    config = yaml.safe_load((python.parent / "out/mea-lr1e-2/slurm/config.yaml").read_text())
    assert (config["optimizer"]["lr"], config["run"]["dir"]) == (0.01, "out/mea-lr1e-2")
    # Only what failed is tried again.
    assert ask(*SWEEP)[0] == 1
    assert len((python.parent / "trained").read_text().splitlines()) == 6


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result(python, ask):
    """It is not tried again, here or as an array, unless something of it has changed."""
    sweep = ("sweep", "tiny.yaml", "training.steps=4", "--learning-rates", "1e-3,0.1", "--out", "out")
    trained = python.parent / "trained"
    for runs in (2, 0):
        trained.unlink(missing_ok=True)
        status, out, err = ask(*sweep)
        assert (status, err) == (0, "")
        assert f"of {runs}: out/mea-lr0.1 diverged | " in out or not runs
        assert len(trained.read_text().splitlines() if trained.exists() else []) == 2 * runs

    assert ask(*sweep, "--submit", "--dry-run")[:2] == (0, "all 2 runs are done\n")
    assert ask(*sweep, "optimizer.grad_clip=0.1")[0] == 0
    assert len(trained.read_text().splitlines()) == 2


@pytest.mark.slow
def test_runs_at_the_same_time_share_the_cores(python, ask, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    rates = ("--learning-rates", "1e-3,2e-3,1e-2,2e-2", "--out", "out")
    assert ask("sweep", "tiny.yaml", "training.steps=4", *rates, "--at-once", "2")[0] == 0

    lines = (python.parent / "trained").read_text().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["begin", "begin", "end"]

    running = 0
    for line in lines:
        running += 1 if line.startswith("begin") else -1
        assert running <= 2

    assert all(line.endswith("threads=4") for line in lines if line.startswith("end"))


def test_a_folder_that_is_none_is_told_before_anything_is_trained(python, ask):
    (python.parent / "out").mkdir()
    (python.parent / "out/mea-lr1e-2").write_text("a file")
    status, _, err = ask(*SWEEP)
    assert status == 2
    assert "out/mea-lr1e-2, which is a file" in err
    assert not (python.parent / "trained").exists()


@pytest.mark.slow
def test_what_the_disk_refuses_is_one_message_and_stops_the_runs_in_hand(python, ask):
    (python.parent / "afile").write_text("")
    status, _, err = ask("sweep", "tiny.yaml", "--out", "afile/out")
    assert (status, err.splitlines()[0]) == (2, "megatron-mea: error: afile/out")

    (python.parent / "out/mea-lr1e-2/train.log").mkdir(parents=True)
    python.write_text(f"""#!{BASH}
pause() {{ read -rt "$1" _ <> <(:); }}
case $4 in *lr1e-3*) pause 1; exit 0 ;; esac
trap 'echo saved > saved; exit 0' TERM
while :; do pause 0.1; done
""")
    status, _, err = ask(*SWEEP, "--at-once", "2")
    assert (status, err) == (1, "megatron-mea: out/mea-lr1e-2 cannot be written: Is a directory\n")
    assert (python.parent / "saved").exists()


@pytest.mark.slow
def test_an_array_for_what_is_left(desk, ask):
    desk.slurm()
    (desk.folder / "out/mea-lr1e-3").mkdir(parents=True)
    (desk.folder / "out/mea-lr1e-3/FINISHED").write_text('{"step": 4}')
    before = desk.files()
    status, script, err = ask(*SWEEP, "--submit", "--dry-run", "--", "--qos=x y")

    assert (status, err) == (0, "")
    assert desk.files() == before
    assert subprocess.run([BASH, "-n"], input=script, text=True).returncode == 0
    assert "{{" not in script

    for line in ("--job-name=mea-out", "--array=0-1", f"--output={desk.folder}/out/slurm/%A_%a.log", "'--qos=x y'"):
        assert f"#SBATCH {line}\n" in script

    assert f"RUNS=({desk.folder}/out/mea-lr3e-3 {desk.folder}/out/mea-lr1e-2)\n" in script

    desk.slurm(sbatch=FAILS)
    before = desk.files()
    assert ask(*SWEEP, "--submit")[0] == 1
    assert desk.files() == before

    desk.slurm()
    status, out, _ = ask(*SWEEP, "--submit")
    assert (status, out.splitlines()[0]) == (0, "Submitted batch job 42")
    assert f"  42_1  {desk.folder}/out/mea-lr1e-2\n" in out

    config = yaml.safe_load((desk.folder / "out/mea-lr3e-3/slurm/config.yaml").read_text())
    assert config["optimizer"]["lr"] == 0.003
    assert json.loads((desk.folder / "out/mea-lr1e-3/FINISHED").read_text()) == {"step": 4}
    assert not (desk.folder / "out/mea-lr1e-3/slurm").exists()


def test_a_sweep_that_is_done(desk, ask):
    for rate in ("1e-3", "3e-3", "1e-2"):
        (desk.folder / f"out/mea-lr{rate}").mkdir(parents=True)
        (desk.folder / f"out/mea-lr{rate}/FINISHED").write_text('{"step": 4}')
    assert ask(*SWEEP, "--submit")[:2] == (0, "all 3 runs are done\n")
    assert ask(*SWEEP)[0] == 0


@pytest.mark.parametrize("option", [["--nodes", "2"], ["--time", "1:00"], ["--dry-run"], ["--", "-q"]])
def test_options_of_a_job_are_refused_where_there_is_none(option, desk, ask):
    status, _, err = ask("sweep", "tiny.yaml", "--out", "out", *option)
    assert status == 2
    assert f"error: {option[0]}\n  got:      no --submit\n" in err
    assert not (desk.folder / "out").exists()


def test_no_run_at_once_is_refused():
    with pytest.raises(ValueError, match="at_once is 0"):
        run_here([], at_once=0)


@pytest.mark.slow
def test_as_many_at_once_as_asked(desk, ask):
    arguments = ["sweep", "tiny.yaml", "--learning-rates", "1e-2,1e-3,1e-4", "--out", "out", "--submit", "--dry-run"]
    assert "#SBATCH --array=0-2%2\n" in ask(*arguments, "--at-once", "2")[1]
    assert "#SBATCH --array=0-2\n" in ask(*arguments)[1]

    for wrong in (["--at-once", "0"], ["--nodes", "0"], ["--time", "soon"]):
        status, _, err = ask(*arguments, *wrong)
        assert (status, wrong[0] in err) == (2, True), err
