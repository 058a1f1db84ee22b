"""Hugging Face's side of `benchmarks.peers`; runs in its own environment. Prints one line of JSON.

Mixtral of Transformers in PyTorch, experts by `grouped_mm`, attention by SDPA, loss with the router's balancing loss,
and PyTorch's fused AdamW, which is what the Trainer of Transformers uses.
"""

import json
import sys
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM


def main() -> None:
    """Times the steps."""
    size = json.loads(sys.argv[1])
    torch.set_num_threads(size["threads"])
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["d_model"],
        intermediate_size=size["d_ff"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_kv_heads"],
        head_dim=size["head_dim"],
        num_local_experts=size["num_experts"],
        num_experts_per_tok=size["experts_per_token"],
        max_position_embeddings=size["seq_len"],
        tie_word_embeddings=False,
        output_router_logits=True,
        router_aux_loss_coef=size["aux_loss_coefficient"],
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, size["vocab_size"], (size["batch_size"], size["seq_len"]))
    seconds, losses = [], []
    for _ in range(size["steps"]):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "first_loss": losses[0], "parameters": parameters}))


if __name__ == "__main__":
    main()
