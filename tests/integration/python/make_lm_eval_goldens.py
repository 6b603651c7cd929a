#!/usr/bin/env python3
"""Makes lm_eval_tasks/goldens.json: log-likelihoods of texts as Hugging Face's NemotronForCausalLM computes them in fp32.

Needs what tests/engine/goldens/make_goldens.py needs (deploy/install-deps.sh golden, and transformers 4.46.3, safetensors,
sentencepiece and numpy below 2 from PyPI). From the repository's root:
  python3 tests/integration/python/make_lm_eval_goldens.py
"""

import json
import pathlib
import sys

import sentencepiece
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
TASKS = HERE / "lm_eval_tasks"
sys.path.insert(0, str(HERE.parents[1] / "engine" / "goldens"))
import make_goldens  # noqa: E402

# Beside the task's documents: several bytes per character, byte tokens, an empty context, a long context.
PAIRS = [
    ("Grüße aus 東京", " 🙂 und Tschüß"),
    ("", "It was the best of times"),
    ("He said that he would come back in the morning, but the night was long and the road was dark. " * 6, "He said"),
]
GREEDY = ["Once upon a time", "In the beginning", "The"]  # with what the model likes best after them
ROLLING = [
    "It was the best of times, it was the worst of times, it was the age of wisdom. ",
    "Grüße, 你好 🙂 — naïve café",
]


def loglikelihood(model, context_ids, target_ids):
    """Sum of the target's log-probabilities, in double over fp32 logits, and whether each is the most likely token."""
    tokens = context_ids + target_ids
    rows = make_goldens.logits_of(model, tokens)[len(context_ids) - 1:-1]
    logprobs = torch.log_softmax(rows.double(), dim=-1)
    total = sum(float(logprobs[i, token]) for i, token in enumerate(target_ids))
    return {"logprob": total, "is_greedy": rows.argmax(dim=-1).tolist() == target_ids}


def greedy_text(model, tokenizer, context):
    tokens = tokenizer.encode(context)
    for _ in range(5):
        tokens.append(int(make_goldens.logits_of(model, tokens)[-1].argmax()))
    return tokenizer.decode(tokens)[len(context):]


def main():
    torch.set_num_threads(1)
    make_goldens.accept_layer_norm_bias_argument()
    model, config = make_goldens.load(make_goldens.TINY)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(make_goldens.TINY / "tokenizer.model"))
    encode = tokenizer.encode
    documents = [json.loads(line) for line in (TASKS / "tiny_choice.jsonl").read_text().splitlines()]
    pairs = [(document["question"], choice) for document in documents for choice in document["choices"]]
    goldens = {"transformers": transformers.__version__, "torch": torch.__version__, "pairs": [], "rolling": []}
    for context, target in pairs + PAIRS + [(text, greedy_text(model, tokenizer, text)) for text in GREEDY]:
        head = context.rstrip()  # as the harness has it: spaces between the two belong to the target
        context_ids = encode(head) or [config.bos_token_id]
        target_ids = encode(context + target)[len(context_ids):] if context else encode(target)
        goldens["pairs"].append({"context": context, "target": target, "context_ids": context_ids,
                                 "target_ids": target_ids, **loglikelihood(model, context_ids, target_ids)})
    for text in ROLLING:
        tokens = encode(text)
        goldens["rolling"].append({"text": text, "target_ids": tokens,
                                   **loglikelihood(model, [config.bos_token_id], tokens)})
    lines = ["{"]
    for key in ("transformers", "torch"):
        lines.append(f' "{key}": {json.dumps(goldens[key])},')
    for key in ("pairs", "rolling"):
        entries = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in goldens[key])
        lines.append(f' "{key}": [\n  {entries}]' + ("," if key == "pairs" else ""))
    (TASKS / "goldens.json").write_text("\n".join([*lines, "}"]) + "\n")


if __name__ == "__main__":
    main()
