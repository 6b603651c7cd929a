#!/usr/bin/env python3
"""Compares logprobs of our engine with another implementation's on the same weights: transformers' NemotronForCausalLM
in fp32 where it is installed, else nemotron_torch.py in fp32.

    layers_check.py MODEL_DIR TOKENS_FILE SCORES_JSON      prints one JSON line; fails past the bounds

The bounds are what bf16 activations cost (a mean of 0.03 nat, 0.12 at the 99th percentile); a maximum says nothing.
"""
import json
import pathlib
import sys

import torch

MEAN_NATS, P99_NATS = 0.03, 0.12


def load_transformers(folder, device):
    """transformers' model with the file's tensors, or None where it is not installed."""
    try:
        from transformers import NemotronConfig, NemotronForCausalLM
    except ImportError:
        return None
    from nemotron_torch import load_tensors
    config = NemotronConfig(**json.loads((pathlib.Path(folder) / "config.json").read_text()))
    model = NemotronForCausalLM(config)
    model.load_state_dict(load_tensors(pathlib.Path(folder) / "model.safetensors", "cpu"), strict=False)
    return model.float().to(device).eval()


def main():
    folder, tokens_file, scores_file = sys.argv[1:4]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [[int(word) for word in line.split()] for line in pathlib.Path(tokens_file).read_text().splitlines()]
    scores = json.loads(pathlib.Path(scores_file).read_text())
    model, against = load_transformers(folder, device), "transformers, fp32"
    if model is None:
        from nemotron_torch import Nemotron
        reference, against = Nemotron(folder, device, torch.float32), "torch, fp32"
        model = lambda tokens: reference.forward(tokens, torch.arange(tokens.shape[1], device=device)[None])
    differences, same, count = [], 0, 0
    with torch.no_grad():
        for row, score in zip(rows, scores, strict=True):
            tokens = torch.tensor([row], device=device)
            logits = model(tokens)
            logits = (logits.logits if hasattr(logits, "logits") else logits)[0, :-1].float()
            expected = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])[:, 0].cpu()
            differences.append((torch.tensor(score["logprobs"]) - expected).abs())
            same += int((logits.argmax(-1).cpu() == torch.tensor(score["top"])).sum())
            count += len(row) - 1
    differences = torch.cat(differences)
    mean, p99 = float(differences.mean()), float(differences.quantile(0.99))
    print(json.dumps({"kind": "layers", "against": against, "mean_nats": mean, "p99_nats": p99,
                      "same_top": same / count, "positions": count}))
    if not (mean <= MEAN_NATS and p99 <= P99_NATS):
        print(f"layers_check: {mean:.4f} nat mean, {p99:.4f} at the 99th percentile: past {MEAN_NATS} or {P99_NATS}",
              file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
