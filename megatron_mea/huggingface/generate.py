"""Generating text with any MODEL."""

from __future__ import annotations

import torch

from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import ModelFolder


def generate(*, model: ModelFolder, prompt: str, max_new_tokens: int, temperature: float) -> str:
    """Returns the prompt with its continuation; temperature 0 takes the likeliest token each time.

    Raises:
        UserError: MODEL cannot be loaded, or does not take the prompt or so many tokens.
    """
    loaded, tokenizer = model.as_transformers(), model.load_tokenizer()

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length, context = inputs["input_ids"].shape[1], loaded.config.max_position_embeddings
    if length == 0:
        raise UserError(where="--prompt", got="no token", expected="at least one token of text")

    if length + max_new_tokens > context:
        got = f"{max_new_tokens} after a prompt of {length} tokens"
        raise UserError(
            where="--max-new-tokens", got=got, expected=f"at most {max(context - length, 0)}: the context is {context}"
        )

    if (highest_id := int(inputs["input_ids"].max())) >= loaded.config.vocab_size:
        got = f"text whose tokens go up to id {highest_id}"
        raise UserError(
            where="--prompt",
            got=got,
            expected=f"ids below {loaded.config.vocab_size}, which are all that the model has",
        )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = loaded.to(device).generate(
        **inputs.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
