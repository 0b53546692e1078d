"""From a checkpoint to a Hugging Face folder that transformers loads without this package."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_mea.errors import RunError, UserError
from megatron_mea.huggingface import configuration_mea, modeling_mea
from megatron_mea.huggingface.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.source import CheckpointSource, causal_lm, is_hugging_face, open_checkpoint
from megatron_mea.model.decoder import Decoder
from megatron_mea.outputs import output_place
from megatron_mea.parallel.parameter import named_specs

_CLASSES = {
    "AutoConfig": "configuration_mea.MEAConfig",
    "AutoModel": "modeling_mea.MEAModel",
    "AutoModelForCausalLM": "modeling_mea.MEAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mea.MEAForSequenceClassification",
}
_TOLERANCE = 1e-4
"""Of the largest logit: float32 rounding in two orders of summation; what is wrong is wrong by far more."""


class ExportError(RunError):
    """The exported model does not compute what the trainer computes; nothing was written."""


def export(model: str | Path, out: str | Path, dtype: str = "fp32") -> str:
    """Writes weights, configuration, tokenizer, model card and modeling files, then compares logits.

    Args:
        model: a checkpoint or run folder.
        out: must not exist or be empty; it appears when everything, the comparison included, is done.
        dtype: `fp32` (the master weights) or `bf16`.

    Returns:
        What was written and how far the logits are from the trainer's, for the user.

    Raises:
        UserError: nothing to export, or `out` is not free.
        ExportError: the logits differ.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "a folder that is not empty" if out.is_dir() else "a file"
        raise UserError(str(out), found, "a folder that is empty or does not exist")
    if is_hugging_face(model):
        raise UserError(str(model), "a Hugging Face folder already", "a checkpoint folder or a run folder")
    source = open_checkpoint(model)
    with output_place(out, folder=True), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "export"
        stored = torch.bfloat16 if dtype == "bf16" else torch.float32
        _write(source, folder, stored)
        tokens, difference, scale = _compare(source, folder, stored)
        if not difference <= _TOLERANCE * scale:
            raise ExportError(f"logits differ from the trainer's by {difference:.3g} (they reach {scale:.3g})")
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    kind = "real" if source.tokenizer.is_dir() else "random"
    return (
        f"wrote {out}: step {source.meta.step}, {dtype}\n"
        f"logits of {tokens} {kind} tokens differ from the trainer's by at most {difference:.2g} "
        f"(they reach {scale:.3g})"
    )


def _write(source: CheckpointSource, folder: Path, dtype: torch.dtype) -> None:
    model = causal_lm(source, dtype)
    model.config.auto_map = dict(_CLASSES)
    model.save_pretrained(folder, max_shard_size="5GB")
    for module in (configuration_mea, modeling_mea):
        shutil.copy(module.__file__, folder)
    copy_tokenizer(source.tokenizer, folder)
    (folder / "README.md").write_text(_card(source))
    # safetensors writes files that only their owner may read.
    for file in folder.iterdir():
        file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _compare(source: CheckpointSource, folder: Path, stored: torch.dtype) -> tuple[int, float, float]:
    """(tokens, largest difference of a logit, largest logit) of the folder against the training model.

    Both compute in float32 with the weights as they are `stored`, so that only what the export may get wrong is seen.
    """
    exported = MEAForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    trained = Decoder(source.config.model)
    weights = source.weights()
    for name, parameter in named_specs(trained).items():
        parameter.data = weights[name].to(stored).float()
    tokens = _real_tokens(source)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        expected = trained.run(tokens, positions)
        found = exported(tokens, use_cache=False).logits
    return tokens.numel(), (found - expected).abs().max().item(), expected.abs().max().item()


def _real_tokens(source: CheckpointSource) -> torch.Tensor:
    """(2, up to 512) tokens of the run's own data, or of a sentence where the data is not at hand.

    Without a tokenizer, which an imported checkpoint may lack, ids at random.
    """
    data, vocab = source.config.data, source.config.model.vocab_size
    length = min(data.seq_length, 512)
    for corpora in (data.validation, data.train):
        if not corpora:
            continue
        try:
            batch = Corpora(corpora, length, vocab, None, "data").batch(torch.arange(2).numpy())
        except (UserError, IndexError):
            continue
        return torch.from_numpy(batch.input_ids.copy())
    if not source.tokenizer.is_dir():
        return torch.randint(vocab, (2, min(length, 128)), generator=torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(source.tokenizer, str(source.tokenizer))
    ids = tokenizer("In the beginning God created the heaven and the earth. " * 8, add_special_tokens=False)
    return torch.tensor([ids["input_ids"][:length]] * 2)


def _card(source: CheckpointSource) -> str:
    model, meta = source.config.model, source.meta
    trained = meta.origin or f"{meta.step:,} steps, {meta.tokens:,} tokens"
    loss = "not measured" if meta.validation_loss is None else f"{meta.validation_loss:.4f} nats a token"
    heads = sorted(set(model.component_heads))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A language model with Multi-head Explicit Attention

| | |
| --- | --- |
| variant | `{model.attention_variant}` (arXiv 2601.19611) |
| heads | {model.num_attention_heads} query, {model.num_key_value_heads} composite and \
{", ".join(map(str, heads))} component key/value heads of {model.head_dim} |
| trained | {trained} |
| validation loss | {loss} |
| made with | {", ".join(f"{name} {value}" for name, value in meta.versions.items())} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this/folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)
inputs = tokenizer("In the beginning", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
"""
