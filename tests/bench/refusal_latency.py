#!/usr/bin/env python3
"""Measures, in real time and through gRPC, how long a refusal takes while the server is full.

    refusal_latency.py [--server build/release/bin/minitron-server] [--calls 1600] [--clients 2 8 16]

Starts the server with the shipped model, one running sequence and a full queue, then calls it from many clients at
once, each as fast as it is answered: far more than the server could serve. The times include this client (Python, on
the same machine). Prints a Markdown table.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
METHOD = "/minitron.v1.GenerationService/GenerateStream"
QUEUE = 8


def load_messages(folder):
    subprocess.run(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={folder}",
                    str(ROOT / "proto/minitron/v1/generation.proto")], check=True)
    sys.path.insert(0, folder)
    from minitron.v1 import generation_pb2
    return generation_pb2


def start_server(binary, folder):
    port_file = pathlib.Path(folder) / "ports"
    process = subprocess.Popen([binary, "--host=127.0.0.1", "--port=0", "--metrics-port=0", f"--port-file={port_file}",
                                "--max-num-sequences=1", f"--max-queued-requests={QUEUE}", "--threads=1"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if port_file.exists() and port_file.read_text().strip():
            return process, port_file.read_text()
        if process.poll() is not None:
            sys.exit("refusal_latency: the server did not start")
        time.sleep(0.05)
    process.terminate()
    sys.exit("refusal_latency: the server was not ready in 30 s")


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


def hammer(stub, address, payload, num_calls, num_clients):
    """A table row: so many calls from so many clients at once."""
    refused, lock = [], threading.Lock()

    def call_often(count):
        mine = []
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(10)
            for _ in range(count):
                begin = time.monotonic()
                call = stub(channel)(payload, timeout=10)
                try:
                    next(call)
                    call.cancel()  # a place was free
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        raise
                    mine.append(time.monotonic() - begin)
        with lock:
            refused.extend(mine)

    begin = time.monotonic()
    clients = [threading.Thread(target=call_often, args=(num_calls // num_clients,)) for _ in range(num_clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.monotonic() - begin
    return (f"| {num_clients} | {num_calls / seconds:.0f} | {len(refused)} of {num_calls} | "
            f"{1000 * quantile(refused, 0.5):.2f} | {1000 * quantile(refused, 0.99):.2f} | {1000 * max(refused):.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=str(ROOT / "build/release/bin/minitron-server"))
    parser.add_argument("--calls", type=int, default=1600)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 8, 16])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        messages = load_messages(folder)
        process, ports = start_server(arguments.server, folder)
        try:
            address = "127.0.0.1:" + "".join(c if c.isdigit() else " " for c in ports).split()[0]
            request = messages.GenerateStreamRequest()
            request.task.text = "To be or not to be, that is the question. " * 20
            request.task.stopping.ignore_eos = True
            request.task.stopping.max_tokens = 256
            payload = request.SerializeToString()

            def stub(channel):
                return channel.unary_stream(METHOD, request_serializer=lambda b: b, response_deserializer=lambda b: b)

            # Twice as many background streams as there are places, each begun again when it ends: the queue stays full.
            stop = threading.Event()

            def keep_full():
                with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                    while not stop.is_set():
                        try:
                            for _ in stub(channel)(payload, timeout=60):
                                if stop.is_set():
                                    break
                        except grpc.RpcError:
                            stop.wait(0.02)

            fillers = [threading.Thread(target=keep_full, daemon=True) for _ in range(2 * QUEUE)]
            for thread in fillers:
                thread.start()
            time.sleep(1.0)

            rows = [hammer(stub, address, payload, arguments.calls, clients) for clients in arguments.clients]
            stop.set()
        finally:
            process.terminate()
            process.wait()
    print("| clients | calls/s | refused | p50 to refuse, ms | p99, ms | worst, ms |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
