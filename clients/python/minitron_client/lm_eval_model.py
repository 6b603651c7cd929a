"""The model `minitron` of lm-evaluation-harness, over Score and Generate. Needs the extra: pip install .[lm-eval]

Import this module to register it, or run the harness through it:
  python -m minitron_client.lm_eval_model --model minitron --model_args target=localhost:50051 --tasks ...
"""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from minitron_client.client import Client
from minitron_client.options import ClientOptions, Tls

_PASSED_ON = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")


@register_model("minitron")
class MinitronLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Texts become tokens as for the harness's own `hf` model, but on the server.

    target, token, timeout: of the client; timeout in seconds per call.  ca_file: PEM file; turns TLS on.
    max_length: tokens of context and continuation; default and upper bound: the model's.  max_gen_toks: default length of
    generations.  num_concurrent: calls at a time.  prefix_token_id: stands before texts without a context; default BOS.
    batch_size, max_batch_size, device: given by the harness; the server batches by itself, so they change nothing.
    """

    def __init__(self, target: str = "localhost:50051", *, token: str | None = None, ca_file: str | None = None,
                 timeout: float | None = None, max_length: int | None = None, max_gen_toks: int = 256,
                 num_concurrent: int = 16, prefix_token_id: int | None = None, batch_size: Any = None,
                 max_batch_size: Any = None, device: Any = None) -> None:
        super().__init__()
        tls = None if ca_file is None else Tls(root_certificates=pathlib.Path(ca_file).read_bytes())
        self._client = Client(target, ClientOptions(tls=tls, token=token, timeout=timeout))
        model = self._client.models()[0]
        if max_length is not None and not 2 <= max_length <= model.max_context_tokens:
            raise ValueError(f"max_length: {max_length} is not in [2, {model.max_context_tokens}]")
        self.max_length = max_length or model.max_context_tokens
        self.max_gen_toks = max_gen_toks
        self._num_concurrent = num_concurrent
        self._eot = model.eos_token_ids[0] if model.eos_token_ids else model.bos_token_id
        self._prefix = model.bos_token_id if prefix_token_id is None else prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return list(self._client.tokenize(string, add_bos=add_special_tokens).token_ids)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Whole texts, in windows of max_length tokens, each after the last token of the one before."""
        del disable_tqdm
        encoded = self._each(lambda request: self.tok_encode(request.args[0], add_special_tokens=False), requests)
        windows = [[utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(
            tokens, self._prefix, self.max_length - 1, 1)] for tokens in encoded]
        scores = iter(self._each(lambda pair: self._score(*pair)[0], [pair for text in windows for pair in text]))
        return [sum(next(scores) for _ in text) for text in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts without their stop strings. Greedy, unless do_sample or a temperature is given."""
        del disable_tqdm
        return self._each(lambda request: self._generate(*request.args), requests)

    def _loglikelihood_tokens(self, requests: list[Any], **unused: Any) -> list[tuple[float, bool]]:
        return self._each(lambda request: self._score(request[1], request[2]), requests)

    def _score(self, context: list[int], target: list[int]) -> tuple[float, bool]:
        room = self.max_length - len(target)
        if room < 1:
            raise ValueError(f"a continuation of {len(target)} tokens and a context do not fit {self.max_length} tokens")
        answer = self._client.score(context[-room:], target)
        return answer.total_logprob, answer.is_greedy

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        lengths = [settings.pop(name) for name in _LENGTHS if name in settings]
        max_tokens = int(lengths[0]) if lengths else self.max_gen_toks
        if max_tokens >= self.max_length:
            raise ValueError(f"max_gen_toks: {max_tokens} leaves no room for a prompt in {self.max_length} tokens")
        sampled = settings.pop("do_sample", settings.get("temperature", 0) > 0)
        arguments = {name: settings.pop(name) for name in _PASSED_ON if name in settings}
        if settings:
            raise ValueError(f"generation settings that minitron does not have: {', '.join(sorted(settings))}")
        arguments["temperature"] = arguments.get("temperature", 1.0) if sampled else 0.0
        answer = self._client.generate(context, max_tokens=max_tokens, stop=until,
                                       truncate_prompt_tokens=self.max_length - max_tokens, **arguments)
        return answer.sequences[0].text

    def _each(self, call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(self._num_concurrent) as pool:
            return list(pool.map(call, items))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
