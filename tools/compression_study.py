"""Compression and continued training of a small model, with and without the uncompressed one as teacher:

    python tools/compression_study.py [--work runs/compression] [--seeds 1,2,3] [KEY=VALUE ...]

Prepares the text that ships with the project, trains configs/studies/compression.yaml, compresses it in several ways,
and goes on with some at the paper's schedule (10 % of warm-up, cosine to zero) for every seed. What is done is kept,
and the same command goes on where it stopped; KEY=VALUE overrides the configuration of all runs.
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

TOP = Path(__file__).parents[1]
CONFIG, TEXT = TOP / "configs/studies/compression.yaml", TOP / "launch/quickstart"
STEPS, LR = 80, 3e-4
"""Of going on: a seventh of the training, from the rate at which that ended."""
CONTINUED = ("weights-50", "outputs-50", "outputs-aligned-auto-50")


def call(*arguments: object) -> str:
    command = [sys.executable, "-m", "megatron_mea", *map(str, arguments)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, cwd=TOP, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return done.stdout


class Study:
    def __init__(self, work: Path, seeds: list[int], overrides: list[str]) -> None:
        self.work, self.seeds, self.overrides = work.absolute(), seeds, overrides
        self.data = self.work / "data"

    def prepare(self) -> None:
        tokenizer = self.work / "tokenizer"
        if not tokenizer.exists():
            call("tokenizer", "--input", TEXT / "train.jsonl.gz", "--vocab-size", 2048, "--out", tokenizer)
        for split in ("train", "validation"):
            if not (self.data / f"{split}.idx").exists():
                source, out = TEXT / f"{split}.jsonl.gz", self.data / split
                call("prepare", "--input", source, "--tokenizer", tokenizer, "--out", out)

    def train(self, name: str, *overrides: str) -> Path:
        run = self.work / name
        corpora = [f"data.{split}=[{{path: {self.data / split}}}]" for split in ("train", "validation")]
        given = [f"data.tokenizer={self.work / 'tokenizer'}", *corpora, f"run.dir={run}", *self.overrides, *overrides]
        call("train", CONFIG, *given)
        return run

    def loss(self, model: Path) -> float:
        """Cross-entropy (nats a token) of all validation data; kept beside the model."""
        kept = self.work / "losses" / f"{model.name}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            call("evaluate", model, "--data", self.data / "validation", "--out", kept)
        return json.loads(kept.read_text())["cross_entropy"]

    def compress(self, name: str, base: Path, *options: object) -> Path:
        out = self.work / name
        if not out.exists():
            print(name, call("compress", base, out, *options), flush=True)
        return out

    def go_on(self, start: Path, teacher: Path | None, seed: int) -> Path:
        """A run that begins with a compressed checkpoint, or with the base's newest one."""
        name = f"{start.name}{'-taught' if teacher else ''}-seed{seed}"
        newest = start if (start / "meta.json").exists() else max((start / "checkpoints").glob("step_*"))
        model = json.loads((newest / "meta.json").read_text())["config"]["model"]
        kept = {key: model[key] for key in ("attention_variant", "num_component_heads")}
        overrides = [
            f"model.{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
            for key, value in kept.items()
        ]
        overrides += [
            f"run.init_from={start}",
            f"training.seed={seed}",
            f"training.steps={STEPS}",
            f"optimizer.lr={LR}",
        ]
        overrides += [f"schedule.warmup_steps={STEPS // 10}", "schedule.min_lr_ratio=0", "evaluation.interval=60"]
        if teacher:
            overrides.append(f"training.distillation={{teacher: {teacher}}}")
        return self.train(name, *overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/compression"))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    study = Study(given.work, [int(seed) for seed in given.seeds.split(",")], given.overrides)
    study.prepare()
    base = study.train("base")
    print(f"base: {study.loss(base):.4f}", flush=True)
    calibration = ("--calibration", study.data / "train")
    ways = {
        "weights": (),
        "outputs": calibration,
        "aligned": ("--align",),
        "outputs-aligned": (*calibration, "--align"),
    }
    compressed, rows = {}, []
    for ratio, heads in ((0.75, 3), (0.5, 2), (0.25, 1)):
        for way, options in ways.items():
            name = f"{way}-{ratio:.0%}".rstrip("%")
            compressed[name] = study.compress(name, base, "--component-heads", heads, *options)
            if ratio > 0.25 and way != "aligned":
                auto = f"{way}-auto-{ratio:.0%}".rstrip("%")
                compressed[auto] = study.compress(auto, base, "--cache-ratio", ratio, *options)
    for name, folder in compressed.items():
        rows.append((name, study.loss(folder)))
        print(f"{name:<28} {rows[-1][1]:.4f}", flush=True)
    print("\nafter going on, mean and standard deviation over seeds", flush=True)
    for start in (base, *(compressed[name] for name in CONTINUED)):
        for teacher in (None, base):
            losses = [study.loss(study.go_on(start, teacher, seed)) for seed in study.seeds]
            spread = stdev(losses) if len(losses) > 1 else 0.0
            name = f"{start.name}{', taught' if teacher else ''}"
            print(f"{name:<40} {mean(losses):.4f} +- {spread:.4f}  {[round(loss, 4) for loss in losses]}", flush=True)


if __name__ == "__main__":
    main()
