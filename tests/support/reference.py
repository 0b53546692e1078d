"""A naive fp64 decoder, the independent reference that the tests compare the project with.

Written from the formulas of the MEA paper (arXiv 2601.19611v1, whose equation numbers are cited) and from the
export contract's tensor names; it neither follows nor imports the project's code. Heads are Python loops, and
softmax, mask and norms are written out, so that lines can be compared with equations. Tensors are converted to
fp64 on entry, so gradients reach leaves of any precision.

Notation: H query heads, h composite and h' component key/value heads, d the width of a head. A "head" is a
tensor (batch, seq, d) and a bundle of heads is a Python list of them. Combining weights are indexed
[source, target] everywhere, as in eq. 10: HLC [component, composite], Talking-Heads [from head, to head].
"""

import math

import torch
from torch import Tensor

DEFAULTS = {
    "attention_variant": "mea",
    "hlc_mixes": "both",
    "hlc_form": "head",
    "gate_width": "feature",
    "qk_norm": False,
    "attention_bias": False,
    "head_norm_affine": True,
    "head_norm_eps": 1.0e-5,
    "rms_norm_eps": 1.0e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "num_experts": 0,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
VARIANTS = ("plain", "plain_norm", "mea", "mea_no_norm", "differential", "talking_heads", "gated")


def setting(config: dict, key: str):
    """A configuration value, or the contract's default where the key is absent."""
    return config[key] if key in config else DEFAULTS[key]


def num_component_heads(config: dict, layer: int) -> int:
    """h' of a layer; the configuration has an int for all layers or a list, and h is the default."""
    value = config.get("num_component_heads") or config["num_key_value_heads"]
    return value[layer] if isinstance(value, (list, tuple)) else value


def latent_dims(config: dict, key: str, layer: int) -> int:
    """`key_latent_dim` or `value_latent_dim` of a layer; all composite features are the default."""
    value = config.get(key) or config["num_key_value_heads"] * config["head_dim"]
    return value[layer] if isinstance(value, (list, tuple)) else value


def pair_frequencies(config: dict, layer: int) -> list[int]:
    """The index of each cached pair's frequency: ascending, as even as can be, the last frequencies getting more."""
    half = config["head_dim"] // 2
    if config.get("key_frequencies"):
        counts = config["key_frequencies"][layer]
    else:
        pairs = latent_dims(config, "key_latent_dim", layer) // 2
        counts = [pairs // half + (f >= half - pairs % half) for f in range(half)]

    return [f for f in range(half) for _ in range(counts[f])]


def is_routed(config: dict, layer: int) -> bool:
    """Qwen3-MoE's rule: every `decoder_sparse_step`th layer has experts, but for those listed as dense."""
    is_sparse = setting(config, "num_experts") > 0 and (layer + 1) % setting(config, "decoder_sparse_step") == 0
    return is_sparse and layer not in setting(config, "mlp_only_layers")


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The contract's tensor names and shapes. HLC exists in `mea` and `mea_no_norm` only."""
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query_heads, composite_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if (variant := setting(config, "attention_variant")) not in VARIANTS:
        raise ValueError(f"attention_variant {variant!r}")

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        component_heads = num_component_heads(config, layer)
        key_rows = value_rows = component_heads * d
        is_latent = setting(config, "hlc_form") == "latent"
        if is_latent:
            key_rows = latent_dims(config, "key_latent_dim", layer)
            value_rows = latent_dims(config, "value_latent_dim", layer)

        block = f"model.layers.{layer}."
        attention = block + "self_attn."
        shapes[block + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", query_heads * d), ("k", key_rows), ("v", value_rows)):
            shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
            if setting(config, "attention_bias"):
                shapes[f"{attention}{name}_proj.bias"] = (rows,)

        shapes[attention + "o_proj.weight"] = (hidden, query_heads * d)
        if is_latent:
            shapes[attention + "hlc_k.weight"] = (key_rows // 2, composite_heads, 2)
            shapes[attention + "hlc_v.weight"] = (value_rows, composite_heads * d)
        elif variant in ("mea", "mea_no_norm"):
            for name in {"both": "kv", "keys": "k", "values": "v"}[setting(config, "hlc_mixes")]:
                shapes[f"{attention}hlc_{name}.weight"] = (component_heads, composite_heads)

        if setting(config, "qk_norm"):
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (d,)
        if variant in ("plain_norm", "mea", "differential") and setting(config, "head_norm_affine"):
            shapes[attention + "head_norm.weight"] = (2 * d,) if variant == "differential" else (d,)

        if variant == "differential":
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                shapes[attention + name] = (d,)

        if variant == "gated":
            gates = d if setting(config, "gate_width") == "feature" else 1
            shapes[attention + "gate_proj.weight"] = (query_heads * gates, hidden)

        if variant == "talking_heads":
            for name in ("logits_mix", "weights_mix"):
                shapes[f"{attention}{name}.weight"] = (query_heads, query_heads)

        shapes[block + "post_attention_layernorm.weight"] = (hidden,)
        if is_routed(config, layer):
            experts, width = config["num_experts"], config["moe_intermediate_size"]
            shapes[block + "mlp.gate.weight"] = (experts, hidden)
            shapes[block + "mlp.experts.gate_up_proj"] = (experts, 2 * width, hidden)
            shapes[block + "mlp.experts.down_proj"] = (experts, hidden, width)
        else:
            shapes[block + "mlp.gate_proj.weight"] = (inner, hidden)
            shapes[block + "mlp.up_proj.weight"] = (inner, hidden)
            shapes[block + "mlp.down_proj.weight"] = (hidden, inner)

    shapes["model.norm.weight"] = (hidden,)
    if not setting(config, "tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)

    return shapes


def random_tensors(config: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Random fp64 leaves: no norm weight is 1, no bias is 0, combining matrices are dense."""
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.2 * noise
        elif name.endswith(".bias") or ".lambda_" in name:
            value = 0.3 * noise
        else:
            value = noise / math.sqrt(shape[0] if ".hlc_" in name else shape[-1])

        tensors[name] = value.requires_grad_()

    return tensors


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 over the last dimension + eps), times the weight where there is one."""
    normed = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def split_heads(x: Tensor, weight: Tensor, bias: Tensor | None, *, head_dim: int) -> list[Tensor]:
    """Q_i = X W_i (+ b_i) for each head i, whose rows of `weight` are i d ... (i + 1) d."""
    heads = []
    for i in range(weight.shape[0] // head_dim):
        rows = slice(i * head_dim, (i + 1) * head_dim)
        head = x @ weight[rows].T
        heads.append(head if bias is None else head + bias[rows])

    return heads


def combine_heads(weight: Tensor, heads: list[Tensor]) -> list[Tensor]:
    """Eq. 10, HLC: target head j is the sum over source heads c of weight[c, j] T_c."""
    sources, destinations = weight.shape
    return [sum(weight[c, j] * heads[c] for c in range(sources)) for j in range(destinations)]


def latent_keys(pairs: Tensor, *, weight: Tensor, frequency: list[int], head_dim: int) -> list[Tensor]:
    """Composite keys: z_jf is the sum over the pairs n of frequency f of (W'_nj + i W''_nj) (c_n + i c_(n + pairs))."""
    half, count = head_dim // 2, len(frequency)
    heads = []
    for j in range(weight.shape[1]):
        features = [torch.zeros_like(pairs[..., 0]) for _ in range(head_dim)]
        for n, f in enumerate(frequency):
            real, imaginary, a, b = weight[n, j, 0], weight[n, j, 1], pairs[..., n], pairs[..., n + count]
            features[f] = features[f] + real * a - imaginary * b
            features[f + half] = features[f + half] + real * b + imaginary * a
        heads.append(torch.stack(features, dim=-1))

    return heads


def rope_settings(config: dict) -> dict:
    """RoPE's base and scaling, also from an exported config.json, which holds them in `rope_parameters`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_type": "default", "rope_theta": setting(config, "rope_theta")} | dict(rope)


def frequencies(config: dict, positions: Tensor) -> tuple[list[float], float]:
    """Rotation per position of each plane j, in radians, and the factor on cosine and sine.

    theta^(-2 j / d), scaled as published: linear (position interpolation, arXiv 2306.15595), dynamic (NTK-aware, whose
    base grows with the sequence), yarn (arXiv 2309.00071, section 3.2 and 3.4), llama3 (Llama 3.1's own).
    """
    rope, d = rope_settings(config), config["head_dim"]
    kind, theta, factor = rope["rope_type"], float(rope["rope_theta"]), rope.get("factor")
    trained = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if kind == "dynamic":
        length = max(float(positions.max()) + 1, config["max_position_embeddings"])
        growth = factor * length / config["max_position_embeddings"] - (factor - 1)
        theta = theta * growth ** (d / (d - 2))

    plain = [theta ** (-2.0 * j / d) for j in range(d // 2)]
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return [f / factor for f in plain], 1.0

    if kind == "llama3":
        scaled = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength < trained / rope["high_freq_factor"]:
                scaled.append(f)
            elif wavelength > trained / rope["low_freq_factor"]:
                scaled.append(f / factor)
            else:
                smooth = trained / wavelength - rope["low_freq_factor"]
                smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
                scaled.append((1 - smooth) * f / factor + smooth * f)

        return scaled, 1.0

    assert kind == "yarn", kind

    def plane_of(rotations: float) -> float:
        """The (fractional) j whose plane rotates this often over the trained context."""
        return d * math.log(trained / (2 * math.pi * rotations)) / (2 * math.log(theta))

    first, last = plane_of(rope.get("beta_fast") or 32), plane_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)

    first, last = max(first, 0), min(last, d - 1)
    if first == last:
        last += 0.001

    scaled = []
    for j, f in enumerate(plain):
        interpolated = min(max((j - first) / (last - first), 0.0), 1.0)
        scaled.append(interpolated * f / factor + (1 - interpolated) * f)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return scaled, rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled, temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])

    return scaled, temperature(1.0)


def rotate(head: Tensor, positions: Tensor, *, config: dict) -> Tensor:
    """RoPE, half-split: features j and j + d/2 form a plane turned by position * frequency j."""
    half = head.shape[-1] // 2
    turns, magnitude = frequencies(config, positions)
    first, second = [], []
    for j in range(half):
        angle = positions * turns[j]
        a, b = head[..., j], head[..., j + half]
        first.append(magnitude * (a * torch.cos(angle) - b * torch.sin(angle)))
        second.append(magnitude * (b * torch.cos(angle) + a * torch.sin(angle)))

    return torch.stack(first + second, dim=-1)


def scores(query: Tensor, key: Tensor) -> Tensor:
    """Q K^T / sqrt(d): (batch, seq, seq)."""
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])


def causal_softmax(logits: Tensor) -> Tensor:
    """exp(S_nm) / sum over m' <= n of exp(S_nm'), zero where m > n."""
    seq = logits.shape[-1]
    visible = torch.tensor([[m <= n for m in range(seq)] for n in range(seq)], device=logits.device)
    masked = torch.where(visible, logits, torch.full_like(logits, -math.inf))
    exponentials = torch.exp(masked - masked.detach().amax(dim=-1, keepdim=True))
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def attention(x: Tensor, *, weights: dict[str, Tensor], config: dict, layer: int, positions: Tensor) -> Tensor:
    """Attention of any variant; `weights` are the tensors of this layer's `self_attn`, `layer` counts from 0.

    Query head i attends to composite head i // (H // h). MEA is eq. 11-12, with eq. 12's C_1 ... C_h'
    read as the outputs of the H query heads.
    """
    variant, d = setting(config, "attention_variant"), config["head_dim"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    group_size = num_heads // num_kv_heads
    eps = setting(config, "rms_norm_eps")

    # Eq. 11: queries are not mixed; component keys and values are combined to composite ones.
    q = split_heads(x, weights["q_proj.weight"], weights.get("q_proj.bias"), head_dim=d)
    if setting(config, "hlc_form") == "latent":
        # One "head" of all latent numbers.
        (pairs,) = split_heads(
            x, weights["k_proj.weight"], weights.get("k_proj.bias"), head_dim=len(weights["k_proj.weight"])
        )
        (latent,) = split_heads(
            x, weights["v_proj.weight"], weights.get("v_proj.bias"), head_dim=len(weights["v_proj.weight"])
        )
        frequency = pair_frequencies(config, layer)
        k = latent_keys(pairs, weight=weights["hlc_k.weight"], frequency=frequency, head_dim=d)
        v = list((latent @ weights["hlc_v.weight"]).split(d, dim=-1))
    else:
        k = split_heads(x, weights["k_proj.weight"], weights.get("k_proj.bias"), head_dim=d)
        v = split_heads(x, weights["v_proj.weight"], weights.get("v_proj.bias"), head_dim=d)
        if "hlc_k.weight" in weights:
            k = combine_heads(weights["hlc_k.weight"], k)
        if "hlc_v.weight" in weights:
            v = combine_heads(weights["hlc_v.weight"], v)

    if not len(k) == len(v) == num_kv_heads:
        raise ValueError(f"{len(k)} keys, {len(v)} values where attention needs {num_kv_heads}")

    # The norm is not linear, so it acts on composite keys; before RoPE.
    if setting(config, "qk_norm"):
        q = [rms_norm(head, weights["q_norm.weight"], eps=eps) for head in q]
        if setting(config, "hlc_form") == "latent":
            # The heads have the gains in them: they are divided by the size of the keys without.
            gains = weights["k_norm.weight"]
            k = [head / torch.sqrt(((head / gains) ** 2).mean(dim=-1, keepdim=True) + eps) for head in k]
        else:
            k = [rms_norm(head, weights["k_norm.weight"], eps=eps) for head in k]

    q = [rotate(head, positions, config=config) for head in q]
    k = [rotate(head, positions, config=config) for head in k]

    outputs = []
    if variant == "differential":
        # Eq. 4-6 with pairs (2i, 2i + 1) counted from 0; query pair i uses key/value pair i // (H // h).
        lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)  # (layer - 1) where layers count from 1
        lambda_1 = torch.exp((weights["lambda_q1"] * weights["lambda_k1"]).sum())
        lambda_2 = torch.exp((weights["lambda_q2"] * weights["lambda_k2"]).sum())
        for i in range(num_heads // 2):
            pair = i // group_size
            positive = causal_softmax(scores(q[2 * i], k[2 * pair]))
            negative = causal_softmax(scores(q[2 * i + 1], k[2 * pair + 1]))
            value = torch.cat([v[2 * pair], v[2 * pair + 1]], dim=-1)
            outputs.append((positive - (lambda_1 - lambda_2 + lambda_init) * negative) @ value)
    elif variant == "talking_heads":
        # Eq. 7-9: L_j = sum_i logits_mix[i, j] S_i; A_j = softmax(masked L_j);
        # B_j = sum_i weights_mix[i, j] A_i; C_j = B_j V_G(j).
        logits = [scores(q[i], k[i // group_size]) for i in range(num_heads)]
        mixed = combine_heads(weights["logits_mix.weight"], logits)
        probabilities = combine_heads(weights["weights_mix.weight"], [causal_softmax(head) for head in mixed])
        outputs = [probabilities[j] @ v[j // group_size] for j in range(num_heads)]
    else:
        for i in range(num_heads):
            outputs.append(causal_softmax(scores(q[i], k[i // group_size])) @ v[i // group_size])

    # Eq. 12: every head by itself is normalised over its features, then Concat and W_O.
    if variant in ("plain_norm", "mea", "differential"):
        weight = weights.get("head_norm.weight")
        outputs = [rms_norm(head, weight, eps=setting(config, "head_norm_eps")) for head in outputs]

    if variant == "differential":
        outputs = [(1.0 - lambda_init) * head for head in outputs]

    if variant == "gated":
        # arXiv 2505.06708, G1: Y' = Y * sigmoid(X W); head i has rows i d ... (i + 1) d of W, or row i alone.
        gates = 1 / (1 + torch.exp(-(x @ weights["gate_proj.weight"].T)))
        size = gates.shape[-1] // num_heads
        outputs = [head * gates[..., i * size : (i + 1) * size] for i, head in enumerate(outputs)]

    return torch.cat(outputs, dim=-1) @ weights["o_proj.weight"].T


def swiglu(x: Tensor, *, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x W_gate^T) * x W_up^T) W_down^T."""
    gated = x @ gate.T
    return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T


def mixture_of_experts(x: Tensor, *, weights: dict[str, Tensor], config: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Qwen3-MoE's feed-forward, token by token: softmax over all experts, the k likeliest, their weighted sum.

    Returns:
        (batch, seq, hidden), the logits (batch, seq, experts) and the chosen ids (batch, seq, k).
    """
    width, k = config["moe_intermediate_size"], config["num_experts_per_tok"]
    logits = x @ weights["gate.weight"].T
    batch, seq, _ = logits.shape
    outputs, choices = [], []
    for i in range(batch):
        for t in range(seq):
            exponentials = torch.exp(logits[i, t] - logits[i, t].max())
            probabilities = exponentials / exponentials.sum()
            chosen = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert].item())[:k]
            total = sum(probabilities[expert] for expert in chosen) if setting(config, "norm_topk_prob") else 1.0
            output = 0
            for expert in chosen:
                gate, up = weights["experts.gate_up_proj"][expert].split(width)
                down = weights["experts.down_proj"][expert]
                output = output + probabilities[expert] / total * swiglu(x[i, t], gate=gate, up=up, down=down)

            outputs.append(output)
            choices.append(torch.tensor(chosen))

    return torch.stack(outputs).view_as(x), logits, torch.stack(choices).view(batch, seq, k)


def router_losses(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(sequences,) of a layer: E/k sum_e f_e P_e of each sequence, and its mean of logsumexp(logits)^2.

    f_e is the part of the sequence's tokens that chose expert e, P_e the mean of its probability.
    """
    experts, k = logits.shape[-1], chosen.shape[-1]
    probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    balance, z = [], []
    for i in range(len(logits)):
        terms = [(chosen[i] == e).any(-1).double().mean() * probabilities[i, :, e].mean() for e in range(experts)]
        balance.append(experts / k * sum(terms))
        z.append((torch.log(torch.exp(logits[i]).sum(-1)) ** 2).mean())

    return torch.stack(balance), torch.stack(z)


def reference_logits(
    *, tensors: dict[str, Tensor], config: dict, input_ids: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Logits (batch, seq, vocab) in fp64. `tensors` must be exactly what `tensor_shapes` lists.

    `position_ids`, (seq,) or (batch, seq), turn RoPE only; the causal mask goes by index in the sequence.
    """
    tied = setting(config, "tie_word_embeddings")
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if not (tied and n == "lm_head.weight")}
    if shapes != (expected := tensor_shapes(config)):
        raise ValueError(f"not as the contract says: {set(shapes.items()) ^ set(expected.items())}")

    w = {name: tensor.double() for name, tensor in tensors.items()}
    positions = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
    positions = positions.to(input_ids.device).double().expand(input_ids.shape)
    eps = setting(config, "rms_norm_eps")

    x = w["model.embed_tokens.weight"][input_ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        prefix = block + "self_attn."
        weights = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        normed = rms_norm(x, w[block + "input_layernorm.weight"], eps=eps)
        x = x + attention(normed, weights=weights, config=config, layer=layer, positions=positions)
        normed = rms_norm(x, w[block + "post_attention_layernorm.weight"], eps=eps)
        if is_routed(config, layer):
            routed = {name.removeprefix(block + "mlp."): w[name] for name in w if name.startswith(block + "mlp.")}
            x = x + mixture_of_experts(normed, weights=routed, config=config)[0]
        else:
            gate, up, down = (w[f"{block}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            x = x + swiglu(normed, gate=gate, up=up, down=down)

    x = rms_norm(x, w["model.norm.weight"], eps=eps)
    return x @ (w["model.embed_tokens.weight"] if tied else w["lm_head.weight"]).T


def reference_loss(*, tensors: dict[str, Tensor], config: dict, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets (already shifted; -100 is left out) of log sum_v exp(z_v) - z_target."""
    is_counted = targets != -100
    logits = reference_logits(tensors=tensors, config=config, input_ids=input_ids)[is_counted]
    target_ids = targets[is_counted]
    largest = logits.detach().amax(dim=-1)
    log_sum_exp = largest + torch.log(torch.exp(logits - largest[:, None]).sum(dim=-1))
    return (log_sum_exp - logits.gather(-1, target_ids[:, None])[:, 0]).mean()
