"""Completes every line of the standard input, 32 at a time, in the order of the input.  Usage: many.py [TARGET]"""

import asyncio
import sys

from minitron_client import AsyncClient, MinitronError


async def main(target: str = "localhost:50051") -> None:
    places = asyncio.Semaphore(32)
    async with AsyncClient(target) as client:

        async def complete(prompt: str) -> str:
            async with places:
                try:
                    answer = await client.generate(prompt, max_tokens=16, temperature=0, stop="\n", timeout=60)
                except MinitronError as error:
                    return f"! {error}"
                return prompt + answer.sequences[0].text

        for line in await asyncio.gather(*(complete(line.rstrip("\n")) for line in sys.stdin)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
