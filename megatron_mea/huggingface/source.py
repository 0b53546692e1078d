"""Opens the MODEL of a command: a checkpoint folder, a run folder or a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from megatron_mea.checkpoint.folder import TOKENIZER, CheckpointMetadata, checkpoint_folder, find_corruption
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.errors import Problem, UserError
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.exported.modeling_mea_vllm import MEAServedForCausalLM
from megatron_mea.huggingface.config_keys import read_config_json
from megatron_mea.huggingface.hf_config import read_generation_config, to_hf_config, transformers_config
from megatron_mea.huggingface.locate import is_hf_folder
from megatron_mea.huggingface.safetensors_reader import MAX_NAMED, check_tensors, scan_model
from megatron_mea.printing import note


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A verified checkpoint: its folder, its meta.json, and its configuration."""

    folder: Path
    meta: CheckpointMetadata
    config: Config

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder, which an imported checkpoint may lack."""
        return self.folder / TOKENIZER

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 master weights by exported name."""
        return read_tensors(self.folder, weight_shapes(self.folder))


def open_checkpoint(path: str | Path) -> CheckpointSource:
    """Opens a checkpoint, or the newest one of a run folder, and verifies its checksums.

    Raises:
        UserError: nothing of the kind stands there, or it is damaged.
    """
    folder = checkpoint_folder(path)
    problem = find_corruption(folder)
    if problem is not None:
        raise UserError(
            where=str(folder), got=problem, expected="a whole checkpoint", hint="use an older one of the run"
        )

    meta = CheckpointMetadata.read(folder)
    return CheckpointSource(folder=folder, meta=meta, config=parse_config(meta.config, needs_data=False))


def context_length(path: str | Path) -> int:
    """`max_position_embeddings` of any MODEL, whose weights are not read.

    Raises:
        UserError: MODEL is none of the three kinds, or its settings cannot be read.
    """
    if not is_hf_folder(path):
        settings = CheckpointMetadata.read(checkpoint_folder(path)).config
        return parse_config(settings, needs_data=False).model.max_position_embeddings

    folder, where = Path(path), str(path)
    config = transformers_config(read_config_json(folder, where), path=folder, where=where)
    return config.max_position_embeddings


def load_model(path: str | Path) -> tuple[PreTrainedModel, Path, Config | None]:
    """Loads any MODEL as a transformers model in float32, with its tokenizer folder and a checkpoint's configuration.

    No code from a folder is run, and weights are read from safetensors alone.

    Raises:
        UserError: MODEL is none of the three kinds, or cannot be loaded.
    """
    if not is_hf_folder(path):
        source = open_checkpoint(path)
        return build_causal_lm(source), source.tokenizer, source.config

    folder, where = Path(path), str(path)
    config_json = read_config_json(folder, where)
    generation, warnings = read_generation_config(folder, where)
    config = transformers_config(config_json, path=folder, where=where)
    model_class = {"mea": MEAForCausalLM, "mea_vllm": MEAServedForCausalLM}.get(config_json.model_type)
    files = _check_stored_shapes(folder=folder, where=where, config=config, model_class=model_class)
    for warning in (*config_json.warnings, *warnings):
        note(f"warning: {warning}")

    logging.disable_progress_bar()
    try:
        model = (model_class or AutoModelForCausalLM).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        model.set_attn_implementation("sdpa")
    except Exception as error:
        raise _not_loadable(where, error) from None

    # Without the copy that `isfinite` makes.
    parameters = model.named_parameters()
    broken = [name for name, parameter in parameters if not torch.stack(parameter.aminmax()).isfinite().all()]
    if broken:
        raise UserError.from_problems(
            Problem(
                where=where,
                got=f"{name} in {files[name]}, with numbers that are not finite in float32",
                expected="finite numbers",
            )
            for name in broken[:MAX_NAMED]
        )

    model.generation_config = generation or model.generation_config
    return model.eval(), folder, None


def _not_loadable(where: str, error: Exception) -> UserError:
    """transformers checks types and values, each with an exception of its own."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(where=where, got=f"not loadable ({reason})", expected="a Hugging Face causal language model")


def _check_stored_shapes(
    *, folder: Path, where: str, config: PreTrainedConfig, model_class: type[PreTrainedModel] | None
) -> dict[str, Path]:
    """Compares the tensors of a folder with its config.json, before memory is taken by the sizes that stand there.

    transformers would initialize missing tensors at random.

    Returns:
        The file of each parameter.

    Raises:
        UserError: they differ, or the files cannot be read.
    """
    tensors = scan_model(path=folder, where=where, num_layers=config.num_hidden_layers, tied=config.tie_word_embeddings)
    # A model that was saved without its head has names without the prefix.
    tensors = {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor for name, tensor in tensors.items()
    }

    try:
        with torch.device("meta"):
            model = model_class(config) if model_class else AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _not_loadable(where, error) from None

    if problems := check_tensors(
        path=folder,
        where=where,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        expected={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        expected_by="config.json",
    ):
        raise UserError.from_problems(problems)

    return {name: tensor.file for name, tensor in tensors.items()}


def special_token_ids(tokenizer: Path, vocab_size: int) -> dict[str, int | None]:
    """The special token ids of a tokenizer, by the names of a configuration; empty where there is no folder.

    An imported tokenizer may have more ids than the model, such as a padding token that was added afterwards.
    """
    if not tokenizer.is_dir():
        return {}

    loaded = load_tokenizer(tokenizer, str(tokenizer))
    ids = {key: getattr(loaded, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {key: token_id if token_id is not None and token_id < vocab_size else None for key, token_id in ids.items()}

    # Without a padding token, batches are padded with the end-of-document token, as is usual.
    return ids | {"pad_token_id": ids["eos_token_id"] if ids["pad_token_id"] is None else ids["pad_token_id"]}


def build_causal_lm(source: CheckpointSource, dtype: torch.dtype = torch.float32) -> MEAForCausalLM:
    """The exported model of a checkpoint, in memory."""
    with torch.device("meta"):
        ids = special_token_ids(source.tokenizer, source.config.model.vocab_size)
        model = MEAForCausalLM(to_hf_config(model=source.config.model, dtype=dtype, **ids))

    weights = {name: tensor.to(dtype) for name, tensor in source.weights().items()}
    if source.config.model.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    generation, warnings = read_generation_config(source.folder, str(source.folder))
    for warning in warnings:
        note(f"warning: {warning}")

    model.generation_config = generation or model.generation_config
    return model.eval()
