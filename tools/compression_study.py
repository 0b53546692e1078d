"""Compression and continued training of a small model, with and without the uncompressed one as teacher:

    python tools/compression_study.py [--work runs/compression] [--seeds 1,2,3] [KEY=VALUE ...]

Prepares the text that ships with the project, trains configs/studies/compression.yaml, compresses it in several ways,
and trains some further at the paper's schedule (10 % of warm-up, cosine to zero) for every seed. The same command
resumes where it stopped; KEY=VALUE overrides the configuration of all runs.
docs/compression.md has results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import yaml

ROOT = Path(__file__).parents[1]
CONFIG, TEXT = ROOT / "configs/studies/compression.yaml", ROOT / "launch/quickstart"
STEPS, LR = 80, 3e-4
"""Of continued training: a seventh of the steps, from the rate at which the training ended."""
CONTINUED = ("weights-50", "outputs-50", "outputs-aligned-auto-50")
"""The compressed models that are trained further."""


def run_verb(*arguments: object) -> str:
    """Calls megatron-mea and returns what it prints; ends the study where it fails."""
    command = [sys.executable, "-m", "megatron_mea", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, text=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return process.stdout


class Study:
    """Runs, compressed checkpoints and losses in one folder; what is there already is not made again.

    Args:
        overrides: KEY=VALUE, for all runs.
    """

    def __init__(self, *, work: Path, seeds: list[int], overrides: list[str]) -> None:
        self.work, self.seeds, self.overrides = work.absolute(), seeds, overrides
        self.data = self.work / "data"

    def prepare(self) -> None:
        """Trains the tokenizer and prepares training and validation data."""
        tokenizer = self.work / "tokenizer"
        if not tokenizer.exists():
            run_verb("tokenizer", "--input", TEXT / "train.jsonl.gz", "--vocab-size", 2048, "--out", tokenizer)
        for split in ("train", "validation"):
            if not (self.data / f"{split}.idx").exists():
                source, out = TEXT / f"{split}.jsonl.gz", self.data / split
                run_verb("prepare", "--input", source, "--tokenizer", tokenizer, "--out", out)

    def train(self, name: str, *overrides: str) -> Path:
        """Trains and returns the run folder, which is named so."""
        run = self.work / name
        corpora = [f"data.{split}=[{{path: {self.data / split}}}]" for split in ("train", "validation")]
        tokenizer = f"data.tokenizer={self.work / 'tokenizer'}"
        run_verb("train", CONFIG, tokenizer, *corpora, f"run.dir={run}", *self.overrides, *overrides)
        return run

    def loss(self, model: Path) -> float:
        """Cross-entropy (nats a token) of all validation data; cached in WORK/losses."""
        cached = self.work / "losses" / f"{model.name}.json"
        if not cached.exists():
            cached.parent.mkdir(exist_ok=True)
            run_verb("evaluate", model, "--data", self.data / "validation", "--out", cached)
        return json.loads(cached.read_text())["cross_entropy"]

    def compress(self, name: str, base: Path, *options: object) -> Path:
        """Compresses a model into the folder of this name, and returns that."""
        out = self.work / name
        if not out.exists():
            print(name, run_verb("compress", base, out, *options), flush=True)
        return out

    def continue_training(self, *, start: Path, teacher: Path | None, seed: int) -> Path:
        """Trains further from a compressed checkpoint, or from the newest one of a run folder; returns the new run."""
        name = f"{start.name}{'-taught' if teacher else ''}-seed{seed}"
        newest = start if (start / "meta.json").exists() else max((start / "checkpoints").glob("step_*"))
        model = json.loads((newest / "meta.json").read_text())["config"]["model"]
        overrides = [
            f"model.{key}={yaml.safe_dump(model[key], default_flow_style=True).splitlines()[0]}"
            for key in ("attention_variant", "num_component_heads")
        ]
        overrides += [f"run.init_from={start}", f"training.seed={seed}"]
        overrides += [f"training.steps={STEPS}", f"optimizer.lr={LR}"]
        overrides += [f"schedule.warmup_steps={STEPS // 10}", "schedule.min_lr_ratio=0", "evaluation.interval=60"]
        if teacher:
            overrides.append(f"training.distillation={{teacher: {teacher}}}")

        return self.train(name, *overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/compression"))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    study = Study(work=arguments.work, seeds=seeds, overrides=arguments.overrides)
    study.prepare()
    base = study.train("base")
    print(f"base: {study.loss(base):.4f}", flush=True)
    calibration = ("--calibration", study.data / "train")
    methods = {
        "weights": (),
        "outputs": calibration,
        "aligned": ("--align",),
        "outputs-aligned": (*calibration, "--align"),
    }
    compressed, rows = {}, []
    for ratio, heads in ((0.75, 3), (0.5, 2), (0.25, 1)):
        for method, options in methods.items():
            name = f"{method}-{ratio:.0%}".rstrip("%")
            compressed[name] = study.compress(name, base, "--component-heads", heads, *options)
            if ratio > 0.25 and method != "aligned":
                auto = f"{method}-auto-{ratio:.0%}".rstrip("%")
                compressed[auto] = study.compress(auto, base, "--cache-ratio", ratio, *options)

    for name, folder in compressed.items():
        rows.append((name, study.loss(folder)))
        print(f"{name:<28} {rows[-1][1]:.4f}", flush=True)

    print("\nafter going on, mean and standard deviation over seeds", flush=True)
    for start in (base, *(compressed[name] for name in CONTINUED)):
        for teacher in (None, base):
            losses = [
                study.loss(study.continue_training(start=start, teacher=teacher, seed=seed)) for seed in study.seeds
            ]
            spread = stdev(losses) if len(losses) > 1 else 0.0
            name = f"{start.name}{', taught' if teacher else ''}"
            print(f"{name:<40} {mean(losses):.4f} +- {spread:.4f}  {[round(loss, 4) for loss in losses]}", flush=True)


if __name__ == "__main__":
    main()
