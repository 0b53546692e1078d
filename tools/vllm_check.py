"""Checks that vLLM generates the same tokens as transformers, and shows how many tokens its cache holds.

    python tools/vllm_check.py FOLDER [FOLDER ...]

Runs in vLLM's own environment, without megatron_mea, on folders that `megatron-mea export` wrote. Each folder is loaded
twice, in a process of its own: vLLM changes transformers' models in the process that it lives in. Exit status 1 where
tokens differ. docs/serving.md shows a run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PROMPTS = ("In the beginning", "And the king said unto", "To be, or not to be", "O")
TOKENS = 32
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def prompt_ids(folder: str) -> list[list[int]]:
    """The prompts as token ids, by the tokenizer in the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]


def generate_with_transformers(folder: str) -> list[int]:
    """The new tokens of all prompts in a row, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = []
    for ids in prompt_ids(folder):
        output = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        tokens += output[0, len(ids) :].tolist()

    return tokens


def generate_with_vllm(folder: str) -> list[int]:
    """The new tokens of all prompts in a row, greedily."""
    from vllm import LLM, SamplingParams

    stock = json.loads(Path(folder, "config.json").read_text())["model_type"] in ("llama", "mistral", "qwen2", "qwen3")
    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
        enforce_eager=True,
        trust_remote_code=True,
        model_impl="auto" if stock else "transformers",
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids(folder)]
    return [token for request in llm.generate(prompts, sampling) for token in request.outputs[0].token_ids]


def run_in_process(option: str, folder: str) -> tuple[list[int], str]:
    """Calls this script with `--transformers` or `--vllm`: the tokens, and all that the process wrote."""
    command = [sys.executable, __file__, option, folder]
    process = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True)
    # vLLM logs to both.
    log = process.stdout + process.stderr
    if process.returncode:
        sys.exit(log)

    line = next(line for line in process.stdout.splitlines() if line.startswith("tokens: "))
    return json.loads(line.removeprefix("tokens: ")), log


def main(folders: list[str]) -> int:
    """Prints a row for each folder; the exit status."""
    different = 0
    print(f"{'folder':<28} {'cache holds, in 1 GiB':>24}   greedy tokens equal to transformers'")
    for folder in folders:
        expected, _ = run_in_process("--transformers", folder)
        actual, log = run_in_process("--vllm", folder)
        size = re.search(r"KV cache size: ([\d,]+) tokens", log)
        equal = sum(a == b for a, b in zip(actual, expected, strict=True))
        total = len(expected)
        print(f"{folder:<28} {size[1] if size else '?':>17} tokens   {equal} of {total}", flush=True)
        different += equal != total

    return 1 if different else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--transformers", folder]:
            print(f"tokens: {generate_with_transformers(folder)}")
        case ["--vllm", folder]:
            print(f"tokens: {generate_with_vllm(folder)}")
        case []:
            sys.exit(__doc__)
        case folders:
            sys.exit(main(folders))
