"""Both clients of minitron_client behind one set of blocking calls, so that one test holds for both."""

import asyncio

import minitron_client
from minitron_client import ClientOptions


class Blocking:
    """An AsyncClient with the blocking client's calls, so that one set of tests holds for both."""

    _loop = asyncio.new_event_loop()  # one for all: grpc.aio has one poller for the process

    def __init__(self, target, options=ClientOptions()):
        self._client = self.run(self._open(target, options))

    async def _open(self, target, options):
        return minitron_client.AsyncClient(target, options)

    def run(self, awaitable):
        return self._loop.run_until_complete(awaitable)

    def __getattr__(self, name):
        call = getattr(self._client, name)
        return lambda *args, **kwargs: self.run(call(*args, **kwargs))

    def stream(self, *args, **kwargs):
        return self._start(self._client.stream, args, kwargs)

    def watch_health(self, *args, **kwargs):
        return self._start(self._client.watch_health, args, kwargs)

    def _start(self, call, args, kwargs):
        async def start():
            return call(*args, **kwargs)
        return BlockingStream(self.run, self.run(start()))

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.run(self._client.close())


class BlockingStream:

    def __init__(self, run, stream):
        self.run, self._stream = run, stream

    def __iter__(self):
        return self

    def __next__(self):
        async def step():
            return await self._stream.__anext__()
        try:
            return self.run(step())
        except StopAsyncIteration:
            raise StopIteration from None

    def cancel(self):
        async def step():
            self._stream.cancel()
        self.run(step())

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.run(self._stream.__aexit__())


def texts_of(events):
    texts = {}
    for event in events:
        if event.HasField("delta"):
            texts[event.delta.index] = texts.get(event.delta.index, "") + event.delta.text
    return [text for _, text in sorted(texts.items())]
