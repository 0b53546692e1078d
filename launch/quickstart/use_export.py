"""Loads an export with transformers alone and continues a text:  python use_export.py FOLDER PROMPT

Nothing of megatron_mea is imported: what the model needs travels with the folder.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "megatron_mea" not in sys.modules
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
torch.manual_seed(0)
output = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=0.7, top_p=0.95)
print(tokenizer.decode(output[0], skip_special_tokens=True))
