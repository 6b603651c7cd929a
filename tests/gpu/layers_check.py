#!/usr/bin/env python3
"""Compares logprobs of our engine with another implementation's on the same weights: transformers' NemotronForCausalLM
in fp32 where it is installed, else nemotron_torch.py in fp32.

    layers_check.py MODEL_DIR TOKENS_FILE SCORES_JSON      prints one JSON line; fails past the bounds

The bounds are what bf16 activations cost: a mean of 0.03 nat, 0.12 at the 99th percentile (a maximum says nothing), and
0.2 nat that our most likely token may be less likely to the other than its own. What the other loses by itself in bf16 is
printed beside, as a yardstick.
"""
import json
import pathlib
import sys

import torch

MEAN_NATS, P99_NATS, REGRET_NATS = 0.03, 0.12, 0.2


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


def make_reference(folder, device):
    """(dtype -> function from tokens [1, T] to logits [T, V] in fp32, what it is)."""
    model = load_transformers(folder, device)
    if model is not None:
        return (lambda dtype: lambda tokens: model.to(dtype)(tokens).logits[0].float()), "transformers"
    from nemotron_torch import Nemotron

    def of(dtype):
        network = Nemotron(folder, device, dtype)
        return lambda tokens: network.forward(tokens, torch.arange(tokens.shape[1], device=device)[None])[0].float()
    return of, "torch"


def logprobs_of(logits, rows, device):
    """For each line the log-probabilities [T - 1, V] of what comes after each of its tokens but the last."""
    return [torch.log_softmax(logits(torch.tensor([row], device=device))[:-1], dim=-1).cpu() for row in rows]


def chosen(logprobs, row):
    return logprobs.gather(1, torch.tensor(row[1:])[:, None])[:, 0]


def spread(pairs):
    """Mean and 99th percentile of the differences of pairs of logprobs."""
    differences = torch.cat([(ours - theirs).abs() for ours, theirs in pairs])
    return float(differences.mean()), float(differences.quantile(0.99))


def main():
    folder, tokens_file, scores_file = sys.argv[1:4]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [[int(word) for word in line.split()] for line in pathlib.Path(tokens_file).read_text().splitlines()]
    scores = json.loads(pathlib.Path(scores_file).read_text())
    reference, what = make_reference(folder, device)
    with torch.no_grad():
        expected = logprobs_of(reference(torch.float32), rows, device)
        theirs = [chosen(logprobs, row) for logprobs, row in zip(expected, rows, strict=True)]
        in_bf16 = [chosen(logprobs, row) for logprobs, row in
                   zip(logprobs_of(reference(torch.bfloat16), rows, device), rows, strict=True)]
    mean, p99 = spread(zip([torch.tensor(score["logprobs"]) for score in scores], theirs, strict=True))
    bf16_mean, bf16_p99 = spread(zip(in_bf16, theirs, strict=True))
    tops = [torch.tensor(score["top"]) for score in scores]
    regret = max(float((logprobs.max(-1).values - logprobs.gather(1, top[:, None])[:, 0]).max())
                 for logprobs, top in zip(expected, tops, strict=True))
    count = sum(len(top) for top in tops)
    same = sum(int((logprobs.argmax(-1) == top).sum()) for logprobs, top in zip(expected, tops, strict=True))
    print(json.dumps({"kind": "layers", "against": f"{what}, fp32", "mean_nats": mean, "p99_nats": p99,
                      "regret_nats": regret, "same_top": same / count, "positions": count,
                      "other_in_bf16": {"mean_nats": bf16_mean, "p99_nats": bf16_p99}}))
    if not (mean <= MEAN_NATS and p99 <= P99_NATS and regret <= REGRET_NATS):
        print(f"layers_check: {mean:.4f} nat mean, {p99:.4f} at the 99th percentile, regret {regret:.4f}: past {MEAN_NATS}, "
              f"{P99_NATS} or {REGRET_NATS}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
