"""Whether vLLM generates what transformers generates, and how many tokens its cache holds.

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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]


def by_transformers(folder: str) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    found = []
    for ids in prompt_ids(folder):
        output = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        found += output[0, len(ids) :].tolist()
    return found


def by_vllm(folder: str) -> list[int]:
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
    return [token for one in llm.generate(prompts, sampling) for token in one.outputs[0].token_ids]


def in_a_process(which: str, folder: str) -> tuple[list[int], str]:
    command = [sys.executable, __file__, which, folder]
    done = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    # vLLM logs on both.
    answer = next(line for line in done.stdout.splitlines() if line.startswith("tokens: "))
    return json.loads(answer.removeprefix("tokens: ")), done.stdout + done.stderr


def main(folders: list[str]) -> int:
    """Prints a row a folder."""
    wrong = 0
    print(f"{'folder':<28} {'cache holds, in 1 GiB':>24}   greedy tokens equal to transformers'")
    for folder in folders:
        expected, _ = in_a_process("--transformers", folder)
        found, log = in_a_process("--vllm", folder)
        size = re.search(r"KV cache size: ([\d,]+) tokens", log)
        equal = sum(one == other for one, other in zip(found, expected, strict=True))
        total = len(expected)
        print(f"{folder:<28} {size[1] if size else '?':>17} tokens   {equal} of {total}", flush=True)
        wrong += equal != total
    return 1 if wrong else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--transformers", one]:
            print(f"tokens: {by_transformers(one)}")
        case ["--vllm", one]:
            print(f"tokens: {by_vllm(one)}")
        case []:
            sys.exit(__doc__)
        case several:
            sys.exit(main(several))
