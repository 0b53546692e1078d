"""Small runs of every attention variant, written by older versions of the program, which must resume for ever.

    python tests/support/old_runs.py [VARIANT ...]     # writes the archives that are not there yet

An archive in tests/checkpoint/old_runs/ holds a folder with `run.yaml`, its tokenizer and corpus, the run `run` with
its checkpoint of step 2, and `expected.jsonl`: the metrics of the same run when it went on to step 4 at the time. An
archive is never written anew: it stands for the files that users have.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHIVES = ROOT / "tests/checkpoint/old_runs"
OPTIONS = {
    "mea": {"num_component_heads": [1, 2], "qk_norm": True},
    "mea_no_norm": {"num_component_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
}
"""Keys of the section `model` beside the variant."""


def archive(variant: str) -> Path:
    """The archive of a variant's run."""
    return ARCHIVES / f"{variant}.tar.xz"


def unpack(variant: str, folder: Path) -> Path:
    """Unpacks the archive of a variant into `folder`; returns the configuration's path."""
    with tarfile.open(archive(variant)) as stream:
        stream.extractall(folder, filter="data")
    return folder / "run.yaml"


def write_archive(variant: str) -> None:
    """Trains a run of four steps, saved at 2 and 4, and packs it as if it had been interrupted after step 2."""
    from support.runs import environment
    from support.tiny import Tiny

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "archive"
        folder.mkdir()
        tiny = Tiny(Path(scratch))
        shutil.copytree(tiny.tokenizer, folder / "tokenizer")
        for suffix in (".bin", ".idx"):
            shutil.copy(tiny.validation.with_suffix(suffix), folder / f"corpus{suffix}")

        model = tiny.tree()["model"]
        del model["num_component_heads"]
        model |= {"hidden_size": 8, "head_dim": 4, "intermediate_size": 8}
        model |= {"attention_variant": variant} | OPTIONS.get(variant, {})
        settings = {"model": model, "data.tokenizer": "tokenizer", "data.train": [{"path": "corpus"}]}
        tiny.write_config(folder / "run.yaml", **settings, **{"data.validation": []})
        command = [sys.executable, "-m", "megatron_mea", "train", "run.yaml"]
        subprocess.run(command, cwd=folder, env=environment(), check=True)

        run = folder / "run"
        shutil.move(run / "metrics.jsonl", folder / "expected.jsonl")
        shutil.rmtree(run / "checkpoints/step_00000004")
        for name in ("FINISHED", "heartbeat.json", ".lease"):
            (run / name).unlink()

        with (folder / "expected.jsonl").open() as rows, (run / "metrics.jsonl").open("w") as earlier:
            earlier.writelines(row for row in rows if json.loads(row)["step"] <= 2)

        ARCHIVES.mkdir(exist_ok=True)
        with tarfile.open(archive(variant), "x:xz", preset=9) as stream:
            for path in sorted(folder.iterdir()):
                stream.add(path, arcname=path.name)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from megatron_mea.config.variants import VARIANTS

    for name in sys.argv[1:] or VARIANTS:
        if not archive(name).exists():
            write_archive(name)
            print(archive(name))
