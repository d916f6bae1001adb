"""Small causal language models of transformers, with random weights, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY = 97
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
LLAMA = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
GEMMA = {**LLAMA, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
Config = tuple[str, dict[str, Any]]

FUSED: dict[str, Config] = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "MistralForCausalLM": ("MistralConfig", {**LLAMA, "num_key_value_heads": 1}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("Qwen3Config", {**LLAMA, "head_dim": 8}),
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "GPTJForCausalLM": ("GPTJConfig", {**GPT, "rotary_dim": 4}),  # its head has a bias
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", LLAMA),
    "OPTForCausalLM": ("OPTConfig", OPT),
    "PhiForCausalLM": ("PhiConfig", LLAMA),
    "Phi3ForCausalLM": ("Phi3Config", LLAMA),
    "BloomForCausalLM": ("BloomConfig", BLOOM),
    "FalconForCausalLM": ("FalconConfig", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "GemmaForCausalLM": ("GemmaConfig", GEMMA),
    "OlmoForCausalLM": ("OlmoConfig", LLAMA),
    "StableLmForCausalLM": ("StableLmConfig", LLAMA),
    "MambaForCausalLM": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**EXPERTS, "output_router_logits": True, "experts_implementation": "eager"},
    ),  # adds the routers' loss
    "Gemma2ForCausalLM": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": None}),
}


def make(name: str = "LlamaForCausalLM", config: Config | None = None, **options: Any) -> Any:
    import transformers

    kind, own = config or FUSED[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, kind)(**COMMON, **own, **options)).train()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    labels = tokens.clone()
    labels[1, 5:] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model: Any, **keywords: Any) -> list[Tensor]:
    """The loss, and the gradients of all parameters."""
    model.zero_grad()
    loss = model(**keywords)["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def exact_loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def with_own_loss(model: Any) -> None:
    model.loss_function = exact_loss
