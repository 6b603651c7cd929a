"""Prints a completion as it is made, then why it ended.  Usage: stream.py [TARGET [PROMPT]]"""

import sys

from minitron.v1.generation_pb2 import FinishReason
from minitron_client import Client


def main(target: str = "localhost:50051", prompt: str = "Once upon a time") -> None:
    with Client(target) as client, client.stream(prompt, max_tokens=60, temperature=0.8, seed=7, stop="\n\n") as stream:
        print(prompt, end="")
        for event in stream:
            if event.HasField("delta"):
                print(event.delta.text, end="", flush=True)
            elif event.HasField("finished"):
                usage = event.finished.usage
                print(f"\n[{usage.prompt_tokens} + {usage.completion_tokens} tokens, "
                      f"{FinishReason.Name(event.finished.reason)}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
