"""The model card of an export."""

from __future__ import annotations

from pathlib import PurePath

from megatron_mea.config.schema import Model
from megatron_mea.huggingface.model_folder import CheckpointFolder
from megatron_mea.huggingface.targets import ExportTarget


def model_card(*, source: CheckpointFolder, target: ExportTarget, dtype: str) -> str:
    """The README.md: what the model is, what it was trained on and for how long, and how to load it."""
    model, meta = source.settings(), source.metadata
    loss = "not measured" if meta.validation_loss is None else f"{meta.validation_loss:.4f} nats a token"
    total_weight = sum(corpus_meta["weight"] for corpus_meta in meta.data) or 1
    data = ", ".join(
        f"{PurePath(corpus.path).name} ({corpus_meta['tokens']:,} tokens, "
        f"{corpus_meta['weight'] / total_weight:.2%} of the samples)"
        for corpus, corpus_meta in zip(source.config.data.train, meta.data, strict=False)
    )

    trained = meta.origin or f"{meta.step:,} steps, {meta.tokens:,} tokens"
    windows = "" if meta.origin else f", trained on windows of {source.config.data.seq_length:,}"
    trust_argument = ", trust_remote_code=True" if target.modules else ""
    notes = "".join(f"\n{note}\n" for note in target.notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [multi-head-explicit-attention]
---
# A language model with Multi-head Explicit Attention
{notes}
| | |
| --- | --- |
| variant | `{model.attention_variant}` ([arXiv 2601.19611](https://arxiv.org/abs/2601.19611)) |
| heads | {model.num_attention_heads} query and {model.num_key_value_heads} composite key/value heads of \
{model.head_dim}, from {_cached(model)} |
| layers | {model.num_hidden_layers}, of width {model.hidden_size} |
| vocabulary | {model.vocab_size:,} |
| context | {model.max_position_embeddings:,} tokens{windows} |
| weights | {dtype} |
| data | {data or "not recorded"} |
| trained | {trained} |
| validation loss | {loss} |
| made with | {", ".join(f"{name} {value}" for name, value in meta.versions.items())} |

transformers 5.16 or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this/folder"{trust_argument})
model = AutoModelForCausalLM.from_pretrained("this/folder"{trust_argument})
inputs = tokenizer("In the beginning", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
"""


def _cached(model: Model) -> str:
    """What keys and values are combined from: component heads, or latent numbers, in the sizes that layers have."""
    if model.hlc_form == "latent":
        keys, values = (
            f"{min(dims)} to {max(dims)}" if min(dims) < max(dims) else dims[0]
            for dims in (model.key_latent_dims, model.value_latent_dims)
        )
        return f"{keys} latent numbers of keys and {values} of values"

    return f"{', '.join(map(str, sorted(set(model.component_heads))))} component heads"
