"""Whether a change of the code moves a number: the same runs of two checkouts, compared bit for bit.

    python tools/compare_runs.py train OUT [--checkout DIR] [--only TEXT]
    python tools/compare_runs.py resume BEFORE OUT [--checkout DIR] [--only TEXT]
    python tools/compare_runs.py compare BEFORE AFTER

`train` makes every run of the matrix (20 steps, saved at 10 and 20) and exports it. `resume` takes the runs that
another checkout trained back to step 10, resumes them with this one, and evaluates the exports of the other one.
`compare` holds two such folders against one another: `metrics.jsonl` but for times, and every exported tensor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS, HALF = 20, 10
TEXT = "launch/quickstart/validation.jsonl.gz"
MODEL = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
VARIANTS: dict[str, dict] = {
    "plain": {"attention_variant": "plain"},
    "plain_norm": {"attention_variant": "plain_norm"},
    "mea": {"attention_variant": "mea"},
    "mea_virtual": {"attention_variant": "mea", "num_component_heads": 2, "qk_norm": True, "tie_word_embeddings": True},
    "mea_no_norm": {"attention_variant": "mea_no_norm", "num_component_heads": [2, 3], "attention_bias": True},
    "differential": {"attention_variant": "differential"},
    "talking_heads": {"attention_variant": "talking_heads"},
}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel.tensor_model_parallel_size": 2}),
    "pp2": (2, {"parallel.pipeline_model_parallel_size": 2}),
    "zero3": (2, {"parallel.zero_stage": 3}),
}
OTHERS: dict[str, tuple[int, dict]] = {
    "sequence": (2, {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}),
    "zero2-selective": (2, {"parallel.zero_stage": 2, "training.activation_checkpointing": "selective"}),
    "pp2-full": (2, {"parallel.pipeline_model_parallel_size": 2, "training.activation_checkpointing": "full"}),
    "wsd-constant-mask": (
        1,
        {"schedule.kind": "wsd", "schedule.decay_steps": 5, "data.document_mask": False, "optimizer.decay_hlc": True},
    ),
}
"""Of the variant `mea_virtual` in float32 alone."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    processes: int
    model: dict
    overrides: dict


def cases(only: str) -> Iterator[Case]:
    for precision in ("fp32", "bf16"):
        for variant, model in VARIANTS.items():
            for layout, (processes, overrides) in LAYOUTS.items():
                # Its heads need the scores of all.
                if (variant, layout) == ("talking_heads", "tp2"):
                    continue
                name = f"{variant}-{layout}-{precision}"
                more = {**overrides, "training.precision": precision}
                if only in name:
                    yield Case(name=name, processes=processes, model=model, overrides=more)

    for layout, (processes, overrides) in OTHERS.items():
        name = f"mea_virtual-{layout}-fp32"
        more = {**overrides, "training.precision": "fp32"}
        if only in name:
            yield Case(name=name, processes=processes, model=VARIANTS["mea_virtual"], overrides=more)


def command(checkout: Path, *arguments: str) -> str:
    """Runs a command of a checkout, whatever is installed, and returns what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(arguments, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")

    return done.stdout


def verb(checkout: Path, *arguments: str) -> str:
    return command(checkout, sys.executable, "-m", "megatron_mea", *arguments)


def prepare(checkout: Path, out: Path) -> None:
    if not (out / "tokenizer").exists():
        verb(checkout, "tokenizer", "--input", TEXT, "--vocab-size", "512", "--out", str(out / "tokenizer"))
    if not (out / "data.idx").exists():
        verb(checkout, "prepare", "--input", TEXT, "--tokenizer", str(out / "tokenizer"), "--out", str(out / "data"))


def write_config(*, case: Case, data: Path, folder: Path) -> Path:
    corpus = [{"path": str(data / "data")}]
    tree = {
        "model": MODEL | case.model,
        "data": {"tokenizer": str(data / "tokenizer"), "train": corpus, "validation": corpus, "seq_length": 64},
        "schedule": {"warmup_steps": 4},
        "training": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "replica_check_interval": 5},
        "evaluation": {"interval": 5, "batches": 2},
        "checkpoint": {"interval": HALF},
        "logging": {"interval": 1, "tensorboard": False, "sample_hashes": True},
        "run": {"dir": str(folder / "run")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(tree, indent=1))
    return path


def start(*, checkout: Path, case: Case, config: Path) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in case.overrides.items()]
    command(checkout, "bash", str(checkout / "launch/local.sh"), str(case.processes), str(config), *overrides)


def export(checkout: Path, folder: Path) -> None:
    verb(checkout, "export", str(folder / "run"), str(folder / "export"))


def train(*, out: Path, checkout: Path, only: str) -> None:
    prepare(checkout, out)
    for case in cases(only):
        folder = out / case.name
        if (folder / "export").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        config = write_config(case=case, data=out, folder=folder)
        start(checkout=checkout, case=case, config=config)
        export(checkout, folder)
        print(case.name, flush=True)


def resume(*, before: Path, out: Path, checkout: Path, only: str) -> None:
    for case in cases(only):
        folder = out / case.name
        if (folder / "export").exists():
            continue

        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before / case.name / "run", folder / "run")
        shutil.rmtree(folder / "run/checkpoints" / f"step_{STEPS:08d}")
        (folder / "run/FINISHED").unlink()
        config = write_config(case=case, data=before, folder=folder)
        start(checkout=checkout, case=case, config=config)
        export(checkout, folder)

        # Weights and configuration of the old export, which `evaluate` reads with this checkout's own classes.
        old, new = (
            json.loads(verb(checkout, "evaluate", str(export), "--data", str(before / "data")))["cross_entropy"]
            for export in (before / case.name / "export", folder / "export")
        )
        print(f"{case.name}: the export of before {old!r}, of the resumed run {new!r}", flush=True)
        if old != new:
            sys.exit(f"{case.name}: exports differ")


def rows(run: Path) -> list[dict]:
    """The metrics without what no two runs share: times."""
    file = run / "metrics.jsonl"
    parsed = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in row.items() if "second" not in key} for row in parsed]


def digests(export: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in export.glob("*.safetensors")}


def compare(before: Path, after: Path) -> None:
    names = sorted(path.name for folder in (before, after) for path in folder.glob("*/") if (path / "run").exists())
    names = list(dict.fromkeys(names))
    if not names:
        sys.exit(f"no runs in {before} and {after}")

    bad = []
    for name in names:
        same_rows = rows(before / name / "run") == rows(after / name / "run") != []
        same_tensors = digests(before / name / "export") == digests(after / name / "export") != {}
        if not (same_rows and same_tensors):
            bad.append(name)
            print(
                f"{name}: metrics {'equal' if same_rows else 'DIFFER'}, tensors {'equal' if same_tensors else 'DIFFER'}"
            )

    print(f"{len(names) - len(bad)} of {len(names)} runs are equal to the bit")
    sys.exit(bool(bad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, places in (("train", ["out"]), ("resume", ["before", "out"]), ("compare", ["before", "after"])):
        sub = actions.add_parser(name)
        for place in places:
            sub.add_argument(place, type=Path)
        if name != "compare":
            sub.add_argument("--checkout", type=Path, default=ROOT, help="whose code runs (default: this one)")
            sub.add_argument("--only", default="", help="runs whose names hold this text")

    arguments = parser.parse_args()
    if arguments.action == "compare":
        compare(arguments.before, arguments.after)
    elif arguments.action == "train":
        train(out=arguments.out.resolve(), checkout=arguments.checkout.resolve(), only=arguments.only)
    else:
        resume(
            before=arguments.before.resolve(),
            out=arguments.out.resolve(),
            checkout=arguments.checkout.resolve(),
            only=arguments.only,
        )


if __name__ == "__main__":
    main()
