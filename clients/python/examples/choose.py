"""Ranks continuations by their log-probability per token.  Usage: choose.py TARGET CONTEXT CONTINUATION..."""

import sys

from minitron_client import Client


def main(target: str, context: str, *continuations: str) -> None:
    with Client(target) as client:
        ranked = []
        for continuation in continuations:
            answer = client.score(context, continuation)
            ranked.append((answer.total_logprob / len(answer.positions), continuation))
        for logprob, continuation in sorted(ranked, reverse=True):
            print(f"{logprob:8.3f}  {continuation}")


if __name__ == "__main__":
    main(*sys.argv[1:])
