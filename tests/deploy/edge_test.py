#!/usr/bin/env python3
"""The shipped proxy configuration in front of real servers: what reaches them, what does not, and rolling restarts."""
import os
import pathlib
import re
import ssl
import struct
import sys
import tempfile
import threading
import time
import unittest

import grpc
import yaml

sys.path.insert(0, os.path.dirname(__file__))
from h2raw import (CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PRIORITY, RST_STREAM, SETTINGS,
                   WINDOW_UPDATE, Connection, call_headers, frame, literal, message)
from harness import Server, ends_complete, generate_request, health, stream, wait_for
from proxies import EDGE, NAME, Envoy, Haproxy, RotatingEnvoy, RotatingHaproxy, free_port, make_certificate

SOAK = bool(os.environ.get("SOAK"))
MIB = 1 << 20
GENERATE = "/minitron.v1.GenerationService/GenerateStream"


def tell(text):
    """For the record of a long run."""
    if SOAK:
        print(text, end=" ... ", file=sys.stderr, flush=True)


def code_of(channel, path, request=b"", metadata=()):
    try:
        list(channel.unary_stream(path)(request, metadata=metadata, timeout=30))
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


class EdgeTest(unittest.TestCase):
    proxy_class = Haproxy
    # gRPC's readings of the proxy's HTTP status. The server alone would do the first two calls.
    refusals = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNKNOWN)

    def setUp(self):
        self.server = Server()
        self.server.__enter__()
        self.addCleanup(self.server.__exit__)
        self.proxy = self.proxy_class(self.server.port)
        self.addCleanup(self.proxy.__exit__)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.proxy.port}")
        self.addCleanup(self.channel.close)
        wait_for("a call through the proxy", lambda: code_of(self.channel, GENERATE, generate_request()) is grpc.StatusCode.OK)
        self.rss = self.server.rss()
        self.calls = self.server.metric("minitron_grpc_requests_total", method="GenerateStream")

    def check_server(self, max_growth):
        growth = self.server.rss() - self.rss
        self.assertLess(growth, max_growth, f"the server behind grew by {growth / MIB:.1f} MiB")
        self.assertEqual(health(self.server.address), 1)

    def test_only_the_services_of_users_get_through(self):
        for path in ("/minitron.v1.AdminService/Drain", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                     "/grpc.channelz.v1.Channelz/GetServers", "/nobody.Knows/It", "/metrics"):
            self.assertIn(code_of(self.channel, path), self.refusals, path)
        self.assertIs(code_of(self.channel, "/minitron.v1.ModelService/ListModels"), grpc.StatusCode.OK)
        self.assertIs(code_of(self.channel, "/grpc.health.v1.Health/Check"), grpc.StatusCode.OK)

    def test_t2_headers_without_end_stay_outside(self):
        filler = b"".join(literal(f"x-{i}", "y" * 200) for i in range(60))
        for acknowledge in (False, True):
            with self.subTest(acknowledge=acknowledge), Connection(self.proxy.port) as connection:
                if acknowledge:
                    connection.send(frame(SETTINGS, 1))
                connection.send(frame(HEADERS, 0, 1, call_headers(GENERATE)))
                ended = connection.flood(frame(CONTINUATION, 0, 1, filler[:12000]) * 8, 20, limit=(1 << 30 if SOAK else 1 << 26))
                self.assertTrue(ended, "the connection is cut")
        self.check_server(MIB)
        self.assertEqual(self.server.metric("minitron_grpc_requests_total", method="GenerateStream"), self.calls)

    def test_padded_integers_stay_outside(self):
        with Connection(self.proxy.port) as connection:
            cpu = self.server.cpu_seconds()
            connection.send(frame(HEADERS, 0, 1, b"\x1f" + b"\x80" * 100))
            connection.flood(frame(CONTINUATION, 0, 1, b"\x80") * 1000, 3, limit=4 << 20)
            self.assertLess(self.server.cpu_seconds() - cpu, 1)
        self.check_server(MIB)

    def test_t3_resets_by_the_thousand_are_stopped_by_their_rate(self):
        # Reset a moment after they were sent, so that they do arrive behind the proxy. A connection that the proxy ends is
        # replaced, at a rate of connections that it allows.
        body = message(generate_request(max_tokens=500))
        goal, batch, sent, connection, start = (1_000_000 if SOAK else 3000), 50, 0, None, time.monotonic()
        while sent < goal:
            try:
                if connection is None:
                    connection, first = Connection(self.proxy.port), 1
                ids = range(first, first + 2 * batch, 2)
                for i in ids:
                    connection.call(i, GENERATE, body)
                time.sleep(0.01)
                connection.send(b"".join(frame(RST_STREAM, 0, i, struct.pack(">I", 8)) for i in ids))
                first += 2 * batch
            except OSError:  # the proxy has had enough
                if connection is not None:
                    connection.socket.close()
                connection = None
                time.sleep(0.03)
            sent += batch
        if connection is not None:
            connection.socket.close()
        wait_for("all to be gone", lambda: self.server.metric("minitron_grpc_streams_active") == 0)
        started = self.server.metric("minitron_grpc_requests_total", method="GenerateStream") - self.calls
        self.assertGreater(started, 20, "the attack is one")
        tell(f"{started:.0f} of {sent} calls came through in {time.monotonic() - start:.0f} s")
        self.assertLess(started, 1500 + 100 * (time.monotonic() - start), f"of {sent} calls, at 100/s and 1,000 at once")
        self.check_server(32 * MIB)

    def test_t4_floods_of_small_frames_stay_outside(self):
        for name, chunk in (("ping", frame(PING, payload=bytes(8)) * 500),
                            ("settings", frame(SETTINGS, payload=struct.pack(">HI", 4, 65535)) * 500),
                            ("priority", frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 1)) * 500),
                            ("window", frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * 500)):
            with self.subTest(name), Connection(self.proxy.port) as connection:
                connection.flood(chunk, 10 if SOAK else 0.5)
                self.check_server(2 * MIB)

    def test_t6_a_broken_binary_header_hurts_nobody(self):
        call = stream(self.channel, generate_request(max_tokens=300))
        first = next(call)
        with Connection(self.proxy.port) as connection:
            connection.call(1, "/grpc.health.v1.Health/Check", message(b""), [("evil-bin", "!!! no base64 !!!")])
            serving = message(b"\x08\x01")
            self.assertEqual(connection.answer(1), serving, "the header is gone, the call is served")
            connection.call(3, "/grpc.health.v1.Health/Check", message(b""))
            self.assertEqual(connection.answer(3), serving, "and so is the next one")
        self.assertTrue(ends_complete([first, *call]))

    def test_tls_for_strangers(self):
        with self.proxy_class(self.server.port, tls=True) as proxy:
            credentials = grpc.ssl_channel_credentials(proxy.certificate)
            options = [("grpc.ssl_target_name_override", NAME)]
            with grpc.secure_channel(f"127.0.0.1:{proxy.port}", credentials, options) as channel:
                wait_for("a call", lambda: code_of(channel, GENERATE, generate_request()) is grpc.StatusCode.OK)


class EnvoyEdgeTest(EdgeTest):
    """The same attacks, the same limits."""

    proxy_class = Envoy
    refusals = (grpc.StatusCode.UNIMPLEMENTED,)  # no route


class RollingRestartTest(unittest.TestCase):
    def test_no_stream_is_truncated_and_none_refused(self):
        ports = [free_port(), free_port()]
        flags = ("--drain-delay=1.2", "--drain-timeout=20")
        servers = [Server(f"--port={port}", *flags).__enter__() for port in ports]
        self.addCleanup(lambda: [s.__exit__() for s in servers])
        with Haproxy(*ports) as proxy:
            stop = threading.Event()
            ended, broken = [], []

            def load():
                with grpc.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
                    while not stop.is_set():
                        try:
                            messages = list(stream(channel, generate_request(max_tokens=400)))
                            (ended if ends_complete(messages) else broken).append(len(messages))
                        except grpc.RpcError as error:
                            broken.append(str(error.code()) + error.details())
                        stop.wait(0.05)

            with grpc.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
                wait_for("a call", lambda: code_of(channel, GENERATE, generate_request()) is grpc.StatusCode.OK)
            threads = [threading.Thread(target=load) for _ in range(3)]
            for thread in threads:
                thread.start()
            restarts = 200 if SOAK else 4
            try:
                for i in range(restarts):
                    which = i % 2
                    self.assertEqual(servers[which].stop(), 0, servers[which].log())
                    servers[which].__exit__()
                    servers[which] = Server(f"--port={ports[which]}", *flags).__enter__()
                    time.sleep(1.2)  # two checks of the proxy: an orchestrator waits for readiness, too
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            self.assertEqual(broken, [])
            self.assertGreater(len(ended), 3 * restarts)
            tell(f"{len(ended)} streams during {restarts} restarts")


def certificate_of(port):
    """What a new connection is shown."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=20)


class CertificateRotationTest(unittest.TestCase):
    proxy_class = RotatingHaproxy
    servers_rotate = True

    def test_no_stream_fails_while_the_edge_and_the_servers_get_new_certificates(self):
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory(prefix="minitron_rotation_")))
        roots = make_certificate(folder, "authority")
        make_certificate(folder, "server", "authority")
        flags = (f"--tls-cert={folder}/server.pem", f"--tls-key={folder}/server.key")
        servers = [self.enterContext(Server(*(flags if self.servers_rotate else ()))) for _ in range(2)]
        proxy = self.enterContext(self.proxy_class(folder, *(server.port for server in servers)))
        options = [("grpc.ssl_target_name_override", NAME), ("grpc.use_local_subchannel_pool", 1)]
        stop = threading.Event()
        ended, broken = [], []

        def connect():
            return grpc.secure_channel(f"127.0.0.1:{proxy.port}", grpc.ssl_channel_credentials(roots), options)

        def load(streams_per_connection):
            while not stop.is_set():
                with connect() as channel:
                    for _ in range(streams_per_connection):
                        try:
                            messages = list(stream(channel, generate_request(max_tokens=400)))
                            (ended if ends_complete(messages) else broken).append(len(messages))
                        except grpc.RpcError as error:
                            broken.append(str(error.code()) + error.details())
                        if stop.wait(0.05):
                            return

        proxy.rotate()  # from its self-signed pair to one of the authority
        wait_for("the first pair", lambda: certificate_of(proxy.port) == (folder / "edge.pem").read_text())
        # Handshakes meet rotations, and so do connections that stay.
        threads = [threading.Thread(target=load, args=(n,)) for n in (1, 1, 1000)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100 if SOAK else 2):
                make_certificate(folder, "server", "authority")
                proxy.rotate()
                new = {proxy.port: (folder / "edge.pem").read_text()}
                if self.servers_rotate:
                    new.update({server.port: (folder / "server.pem").read_text() for server in servers})
                for port, certificate in new.items():
                    wait_for("the new pair", lambda: certificate_of(port) == certificate)
                seen = len(ended) + len(broken)
                wait_for("streams to end meanwhile", lambda: len(ended) + len(broken) > seen + 2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.assertEqual(broken, [])
        tell(f"{len(ended)} streams during 100 rotations")
        for server in servers:
            self.assertEqual(server.metric("minitron_grpc_streams_active"), 0)


class EnvoyCertificateRotationTest(CertificateRotationTest):
    proxy_class = RotatingEnvoy
    servers_rotate = False


class EnvoyFileTest(unittest.TestCase):
    def test_it_says_what_the_other_file_says(self):
        text = (EDGE / "envoy.yaml").read_text()
        config = yaml.safe_load(text)["static_resources"]
        haproxy = (EDGE / "haproxy.cfg").read_text()
        manager = config["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        paths = [route["match"]["prefix"] for route in manager["route_config"]["virtual_hosts"][0]["routes"]]
        self.assertEqual(" ".join(paths), re.search(r"unless \{ path_beg (.*) \}", haproxy).group(1))
        buckets = [descriptor["token_bucket"] for descriptor in manager["http_filters"][0]["typed_config"]["descriptors"]]
        rate = int(re.search(r"sc0_http_req_rate gt (\d+)", haproxy).group(1))
        self.assertEqual(buckets, [{"max_tokens": rate, "tokens_per_fill": rate, "fill_interval": "10s"}])
        self.assertEqual(manager["request_headers_timeout"], re.search(r"timeout http-request (\S+)", haproxy).group(1))
        self.assertEqual(str(manager["http2_protocol_options"]["max_concurrent_streams"]),
                         re.search(r"h2.max-concurrent-streams (\d+)", haproxy).group(1))
        cluster = config["clusters"][0]
        self.assertTrue(cluster["connection_pool_per_downstream_connection"])
        self.assertEqual(cluster["health_checks"][0]["grpc_health_check"]["service_name"], "minitron.v1.GenerationService")


if __name__ == "__main__":
    unittest.main()
