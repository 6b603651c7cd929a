"""Arguments of Python to messages of minitron.v1. An argument that is None is not sent: the server's default holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from minitron.v1 import generation_pb2 as pb

Text = str | Sequence[int]  # text, or token ids used as they are


class GenerateArguments(TypedDict, total=False):
    """Keyword arguments of generate and stream; ranges and meanings are those of GenerationTask."""

    model: str | None
    request_id: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    token_ids: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    priority: int | None
    cache_salt: str | None
    truncate_prompt_tokens: int | None
    add_bos: bool | None
    parse_special: bool | None
    first_token_timeout: float | None
    regex: str | None
    json_schema: str | Mapping[str, Any] | None
    choices: Sequence[str] | None
    json_object: bool | None
    grammar: str | None


class ScoreArguments(TypedDict, total=False):
    """Keyword arguments of score."""

    model: str
    request_id: str
    top_logprobs: int
    add_bos: bool | None
    parse_special: bool | None
    priority: int
    cache_salt: str


class TokenizeArguments(TypedDict, total=False):
    """Keyword arguments of tokenize."""

    model: str
    add_bos: bool | None
    parse_special: bool | None


_CONSTRAINTS = ("regex", "json_schema", "choices", "json_object", "grammar")

# Where each argument goes: sub-message ("" for the task itself) and field.
_FIELDS = {
    "model": ("", "model"), "request_id": ("", "request_id"), "priority": ("", "priority"),
    "cache_salt": ("", "cache_salt"), "truncate_prompt_tokens": ("", "truncate_prompt_tokens"),
    **{name: ("sampling", name) for name in (
        "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias")},
    "n": ("sampling", "num_sequences"),
    **{name: ("stopping", name) for name in ("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos")},
    "stop": ("stopping", "stop_sequences"), "include_stop": ("stopping", "include_stop_sequence"),
    **{name: ("output", name) for name in ("token_ids", "logprobs", "prompt_logprobs", "skip_special_tokens")},
    **{name: ("constraint", name) for name in _CONSTRAINTS},
    "add_bos": ("tokenize_options", "add_bos"), "parse_special": ("tokenize_options", "parse_special"),
}


def generation_task(prompt: Text, arguments: GenerateArguments) -> pb.GenerationTask:
    """Raises TypeError for an unknown argument or one of a wrong type, ValueError for a value its field cannot hold."""
    task = pb.GenerationTask()
    if isinstance(prompt, str):
        task.text = prompt
    else:
        task.token_ids.SetInParent()
        task.token_ids.ids.extend(prompt)
    if sum(arguments.get(name) is not None for name in _CONSTRAINTS) > 1:
        raise TypeError("only one of regex, json_schema, choices, json_object and grammar can be given")
    for name, value in arguments.items():
        if name == "first_token_timeout":
            if value is not None:
                task.first_token_timeout.FromNanoseconds(round(value * 1e9))  # type: ignore[operator]
        elif name not in _FIELDS:
            raise TypeError(f"unknown argument: {name}")
        elif value is not None:
            part, field = _FIELDS[name]
            _set(getattr(task, part) if part else task, field, value)
    return task


def _set(message: Any, field: str, value: Any) -> None:
    if field == "stop_sequences":
        message.stop_sequences.extend([value] if isinstance(value, str) else value)
    elif field == "stop_token_ids":
        message.stop_token_ids.extend(value)
    elif field == "logit_bias":
        message.logit_bias.update(value)
    elif field == "choices":
        message.choices.SetInParent()
        message.choices.options.extend(value)
    elif field == "json_schema" and not isinstance(value, str):
        message.json_schema = json.dumps(value)
    else:
        setattr(message, field, value)


def score_request(context: Text, target: Text, *, add_bos: bool | None = None, parse_special: bool | None = None,
                  **arguments: Any) -> pb.ScoreRequest:
    """`arguments`: the rest of ScoreArguments."""
    request = pb.ScoreRequest(tokenize_options=_tokenize_options(add_bos, parse_special), **arguments)
    for name, value in (("context", context), ("target", target)):
        if isinstance(value, str):
            setattr(request, f"{name}_text", value)
        else:
            getattr(request, f"{name}_token_ids").SetInParent()
            getattr(request, f"{name}_token_ids").ids.extend(value)
    return request


def tokenize_request(text: str, *, model: str = "", add_bos: bool | None = None,
                     parse_special: bool | None = None) -> pb.TokenizeRequest:
    return pb.TokenizeRequest(model=model, text=text, options=_tokenize_options(add_bos, parse_special))


def detokenize_request(token_ids: Sequence[int], *, model: str = "",
                       skip_special_tokens: bool | None = None) -> pb.DetokenizeRequest:
    request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
    if skip_special_tokens is not None:
        request.skip_special_tokens = skip_special_tokens
    return request


def _tokenize_options(add_bos: bool | None, parse_special: bool | None) -> pb.TokenizeOptions:
    options = pb.TokenizeOptions()
    if add_bos is not None:
        options.add_bos = add_bos
    if parse_special is not None:
        options.parse_special = parse_special
    return options
