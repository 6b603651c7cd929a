"""What an operator asks and does.  Usage: operate.py TARGET status | cancel REQUEST_ID... | drain"""

import sys

from minitron_client import Client


def main(target: str, command: str, *request_ids: str) -> None:
    with Client(target) as client:
        if command == "status":
            info, load = client.server_info(), client.load()
            print(f"{info.model} on {info.backend}, version {info.version}, {client.health().name}")
            print(f"running {load.running_sequences} of {info.max_running_sequences}, "
                  f"waiting {load.waiting_sequences} of {info.max_queued_requests}, "
                  f"cache blocks {load.kv_blocks_used} of {load.kv_blocks}")
        elif command == "cancel":
            print(f"{client.cancel(request_ids)} of {len(request_ids)} were live")
        elif command == "drain":
            client.drain()
            print("draining")
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
