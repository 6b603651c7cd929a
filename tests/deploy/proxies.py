"""The proxies of deploy/edge as children, run with the shipped files: only addresses, the place of the certificate and how
many connections there may be are changed."""
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile

import yaml

from harness import ROOT, wait_for

EDGE = ROOT / "deploy/edge"
HAPROXY = ROOT / "build/tools/haproxy"  # deploy/install-deps.sh test
NAME = "edge.example"


def envoy_program():
    """From build/venv (deploy/install-deps.sh clients): the distribution has no Envoy."""
    found = list((ROOT / "build/venv/lib").glob("python3*/site-packages/envoy/_bin/envoy"))
    assert found, "no Envoy in build/venv: deploy/install-deps.sh clients"
    return found[0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_certificate(folder, name, authority=None):
    """A pair for edge.example: NAME.pem and NAME.key in folder. Self-signed, or by the pair of that name."""
    signer = ["-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}.key"] if authority else []
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-subj", f"/CN={NAME if authority else 'authority'}", "-addext", f"subjectAltName=DNS:{NAME}",
                    "-days", "2", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", *signer],
                   check=True, capture_output=True)
    return (folder / f"{name}.pem").read_bytes()


class Proxy:
    """Use as a context manager. `certificate` is what clients trust when tls is true."""

    end = signal.SIGKILL

    def __init__(self, *backend_ports, tls=False, authority=None):
        self.authority = authority
        self.temporary = tempfile.TemporaryDirectory(prefix="minitron_edge_")
        self.folder = pathlib.Path(self.temporary.name)
        self.port = free_port()
        self.certificate = make_certificate(self.folder, "edge")
        command = self.configure(backend_ports, tls)
        self.log = open(self.folder / "log", "w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        wait_for(command[0], self.listens)

    def issue(self):
        """A new pair, by the authority. The key comes last: who looks between the two finds a pair that does not match."""
        self.certificate = make_certificate(self.authority, "edge", "authority")
        for name in ("edge.pem", "edge.key"):
            shutil.copy(self.authority / name, self.folder / f"{name}.new")
            os.rename(self.folder / f"{name}.new", self.folder / name)

    def listens(self):
        assert self.process.poll() is None, pathlib.Path(self.log.name).read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        except OSError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(self.end)
        self.process.wait()
        self.log.close()
        self.temporary.cleanup()


class Haproxy(Proxy):
    settings = ""  # more of the line default-server
    mode = ("-db",)

    def configure(self, backend_ports, tls):
        self.write_pair()
        text = (EDGE / "haproxy.cfg").read_text()
        text, binds = re.subn(r"bind :8443 ssl crt \S+ (.*)",
                              rf"bind 127.0.0.1:{self.port} ssl crt {self.folder}/both.pem \1" if tls
                              else f"bind 127.0.0.1:{self.port} proto h2", text)
        text, servers = re.subn(r"( +server \w+ )127\.0\.0\.1:\d+\n", "", text)
        assert (binds, servers) == (1, 2), "the file has one bind and two servers"
        text = text.replace("default-server proto h2", f"default-server proto h2 {self.settings}")
        text = text.replace("maxconn 4000", "maxconn 400")  # this machine may not have the descriptors
        text += "".join(f"    server s{i} 127.0.0.1:{port}\n" for i, port in enumerate(backend_ports))
        (self.folder / "haproxy.cfg").write_text(text)
        return [HAPROXY, *self.mode, "-f", self.folder / "haproxy.cfg"]

    def write_pair(self):
        (self.folder / "both.pem").write_bytes(
            (self.folder / "edge.pem").read_bytes() + (self.folder / "edge.key").read_bytes())


class RotatingHaproxy(Haproxy):
    """As systemd runs it: a master that a reload gives a new worker, while the old one ends what it has. Its servers have
    TLS, too; `authority` (authority.pem and authority.key in that folder) signs for all, server.pem and server.key there."""

    mode = ("-W",)
    end = signal.SIGTERM  # the master takes its workers along

    def __init__(self, authority, *backend_ports):
        self.settings = f"ssl verify required ca-file {authority}/authority.pem verifyhost {NAME} alpn h2 check-alpn h2"
        super().__init__(*backend_ports, tls=True, authority=authority)

    def num_loads(self):
        return (self.folder / "log").read_text().count("Loading success")

    def hears(self):
        """Whether a reload's signal would be caught now; a moment after its start haproxy still loses it."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        caught, blocked = (int(re.search(rf"{name}:\s*(\w+)", status).group(1), 16) for name in ("SigCgt", "SigBlk"))
        return self.num_loads() and (caught & ~blocked) >> (signal.SIGUSR2 - 1) & 1

    def rotate(self):
        wait_for("haproxy's master to hear", self.hears)
        before = self.num_loads()
        self.issue()
        self.write_pair()
        self.process.send_signal(signal.SIGUSR2)
        wait_for("a reload", lambda: self.num_loads() > before)


class Envoy(Proxy):
    def configure(self, backend_ports, tls):
        secret = (EDGE / "envoy-tls.yaml").read_text()
        for there, here in (("tls.crt", "edge.pem"), ("tls.key", "edge.key")):
            secret = secret.replace(f"filename: /etc/envoy/{there}", f"filename: {self.folder}/{here}")
        (self.folder / "tls.yaml").write_text(secret.replace("path: /etc/envoy}", f"path: {self.folder}}}"))
        text, count = re.subn("/etc/envoy/tls.yaml", f"{self.folder}/tls.yaml", (EDGE / "envoy.yaml").read_text())
        assert count == 1, "the file names its secret once"
        config = yaml.safe_load(text)
        listener, cluster = config["static_resources"]["listeners"][0], config["static_resources"]["clusters"][0]
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": self.port}
        if not tls:
            del listener["filter_chains"][0]["transport_socket"]
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
            for port in backend_ports]
        (self.folder / "envoy.json").write_text(json.dumps(config))
        return [envoy_program(), "--config-path", self.folder / "envoy.json", "--concurrency", "1",
                "--use-dynamic-base-id", "--log-level", "warning"]


class RotatingEnvoy(Envoy):
    """Its servers have no TLS."""

    def __init__(self, authority, *backend_ports):
        super().__init__(*backend_ports, tls=True, authority=authority)

    rotate = Proxy.issue
