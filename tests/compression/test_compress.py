"""`compress`: any model in, of the same kind out, with fewer component heads and else the same."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.hf_folders import save_export
from support.runs import train
from support.source_models import HEADS, KINDS, LAYERS, SIZES, save_source_model
from transformers import AutoModelForCausalLM

from megatron_mea.checkpoint.folder import CheckpointMetadata, find_corruption
from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.cli import main
from megatron_mea.compression.calibrate import calibration_windows, head_moments
from megatron_mea.compression.compress import _head_options, compress
from megatron_mea.compression.compressed_model import Factoriser
from megatron_mea.compression.source_model import open_source_model
from megatron_mea.config.load import parse_model
from megatron_mea.config.variants import VARIANTS, combining_variant
from megatron_mea.data.indexed import IndexedReader, IndexedWriter
from megatron_mea.errors import UserError
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface import importing
from megatron_mea.huggingface.model_folder import ModelFolder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    model = (MEAForCausalLM if kind == "mea" else AutoModelForCausalLM).from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    ids = torch.randint(0, 384, (2, 60), generator=torch.Generator().manual_seed(5))
    return model.eval()(ids, use_cache=False).logits


def composites(*, tensors: dict[str, torch.Tensor], layer: int, side: str) -> torch.Tensor:
    """(h, d, D) of a folder's tensors, the bias as the last column."""
    name = f"model.layers.{layer}.self_attn"
    rows = tensors[f"{name}.{side}_proj.weight"]
    if f"{name}.{side}_proj.bias" in tensors:
        rows = torch.cat([rows, tensors[f"{name}.{side}_proj.bias"].unsqueeze(1)], 1)

    combination = tensors.get(f"{name}.hlc_{side}.weight")
    dim = len(rows) // (HEADS if combination is None else len(combination))
    heads = rows.view(-1, dim, rows.shape[1])
    return heads if combination is None else torch.einsum("ch,cax->hax", combination, heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "align"),
    [(kind, True) for kind in (*KINDS, "plain_norm", "mea", "mea_no_norm")] + [("qwen2", False), ("mea", False)],
)
def test_the_model_is_the_original_with_its_heads_replaced(kind, align, tmp_path, capsys):
    """Its logits are those of the original class whose composite heads are overwritten with what is left of them."""
    original, out, replaced = save_source_model(kind, tmp_path / "in"), tmp_path / "out", tmp_path / "replaced"
    command = ["compress", str(original), str(out), "--component-heads", "2", "--layers", "2,3:1"]
    # transformers' saving says things of its own.
    capsys.readouterr()
    assert main([*command, *["--align"] * align]) == 0
    output, warnings = capsys.readouterr()

    assert ("warning: aligning without --calibration weighs" in warnings) == align
    assert output.startswith(f"wrote {out}: ")
    assert f"; in the layers 1: {HEADS}, 2: 2, 3: 1" in output

    before, compressed = weights(original), weights(out)
    with open_source_model(ModelFolder.locate(original), tmp_path / "x") as source_model:
        heads = [4, 2, 1]
        factoriser = Factoriser(source_model=source_model, moments=None, aligned=align)
        overwritten = dict(before)
        for layer, side in ((layer, side) for layer in (1, 2) for side in "kv"):
            virtual = factoriser.virtual_heads(layer=layer, side=side, rank=heads[layer])
            projection = composites(tensors=before, layer=layer, side=side)
            dim, inputs = projection.shape[1:]
            components = (virtual.selection @ projection.flatten(0, 1)).view(-1, dim, inputs)
            replacement = torch.einsum("ch,cax->hax", virtual.combination, components)
            if virtual.rotations is not None:
                replacement = virtual.rotations @ replacement

            replacement = replacement.flatten(0, 1)
            name = f"model.layers.{layer}.self_attn"
            bias = f"{name}.{side}_proj.bias"
            if bias in before:
                overwritten[bias] = replacement[:, -1].contiguous()
                replacement = replacement[:, :-1]

            overwritten[f"{name}.{side}_proj.weight"] = replacement.contiguous()
            if f"{name}.hlc_{side}.weight" in before:
                overwritten[f"{name}.hlc_{side}.weight"] = torch.eye(HEADS, dtype=torch.float64)

            # Without rotations, the folder holds the replaced heads themselves.
            if not align:
                torch.testing.assert_close(
                    composites(tensors=compressed, layer=layer, side=side).flatten(0, 1)[:, : replacement.shape[1]],
                    replacement,
                    atol=1e-6,
                    rtol=1e-5,
                )

    replaced.mkdir()
    config_json = json.loads((original / "config.json").read_text())
    if "num_component_heads" in config_json:
        config_json["num_component_heads"] = HEADS

    (replaced / "config.json").write_text(json.dumps(config_json))
    save_file({name: tensor.contiguous() for name, tensor in overwritten.items()}, replaced / "model.safetensors")
    torch.testing.assert_close(logits(out), logits(replaced), atol=2e-5, rtol=1e-5)
    unchanged = [name for name in before if ".layers.0." in name or "self_attn" not in name]
    assert all(torch.equal(before[name], compressed[name]) for name in unchanged)


@pytest.mark.slow
def test_plain_stays_exact_with_all_heads(tmp_path):
    original = save_source_model("qwen3", tmp_path / "in")
    assert main(["compress", str(original), str(tmp_path / "out"), "--component-heads", "4", "--align"]) == 0
    before, compressed = weights(original), weights(tmp_path / "out")
    assert all(torch.equal(compressed[name], tensor) for name, tensor in before.items())

    added = {name: tensor for name, tensor in compressed.items() if name not in before}
    assert len(added) == 2 * LAYERS
    assert all(torch.equal(tensor, torch.eye(HEADS).double()) for tensor in added.values())

    torch.testing.assert_close(logits(tmp_path / "out"), logits(original), rtol=0, atol=1e-5)


LISTS = [
    ({"heads": "2"}, [2, 2, 2]),
    ({"heads": "2,3,4"}, [2, 3, 4]),
    ({"heads": "2", "layers": "2,3:1"}, [4, 2, 1]),
    ({"layers": "2:3,3:1"}, [4, 3, 1]),
]
WRONG = [
    ({}, "--component-heads"),
    ({"heads": "2", "ratio": 0.5}, "--component-heads, --cache-ratio"),
    ({"heads": "2,3"}, "--component-heads"),
    ({"heads": "5"}, "--component-heads"),
    ({"heads": "2,3,4", "layers": "half"}, "--component-heads"),
    # It would do nothing.
    ({"heads": "2", "layers": "2:3,3:1"}, "--component-heads"),
    ({"heads": "2", "layers": "2:0,3"}, "--layers"),
    ({"heads": "2", "layers": "2:5,3"}, "--layers"),
    ({"layers": "2:3,3"}, "--component-heads"),
    ({"heads": "2", "layers": "auto"}, "--layers"),
    ({"ratio": 0.5, "layers": "2:0"}, "--layers"),
    ({"ratio": 0.2}, "--cache-ratio"),
    ({"ratio": 0.74, "layers": "2"}, "--cache-ratio"),
]


class TestOptions:
    @pytest.mark.slow
    @pytest.mark.parametrize(("options", "expected"), LISTS)
    def test_heads_of_each_layer(self, options, expected):
        arguments = {"heads": None, "ratio": None, "layers": None} | options
        assert _head_options(model=parse_model(SIZES), name="it", **arguments) == [[heads] for heads in expected]

    @pytest.mark.parametrize(("options", "key"), WRONG)
    def test_what_cannot_be_or_would_do_nothing_is_refused_before_the_model_is_read(
        self, options, key, tmp_path, monkeypatch
    ):
        original = save_source_model("llama", tmp_path / "in")
        monkeypatch.setattr(importing, "import_model", None)
        with pytest.raises(UserError) as raised:
            compress(ModelFolder.locate(original), out=tmp_path / "deep/out", **options)

        assert raised.value.problems[0].where == key
        assert not (tmp_path / "deep").exists()


@pytest.mark.slow
class TestCalibration:
    @pytest.mark.parametrize("kind", ["qwen2", "mea"])
    def test_moments_are_those_of_the_outputs(self, kind, tiny, tmp_path):
        """Against transformers' layers, whose projections are watched."""
        original = save_source_model(kind=kind, folder=tmp_path / "in", tokenizer=tiny.tokenizer)
        with open_source_model(ModelFolder.locate(original), tmp_path / "x") as source_model:
            windows = calibration_windows(
                source_model=source_model, path=str(tiny.train), where="--calibration", tokens=500
            )
            moments = head_moments(source_model=source_model, windows=windows, layers={1, 2})
            assert set(moments) == {(layer, side) for layer in (1, 2) for side in "kv"}

            model = ModelFolder.locate(original).as_transformers().double()
            tensors, seen = weights(original), []
            model.model.layers[2].self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1]).detach()), with_kwargs=True
            )
            with torch.no_grad():
                for batch in windows:
                    ids, positions = map(torch.from_numpy, (batch.input_ids, batch.position_ids))
                    model(ids, position_ids=positions, use_cache=False)

        inputs = torch.cat([x.flatten(0, 1) for x in seen])
        for side in "kv":
            rows = composites(tensors=tensors, layer=2, side=side).flatten(0, 1)
            if rows.shape[1] > inputs.shape[1]:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            outputs = inputs @ rows.mT
            torch.testing.assert_close(moments[2, side], outputs.mT @ outputs / len(inputs), atol=1e-5, rtol=1e-4)

    def test_too_few_tokens_are_warned_of(self, tiny, tmp_path, capsys):
        tokens = IndexedReader(tiny.train).tokens[:20]
        with IndexedWriter(tmp_path / "few", tokens.dtype) as writer:
            writer.add(tokens, [20])
            writer.commit()

        options = ["--component-heads", "2", "--calibration", str(tmp_path / "few")]
        original = save_source_model("llama", tmp_path / "in")
        assert main(["compress", str(original), str(tmp_path / "out"), *options]) == 0
        assert "has 19 tokens for the 32 outputs" in capsys.readouterr().err

    def test_it_loses_less_of_the_outputs(self, tiny, tmp_path, capsys):
        original = save_source_model(kind="llama", folder=tmp_path / "in", tokenizer=tiny.tokenizer)
        compressed = {}
        for option in ([], ["--calibration", str(tiny.train)]):
            out = tmp_path / f"out{len(option)}"
            assert main(["compress", str(original), str(out), "--component-heads", "2", *option]) == 0
            assert (out / "tokenizer.model").is_file() or (out / "tokenizer.json").is_file()
            compressed[bool(option)] = weights(out)

        with open_source_model(ModelFolder.locate(original), tmp_path / "x") as source_model:
            windows = calibration_windows(
                source_model=source_model, path=str(tiny.train), where="--calibration", tokens=4096
            )
            moments = head_moments(source_model=source_model, windows=windows, layers={0, 1, 2})

        before = weights(original)
        for layer in range(LAYERS):
            for side in "kv":
                projection = composites(tensors=before, layer=layer, side=side).flatten(0, 1)
                root = torch.linalg.pinv(projection) @ moments[layer, side] @ torch.linalg.pinv(projection).mT
                errors = [
                    torch.trace(change @ root @ change.mT)
                    for change in (
                        composites(tensors=compressed[calibrated], layer=layer, side=side).flatten(0, 1) - projection
                        for calibrated in (False, True)
                    )
                ]
                assert errors[1] < errors[0]


@pytest.mark.slow
class TestRatio:
    def test_heads_go_where_least_is_lost(self, tmp_path, capsys):
        original, out = save_source_model("llama", tmp_path / "in"), tmp_path / "out"
        # The middle layer's heads are all alike: the choice falls on it.
        tensors = load_file(original / "model.safetensors")
        for side in "kv":
            name = f"model.layers.1.self_attn.{side}_proj.weight"
            tensors[name] = tensors[name][:8].repeat(4, 1)

        save_file(tensors, original / "model.safetensors")
        assert main(["compress", str(original), str(out), "--cache-ratio", "0.75"]) == 0
        heads = json.loads((out / "config.json").read_text())["num_component_heads"]
        assert heads == [4, 1, 4]

        torch.testing.assert_close(logits(out), logits(original), atol=1e-4, rtol=1e-4)
        assert "9 of 12 key/value heads are cached (75.0%); in the layers 1: 4, 2: 1, 3: 4" in capsys.readouterr().out


@pytest.mark.slow
class TestCheckpoint:
    def test_a_full_disk_is_one_message(self, tmp_path, capsys):
        original, out = tmp_path / "original", tmp_path / "deep/out"
        assert main(["import", str(save_source_model("llama", tmp_path / "in")), str(original)]) == 0
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            status = main(["compress", str(original), str(out), "--component-heads", "2"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        assert status == 1
        assert f"{out} cannot be written: " in capsys.readouterr().err
        assert not out.parent.exists()

    def test_a_checkpoint_gives_a_checkpoint_that_a_run_begins_from(self, tiny, tmp_path, capsys):
        original, out = tmp_path / "original", tmp_path / "deep/out"
        hf_folder = save_source_model(kind="mea", folder=tmp_path / "in", tokenizer=tiny.tokenizer)
        assert main(["import", str(hf_folder), str(original)]) == 0
        assert main(["compress", str(original), str(out), "--component-heads", "1", "--layers", "2", "--align"]) == 0
        assert find_corruption(out) is None

        meta = CheckpointMetadata.read(out)
        settings = yaml.safe_load(capsys.readouterr().out.split("with these settings:\n")[-1])
        assert parse_model(settings["model"]).component_heads == [4, 1, 4]
        assert settings["run"]["init_from"] == str(out)
        assert (meta.step, meta.config["model"]["num_component_heads"]) == (0, [4, 1, 4])
        assert "compressed to 9 of 12 key/value heads: " in meta.origin

        shapes = weight_shapes(out)
        assert shapes["model.layers.1.self_attn.k_proj.weight"][0] == meta.config["model"]["head_dim"]
        assert all(tensor.isfinite().all() for tensor in read_tensors(out, shapes).values())

        capsys.readouterr()
        assert main(["evaluate", str(out), "--data", str(tiny.validation)]) == 0
        loss = json.loads(capsys.readouterr().out)["cross_entropy"]
        config = tmp_path / "go_on.yaml"
        tree = tiny.tree()
        assert settings["data"]["tokenizer"] == f"{out}/tokenizer"
        config.write_text(yaml.safe_dump(tree | settings | {"data": tree["data"] | settings["data"]}))
        # In a process of its own: a process group leaves its mark on the environment of this one.
        train(config, "go_on", "training.steps=3")
        rows = [json.loads(line) for line in (tmp_path / "go_on/metrics.jsonl").read_text().splitlines()]
        # On other windows.
        assert rows[0]["validation_loss"] == pytest.approx(loss, rel=0.1)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if combining_variant(name) is None])
def test_a_variant_without_heads_to_combine_is_refused(variant, tmp_path, capsys):
    source = save_export(tmp_path / "export", attention_variant=variant)
    assert main(["compress", str(source), str(tmp_path / "out"), "--component-heads", "1"]) == 2
    error = capsys.readouterr().err
    assert f"got:      {source}, of the variant {variant}\n" in error
    assert "expected: one of plain, plain_norm, mea, mea_no_norm" in error
