"""Mixtures of experts in Hugging Face folders: both ways of storing them, what is refused, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.hf_folders import SIZES, save_export, save_stock_model
from support.limits import PEAK_MEMORY
from support.models import expert_cases, small_model
from support.source_models import save_source_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.huggingface.config_keys import read_config_json
from megatron_mea.huggingface.expert_tensors import expert_matrices, parse_expert_name, stack_shapes
from megatron_mea.huggingface.hf_config import model_section
from megatron_mea.huggingface.importing import import_model
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.huggingface.weights import open_weights

EXPERT, DOWN = (f"model.layers.0.mlp.experts.3.{kind}_proj.weight" for kind in ("up", "down"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock_model("qwen3_moe", tmp_path_factory.mktemp("stock") / "qwen3_moe")


@pytest.fixture
def folder(stock, tmp_path) -> Path:
    """A copy of a small Qwen3-MoE."""
    copy = tmp_path / "moe"
    copy.mkdir()
    for file in stock.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    contents = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in contents.items() if value != "absent"}))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ModelFolder.locate(folder, "HF_DIR").tensors()
    return str(caught.value)


def test_published_and_saved_names_of_the_number_of_experts(folder):
    """transformers 5 saves num_local_experts, published files have num_experts."""
    assert "num_local_experts" in json.loads((folder / "config.json").read_text())
    expected = ModelFolder.locate(folder).settings()
    edit(folder, num_local_experts="absent", num_experts=8)
    assert ModelFolder.locate(folder).settings() == expected
    assert expected.num_experts == 8
    assert not expected.norm_topk_prob

    edit(folder, num_local_experts=9)
    assert "num_experts = 8, and num_local_experts = 9" in refusal(folder)


def test_fused_tensors_are_read_as_separate_ones(folder):
    separate = ModelFolder.locate(folder, "HF_DIR").tensors()
    expected = {name: separate.read_tensor(name) for name in separate.shapes}
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(folder / "model.safetensors")

    stored = ModelFolder.locate(folder, "HF_DIR").tensors()
    assert stored.shapes == separate.shapes
    assert all(torch.equal(stored.read_tensor(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EXPERT: None}, f"without {EXPERT}"),
        ({EXPERT.replace(".3.", ".7."): None}, "without model.layers.0.mlp.experts.7.up_proj.weight"),
        ({EXPERT: torch.zeros(16, 15)}, f"{EXPERT} of shape (16, 15)"),
        ({EXPERT.replace(".3.", ".8."): torch.zeros(16, 16)}, "experts.8.up_proj.weight{too_many}"),
        ({DOWN.replace(".3.", ".8."): torch.zeros(16, 16)}, "experts.8.down_proj.weight{too_many}"),
        ({EXPERT.replace(".3.", ".99."): torch.zeros(2)}, "experts.99.up_proj.weight{too_many}"),
        ({f"{EXPERT}.bias": torch.zeros(2)}, f"{EXPERT}.bias in"),
        ({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(8, 32, 16)}, "experts.0.gate_proj.weight"),
        ({"model.layers.0.mlp.gate.weight": None}, "without model.layers.0.mlp.gate.weight"),
    ],
    ids=["missing", "last", "shape", "one more", "one more down", "far more", "bias", "twice", "router"],
)
def test_what_does_not_fit_is_named(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    save_file(changed, folder / "model.safetensors")
    error = refusal(folder)
    too_many = f" in {folder}\n  expected: experts 0 to 7, by {folder}/config.json"
    assert message.format(too_many=too_many) in error
    # That tensor alone; of what is stored twice, gate and up of all experts.
    assert error.count("error: ") == (16 if "model.layers.0.mlp.experts.gate_up_proj" in change else 1)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("n_group", 8, "nothing, or 0, 1"),
        ("topk_group", 4, "nothing, or 0, 1"),
        ("routed_scaling_factor", 2.5, "nothing, or 1"),
        ("scoring_func", "sigmoid", "nothing, or softmax"),
        ("router_jitter_noise", 0.1, "nothing, or 0"),
        ("shared_expert_intermediate_size", 64, "nothing, or 0"),
        ("n_shared_experts", 1, "nothing, or 0"),
        ("first_k_dense_replace", 1, "nothing, or 0"),
        ("score_function", "sigmoid", "nothing, or softmax"),
        ("use_expert_bias", True, "nothing, or 0"),
        ("moe_num_shared_experts", 2, "nothing, or 0"),
        ("router_bias", True, "nothing, or 0"),
        ("decoder_sparse_step", 0, "greater than or equal to 1"),
        ("num_experts_per_tok", 9, "at most model.num_experts = 8"),
        ("mlp_only_layers", [2], "layers from 0 to 1"),
        ("mlp_only_layers", [-1], "greater than or equal to 0"),
        ("num_local_experts", 1 << 20, "less than or equal to"),
        ("attention_bias", True, "a bias on o_proj is not supported"),
    ],
)
def test_other_families_are_refused_by_their_keys(folder, key, value, expected):
    edit(folder, **{key: value})
    error = refusal(folder)
    assert key in error
    assert expected in error


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_other_architectures_are_refused_by_name(folder, model_type):
    edit(folder, model_type=model_type)
    assert model_type in refusal(folder)


def test_an_expert_that_is_not_finite_is_named_with_its_file(folder):
    """However it is read; and not the stack, which stands in several files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in (EXPERT, DOWN):
        tensors[name][-1, -1] = torch.nan

    files = {name: f"{'third' if '.experts.3.' in name else 'others'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    location, stack = ModelFolder.locate(folder, "HF_DIR"), DOWN.replace("3.down_proj.weight", "down_proj")
    stored = location.tensors()
    readers = {
        (EXPERT, DOWN): location.as_transformers,
        (DOWN,): lambda: stored.read_tensor(stack, offsets=(2, 9, 0), shape=(2, 7, 16)),
    }
    for names, read in readers.items():
        with pytest.raises(UserError) as caught:
            read()
        got = {str(problem.got) for problem in caught.value.problems}
        expected = {f"{name} in {folder}/third.safetensors, with numbers" for name in names}
        assert {text.removesuffix(" that are not finite in float32") for text in got} == expected

    # Rows without it.
    assert stored.read_tensor(stack, offsets=(2, 0, 0), shape=(2, 9, 16)).isfinite().all()


def test_a_dense_model_has_no_experts(tmp_path):
    folder = save_stock_model("qwen3", tmp_path / "qwen3")
    edit(folder, num_experts=8)
    assert "num_experts" in refusal(folder)


def test_experts_of_a_dense_model_are_refused_by_name(folder, tmp_path):
    """A run with experts does not begin with a dense model, nor a dense run with experts."""
    dense = save_stock_model("qwen3", tmp_path / "qwen3")
    for source, other in ((dense, folder), (folder, dense)):
        with pytest.raises(UserError) as caught:
            open_weights(source, ModelFolder.locate(other).settings())
        assert "model.num_experts" in {problem.where for problem in caught.value.problems}


def test_layers_are_compared_by_what_they_are(tmp_path):
    """Which layers have experts may be said by either key."""
    case = expert_cases()[2]
    assert case["decoder_sparse_step"] == 2
    folder = save_export(tmp_path / "export", **case)
    other = case | {"decoder_sparse_step": 1}
    for dense in ([0, 2], [2, 0]):
        assert not open_weights(folder, small_model(**other | {"mlp_only_layers": dense})).warnings

    with pytest.raises(UserError) as caught:
        open_weights(folder, small_model(**other | {"mlp_only_layers": [0]}))
    problem = caught.value.problems[0]
    assert problem.where == "model.mlp_only_layers, model.decoder_sparse_step"
    assert problem.got == "experts in the layers [1, 2]"
    assert problem.expected == f"in [1], as in run.init_from = {folder}"


@given(
    experts=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    kind=st.sampled_from(["gate_up_proj", "down_proj"]),
)
def test_names_go_out_and_come_back(experts, rows, columns, kind):
    rows *= 2
    name = f"model.layers.7.mlp.experts.{kind}"
    matrices = list(expert_matrices(name, (experts, rows, columns)))
    covered = torch.zeros(experts, rows, columns)
    for matrix in matrices:
        expert, first, _ = matrix.offsets
        covered[expert, first : first + matrix.shape[1]] += 1
        parsed = parse_expert_name(matrix.name)
        assert parsed is not None
        assert (parsed.index, parsed.stack) == (expert, name)

    assert (covered == 1).all()
    shapes = [(matrix.name, matrix.shape[1:]) for matrix in matrices]
    assert stack_shapes(shapes, experts) == {name: (experts, rows, columns)}
    # That of one more is left alone.
    assert stack_shapes(shapes, experts - 1) == ({name: (experts - 1, rows, columns)} if experts > 1 else {})
    assert stack_shapes(shapes, experts + 1) == {}
    assert not list(expert_matrices("model.layers.7.mlp.down_proj.weight", (rows, columns)))


FRESH = """
import sys
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
import torch
folder, again = sys.argv[1:3]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
model.save_pretrained(again, max_shard_size="20KB")
second, info = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
torch.save({name: tensor for name, tensor in model.state_dict().items()}, sys.argv[3])
"""


@pytest.mark.slow
def test_an_export_loads_in_a_fresh_process_with_nothing_newly_initialised(tmp_path):
    """Our modeling files register how experts are stored, which transformers does for its own classes alone."""
    source = save_export(tmp_path / "source", **expert_cases()[1])
    assert main(["export", str(source), str(tmp_path / "export")]) == 0
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert sum(".experts." in name for name in stored) == 2 * 8 * 3

    command = [sys.executable, "-c", FRESH, tmp_path / "export", tmp_path / "again", tmp_path / "state.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    state = torch.load(tmp_path / "state.pt")
    assert import_model(ModelFolder.locate(source), tmp_path / "checkpoint")
    masters = read_tensors(tmp_path / "checkpoint", weight_shapes(tmp_path / "checkpoint"))
    assert masters.keys() == state.keys()
    assert all(torch.equal(masters[name], state[name]) for name in masters)


@pytest.mark.slow
def test_every_verb_takes_them(tiny, tmp_path, capsys):
    """In a model in which both keys make layers dense: one of four has experts."""
    layers = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    source = save_source_model("qwen3_moe", tmp_path / "moe", tokenizer=tiny.tokenizer, **layers)
    assert ModelFolder.locate(source).settings().routed_layers == [1]
    data, compressed = str(tiny.validation), tmp_path / "compressed"
    losses = {}
    command = ["compress", str(source), str(compressed), "--cache-ratio", "0.5", "--calibration", data, "--align"]
    assert main(command) == 0
    assert main(["import", str(compressed), str(tmp_path / "checkpoint")]) == 0
    for name in (source, compressed, tmp_path / "checkpoint"):
        capsys.readouterr()
        assert main(["evaluate", str(name), "--data", data]) == 0
        losses[name] = json.loads(capsys.readouterr().out)["cross_entropy"]
        assert main(["generate", str(name), "--prompt", "In the", "--max-new-tokens", "3"]) == 0

    assert losses[compressed] == pytest.approx(losses[tmp_path / "checkpoint"], rel=1e-5)
    assert losses[compressed] != losses[source]

    assert main(["inspect", str(tmp_path / "checkpoint")]) == 0
    result = tmp_path / "sensitivity.json"
    command = ["sensitivity", str(source), "--component-heads", "2", "--data", data, "--out", str(result)]
    assert main(command) == 0
    assert len(json.loads(result.read_text())["layers"]) == 4


def test_a_stock_export_needs_what_qwen3_moe_has(tmp_path, capsys):
    source = save_export(tmp_path / "source", **expert_cases()[3] | {"qk_norm": False})
    assert main(["export", str(source), str(tmp_path / "out"), "--target", "stock"]) == 2
    error = capsys.readouterr().err
    assert "experts and no qk_norm" in error
    assert "--target" in error


def test_settings_of_an_export_come_back(tmp_path):
    for number, case in enumerate(expert_cases()):
        folder = save_export(tmp_path / str(number), **case)
        model, _ = model_section(read_config_json(folder, "HF_DIR"))
        assert {key: getattr(model, key) for key in case if key != "num_component_heads"} == {
            key: value for key, value in case.items() if key != "num_component_heads"
        }


STREAMED = """
import sys
from megatron_mea.checkpoint import tensors
from megatron_mea.compression.compress import compress
from megatron_mea.huggingface import export as export_module
from megatron_mea.huggingface.export import export
from megatron_mea.huggingface.importing import import_model
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.huggingface.parity_check import Parity

# Pieces of 17 MB, since the model is small; the comparison of logits holds a layer.
tensors.row_chunks.__defaults__ = (1 << 22,)
export_module.check_parity = lambda **_: Parity(tokens=1, difference=0.0, scale=1.0)

small, large, out = map(Path, sys.argv[1:])
grown = []
for name in (small, large):
    before = peak_memory()
    import_model(ModelFolder.locate(name), out / f"{name.name}-checkpoint")
    export(ModelFolder.locate(out / f"{name.name}-checkpoint"), out / f"{name.name}-export", dtype="bf16")
    compress(ModelFolder.locate(name), out / f"{name.name}-compressed", ratio=0.5)
    grown.append(peak_memory() - before)
print(grown[1])
"""


@pytest.mark.slow
def test_no_stack_of_experts_is_in_memory(tmp_path):
    """A layer of 128 experts, 201 MB in float32: import, export and compress together grow by less than 80 MB."""
    save_stock_model("qwen3_moe", tmp_path / "small")
    sizes = {"hidden_size": 512, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 256}
    config = CONFIG_MAPPING["qwen3_moe"](**SIZES | sizes | {"num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)

    model.save_pretrained(tmp_path / "large")
    assert len(load_file(tmp_path / "large" / "model.safetensors")) > 3 * 128
    del model

    command = [sys.executable, "-c", PEAK_MEMORY + STREAMED, tmp_path / "small", tmp_path / "large", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 80_000
    exported, compressed, expected = (
        load_file(tmp_path / f"large{name}" / "model.safetensors") for name in ("-export", "-compressed", "")
    )
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    # The factors of keys and values alone are new.
    unchanged = {name for name in expected if not name.endswith(("k_proj.weight", "v_proj.weight"))}
    assert sum(".experts." in name for name in unchanged) == 3 * 128
    assert all(torch.equal(compressed[name], expected[name]) for name in unchanged)
    assert len(compressed["model.layers.0.self_attn.k_proj.weight"]) == 8
