"""The one door to a MODEL: a checkpoint folder, a run folder (its newest checkpoint) or a Hugging Face folder.

A folder may be a stranger's, and what it may hold is decided behind this door alone: a config.json by the keys that are
understood, safetensors, no code, adapter or pickle, tensors of the shapes that its settings say before memory is taken,
finite numbers, a checkpoint's checksums and index. `locate` and `settings` of a checkpoint import no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mea.checkpoint.folder import META, TOKENIZER, CheckpointMetadata, complete_checkpoints, find_corruption
from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.data.tokenizer import check_tokenizer_folder, has_tokenizer_files, load_tokenizer
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.config_keys import CONFIG_JSON, MAX_NAMED, STOCK_MODEL_TYPES, read_config_json
from megatron_mea.printing import note

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from megatron_mea.checkpoint.tensors import Fragment
    from megatron_mea.huggingface.safetensors_reader import StoredTensor

INIT_FROM, HF_DIR = "run.init_from", "HF_DIR"
"""A key of the configuration, and the argument of `import`, for messages."""


class ModelFolder(ABC):
    """A MODEL that is there, a `CheckpointFolder` or an `HFFolder`.

    Args:
        path: the folder as the user named it.
        key: the configuration key or argument that named it, for messages; None: they name the folder.

    Attributes:
        folder: where the files are: a checkpoint, or the Hugging Face folder.
        description: the file with the settings.
        config: the whole configuration of a checkpoint.
        warnings: what of the settings is left out and may matter to a training.

    Raises:
        UserError: there is no such folder, or its description is not understood.
    """

    folder: Path
    description: str
    _tokenizer_folder: Path
    config: Config | None = None
    warnings: tuple[str, ...] = ()

    def __init__(self, path: str | Path, key: str | None = None) -> None:
        self.path, self.key = Path(path), key
        self.where = key or str(path)

    @staticmethod
    def locate(path: str | Path, key: str | None = None) -> ModelFolder:
        """Finds a MODEL of any kind, and reads the description of a Hugging Face folder.

        Raises:
            UserError: it is none of the three kinds, or its config.json is not understood.
        """
        if Path(path, CONFIG_JSON).is_file():
            return HFFolder(path, key)

        try:
            return CheckpointFolder(path, key)
        except UserError as error:
            problem = error.problems[0]
            expected = f"{problem.expected}, or a Hugging Face folder"
            raise UserError.from_problems([replace(problem, expected=expected)]) from None

    @abstractmethod
    def settings(self) -> Model:
        """The `model` section; verifies nothing.

        Raises:
            UserError: it cannot be read, or describes what our model does not compute.
        """

    @abstractmethod
    def tensors(self, *, rank: int = 0, world_size: int = 1) -> StoredTensors:
        """Opens the tensors, of which names, shapes and dtypes are read; no collective.

        Args:
            rank, world_size: of the callers, each of which verifies the checksums of its share of a checkpoint's files,
                and of those that all of them read here.

        Raises:
            UserError: they are damaged, unreadable, or not those of `settings`.
        """

    @property
    def context_length(self) -> int:
        """`max_position_embeddings`, also of a model that `settings` refuses."""
        return self.settings().max_position_embeddings

    def as_transformers(self) -> PreTrainedModel:
        """Loads the model in float32 on the CPU, with the generation settings of the folder; prints warnings.

        Raises:
            UserError: it is damaged, cannot be loaded, or has numbers that are not finite.
        """
        generation, warnings = self.generation_config()
        model, entries = self._load()
        parameters = ((name, (0,) * values.dim(), values) for name, values in model.named_parameters())
        self.refuse_not_finite(_nonfinite_names(entries, parameters), entries)
        for warning in warnings:
            note(f"warning: {warning}")

        model.generation_config = generation or model.generation_config
        return model.eval()

    def generation_config(self) -> tuple[GenerationConfig | None, list[str]]:
        """The generation settings beside the model, as `hf_config.read_generation_config` reads them."""
        from megatron_mea.huggingface.hf_config import read_generation_config

        return read_generation_config(self.folder, self.where)

    @property
    @abstractmethod
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer; None where there is none, as beside imported weights.

        Raises:
            UserError: a checkpoint has such a folder, without a tokenizer's files.
        """

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: there is none, or it does not load.
        """
        return load_tokenizer(self._tokenizer_folder, self.key or str(self._tokenizer_folder))

    def refusal(self, folder: Path, got: str, *, expected: str, hint: str = "") -> UserError:
        """The error of a folder, named by the key, or by itself where there is none."""
        where, got = (str(folder), got) if self.key is None else (self.key, f"{folder}: {got}")
        return UserError(where=where, got=got, expected=expected, hint=hint)

    def refuse_not_finite(self, names: Sequence[str], entries: Mapping[str, StoredTensor]) -> None:
        """Raises UserError where there are names: of tensors, or experts of one, with numbers that are not finite."""
        if names:
            files = {matrix.name: expert.file for entry in entries.values() for matrix, expert in entry.experts}
            files |= {name: entry.file for name, entry in entries.items()}
            raise UserError.from_problems(
                Problem(
                    where=self.where,
                    got=f"{name} in {files[name]}, with numbers that are not finite in float32",
                    expected="finite numbers",
                    hint="take weights from before they diverged",
                )
                for name in names[:MAX_NAMED]
            )

    @abstractmethod
    def _load(self) -> tuple[PreTrainedModel, Mapping[str, StoredTensor]]:
        """The model for `as_transformers`, and what is stored by the names of its parameters."""

    def _stored(self, entries: Mapping[str, StoredTensor], fill: Callable[[Iterable[Fragment]], None]) -> StoredTensors:
        """The opened tensors, compared with the settings."""
        from megatron_mea.huggingface.safetensors_reader import check_tensors
        from megatron_mea.model.decoder import parameter_shapes

        stored = StoredTensors(source=self, entries=entries, fill=fill)
        if problems := check_tensors(
            path=self.folder,
            where=self.where,
            shapes=stored.shapes,
            expected=parameter_shapes(self.settings()),
            expected_by=str(self.folder / self.description),
        ):
            raise UserError.from_problems(problems)

        return stored


class CheckpointFolder(ModelFolder):
    """A checkpoint folder, or the newest checkpoint of a run folder."""

    description = META

    def __init__(self, path: str | Path, key: str | None = None) -> None:
        super().__init__(path, key)
        newest = [(0, self.path)] if (self.path / META).is_file() else complete_checkpoints(self.path)[-1:]
        if not newest:
            expected = "a checkpoint folder, or a run folder with checkpoints"
            raise self.refusal(self.path, _missing(self.path, "checkpoint"), expected=expected)

        self.folder = newest[0][1]
        self._tokenizer_folder = self.folder / TOKENIZER

    @cached_property
    def metadata(self) -> CheckpointMetadata:
        """The contents of meta.json."""
        return CheckpointMetadata.read(self.folder)

    @cached_property
    def config(self) -> Config:
        """The configuration of the run that saved it."""
        return parse_config(self.metadata.config, needs_data=False)

    def settings(self) -> Model:
        return self.config.model

    def verify(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Verifies the checksums of this rank's share of the files.

        Raises:
            UserError: the checkpoint is damaged.
        """
        if problem := find_corruption(folder=self.folder, rank=rank, world_size=world_size):
            raise self.refusal(self.folder, problem, expected="a whole checkpoint", hint="use an older one of the run")

    def tensors(self, *, rank: int = 0, world_size: int = 1) -> StoredTensors:
        self.verify(rank=rank, world_size=world_size)

        from megatron_mea.checkpoint.tensors import read_fragments, weight_shapes
        from megatron_mea.huggingface.safetensors_reader import StoredTensor

        shapes = weight_shapes(self.folder)
        entries = {name: StoredTensor(file=self.folder, shape=shape, dtype="F32") for name, shape in shapes.items()}
        return self._stored(entries, partial(read_fragments, self.folder))

    @property
    def tokenizer(self) -> Path | None:
        folder = self._tokenizer_folder
        if not folder.exists():
            return None

        check_tokenizer_folder(folder, self.key or str(folder))
        return folder

    def special_token_ids(self) -> dict[str, int | None]:
        """The special token ids of the tokenizer, by the names of a configuration; empty where there is none.

        An imported tokenizer may have more ids than the model, such as a padding token that was added afterwards.
        """
        if self.tokenizer is None:
            return {}

        tokenizer, ids = self.load_tokenizer(), {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token_id = getattr(tokenizer, key)
            ids[key] = token_id if token_id is not None and token_id < self.settings().vocab_size else None

        # Without a padding token, batches are padded with the end-of-document token, as is usual.
        return ids | {"pad_token_id": ids["eos_token_id"] if ids["pad_token_id"] is None else ids["pad_token_id"]}

    def _load(self) -> tuple[PreTrainedModel, Mapping[str, StoredTensor]]:
        from megatron_mea.checkpoint.tensors import read_tensors
        from megatron_mea.huggingface.transformers_model import build_causal_lm

        stored = self.tensors()
        weights = read_tensors(self.folder, stored.shapes)
        model = build_causal_lm(model=self.settings(), weights=weights, **self.special_token_ids())
        return model, stored.entries


class HFFolder(ModelFolder):
    """A Hugging Face folder; its config.json was read, and is understood."""

    description = CONFIG_JSON

    def __init__(self, path: str | Path, key: str | None = None) -> None:
        super().__init__(path, key)
        self.folder = self._tokenizer_folder = self.path
        if not (self.path / CONFIG_JSON).is_file():
            got = "a checkpoint already" if (self.path / META).is_file() else _missing(self.path, CONFIG_JSON)
            hint = "" if self.path.exists() else "`hf download NAME --local-dir HF_DIR` fetches a model of the hub"
            expected = "a Hugging Face folder: config.json, safetensors, tokenizer"
            raise UserError(where=str(self.path), got=got, expected=expected, hint=hint)

        self.config_json = read_config_json(self.path, self.where)

    @cached_property
    def _section(self) -> tuple[Model, tuple[str, ...]]:
        from megatron_mea.huggingface.hf_config import model_section

        return model_section(self.config_json)

    def settings(self) -> Model:
        return self._section[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._section[1]

    @property
    def context_length(self) -> int:
        from megatron_mea.huggingface.hf_config import transformers_config

        return transformers_config(self.config_json).max_position_embeddings

    def tensors(self, *, rank: int = 0, world_size: int = 1) -> StoredTensors:
        from megatron_mea.huggingface.safetensors_reader import fill_fragments, scan_model

        model = self.settings()
        entries = scan_model(
            path=self.folder,
            where=self.where,
            num_layers=model.num_hidden_layers,
            num_experts=model.num_experts,
            tied=model.tie_word_embeddings,
            constants=self._constants(),
        )
        return self._stored(entries, partial(fill_fragments, entries))

    @property
    def tokenizer(self) -> Path | None:
        return self._tokenizer_folder if has_tokenizer_files(self._tokenizer_folder) else None

    def _load(self) -> tuple[PreTrainedModel, Mapping[str, StoredTensor]]:
        from megatron_mea.huggingface.transformers_model import load_pretrained

        for warning in self.config_json.warnings:
            note(f"warning: {warning}")

        return load_pretrained(self.config_json, constants=self._constants())

    def _constants(self) -> dict[str, torch.Tensor]:
        """`constant_tensors`; a stock model has none, and need not be what `settings` takes."""
        from megatron_mea.huggingface.hf_config import constant_tensors

        return {} if self.config_json.model_type in STOCK_MODEL_TYPES else constant_tensors(self.settings())


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """The tensors of a MODEL, exactly those that its settings describe.

    Args:
        source: the MODEL.
        entries: file (of a checkpoint, the folder), shape and dtype by exported name.
        fill: fills fragments of the tensors; no collective.
    """

    source: ModelFolder
    entries: Mapping[str, StoredTensor]
    fill: Callable[[Iterable[Fragment]], None]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by exported name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, fragments: Iterable[Fragment]) -> list[str]:
        """Fills fragments of the tensors; no collective.

        Returns:
            The names on disk of those with numbers that are not finite in float32.
        """
        fragments = list(fragments)
        self.fill(fragments)
        # Padding, which nothing was read into, may be anything.
        boxes = ((item.name, offsets, view) for item in fragments for offsets, view in item.chunks())
        return _nonfinite_names(self.entries, boxes)

    def read_tensor(
        self, name: str, *, offsets: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """A tensor, or a box of it, in float32.

        Raises:
            UserError: it has numbers that are not finite.
        """
        from megatron_mea.checkpoint.tensors import Fragment

        fragment = Fragment.empty(name, self.shapes[name], offsets=offsets, shape=shape)
        self.refuse_not_finite(self.read([fragment]))
        return fragment.values.view(fragment.local_shape)

    def refuse_not_finite(self, names: Sequence[str]) -> None:
        """Raises UserError where there are names, as `read` returns them."""
        self.source.refuse_not_finite(names, self.entries)


def is_finite(values: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite, without the copy that `isfinite` makes."""
    import torch

    return bool(torch.stack(values.aminmax()).isfinite().all())


def _nonfinite_names(
    entries: Mapping[str, StoredTensor], boxes: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]
) -> list[str]:
    """The names on disk of tensors with boxes (name, offsets, values) that are not finite, once each."""
    from megatron_mea.huggingface.safetensors_reader import expert_parts

    names: dict[str, None] = {}
    for name, offsets, values in boxes:
        if not is_finite(values):
            parts = expert_parts(entries[name], offsets=offsets, shape=values.shape)
            experts = [matrix.name for matrix, _, in_box, _ in parts if not is_finite(values[in_box])]
            names |= dict.fromkeys(experts or [name])

    return list(names)


def _missing(path: Path, name: str) -> str:
    """What is found in the place of a folder with `name`, for messages."""
    return f"no {name}" if path.is_dir() else "a file" if path.exists() else "no such folder"
