"""The Ray cluster of a run: its address, the connection, a start on this machine, and the cluster's devices."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from mlem_dist.capacity.placement import Devices
from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable
from mlem_dist.machine import available_cores, require_open_files

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10

OPEN_FILES = 112
"""Number of open files that Ray needs without workers."""

OPEN_FILES_PER_CORE = 8
"""Number of further open files that Ray needs for the workers of each core."""

TEMP_BYTES = 36
"""Longest path of the folder for Ray's temporary files, in bytes: Ray adds 70 bytes for the sockets there, and the path
of a socket has at most 107."""

TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

TEMP_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
TEMP_FOLDERS = ("/tmp", "/var/tmp")

RESOURCES = {"cpu": "CPU", "cuda": "GPU"}
ACCELERATOR = "ray.io/accelerator-type"

QUIET_ENVIRONMENT = {
    "LOG_NAME_UPDATE_INTERVAL_S": "10",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
}
"""Environment of a Ray that is started for one run: intervals at which it looks for log files, which nobody reads then,
reports on its node, and looks for nodes to add. The default intervals take another 0.8 % of a core from sampling."""


_connected = False
"""Whether this module has made the connection, and not a program that uses the package as a library."""

ORPHAN_ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""Environment of a Ray that is started for one run: seconds until its workers end if they cannot see that it is gone,
as in a container whose first process does not reap; the default is a minute."""


def is_remote(address: str | None) -> bool:
    """Whether Ray already runs somewhere, rather than being started here."""
    return _joined(address) or is_named(address)


def is_named(address: str | None) -> bool:
    """Whether an address, or RAY_ADDRESS, names a Ray that runs somewhere."""
    return _resolved(address) != "local"


def _joined(address: str | None) -> bool:
    """Whether this process is connected to Ray, and no address is given."""
    return address is None and ray.is_initialized()


def _resolved(address: str | None) -> str:
    """The address of Ray, "local" by default; Ray's own default would join what `ray start` began on this machine."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


def connect(address: str | None, stay: bool = False) -> None:
    """Connect to the Ray at `address`, or at RAY_ADDRESS, which a Ray job sets, or start Ray here.

    Without an address, a process that is connected to Ray already keeps its connection. With `stay`, `disconnect` does
    not end a connection that this call makes.

    Raises:
        UsageError: if nothing answers at the address within some seconds, or if this machine allows fewer open files
            than Ray needs or has no folder for Ray's temporary files.
        RuntimeError: if Ray cannot be started here.
    """
    global _connected
    if _joined(address):
        return
    address = _resolved(address)
    if address == "local":
        local = _local_options()
    else:
        local = {}
        _check_answer(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            job_config=_job_config(),
            **local,
        )
    # Ray raises bare exceptions, too.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, ConnectionError | RayError) and address != "local":
            raise UsageError(f"no Ray answers at {address}: {reason}") from None
        if address != "local":
            raise
        raise RuntimeError(
            f"Ray does not start on this machine ({reason}); its logs are in {_temp_folder()}/session_latest/logs; "
            "`engine` inline generates without Ray"
        ) from None
    finally:
        # ray.init has installed its own handler.
        signal.signal(signal.SIGTERM, handler)
    _connected = not stay


def _job_config() -> JobConfig:
    """The import path of workers: their node's, with the current folder only if this process imports from it, too.

    By default, Ray puts the folder in which the driver was started first on the workers' import path. A checkout there,
    or a file named like a library, would let the workers import other code than the driver.
    """
    here = str(Path.cwd())
    path = [here] if {"", here} & {*sys.path} else []
    return JobConfig(_client_job=True, _py_driver_sys_path=path)


def _local_options() -> dict[str, Any]:
    """Prepare the environment of a Ray that is started here, and return the arguments of `ray.init` for it."""
    cores = available_cores()
    require_open_files(OPEN_FILES + OPEN_FILES_PER_CORE * cores, "Ray")
    for name, value in (QUIET_ENVIRONMENT | ORPHAN_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    _provide_token()
    return {"num_cpus": cores, "_temp_dir": _temp_folder()}


def _provide_token() -> None:
    """Give Ray a token for this process and its children if the home folder cannot hold the token that Ray writes."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {*TOKEN_VARIABLES} & os.environ.keys():
        return
    try:
        folder = Path.home() / ".ray"
        if not os.access(folder / "auth_token", os.R_OK):
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
    # Path.home raises a RuntimeError if there is no home folder.
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _temp_folder() -> str:
    """A folder for Ray's temporary files, writable and with a path short enough for sockets; the usual one if possible.

    Raises:
        UsageError: if there is none.
    """
    usual = next(filter(None, map(os.environ.get, TEMP_VARIABLES)), TEMP_FOLDERS[0])
    for folder in (usual, *TEMP_FOLDERS):
        try:
            check_writable(Path(folder, "ray"))
        except UsageError:
            continue
        if len(os.fsencode(folder)) <= TEMP_BYTES:
            if folder != usual:
                logger.warning("Ray's temporary files are in %s/ray: %s is not writable, or too long", folder, usual)
            return f"{folder}/ray"
    raise UsageError(
        f"Ray needs a folder for its temporary files that can be written and has a name of at most {TEMP_BYTES} bytes; "
        f"{', '.join(dict.fromkeys((usual, *TEMP_FOLDERS)))} are not; set {TEMP_VARIABLES[0]}"
    )


def disconnect() -> None:
    """Disconnect from the Ray that `connect` has connected to, and end it if it was started here."""
    global _connected
    if _connected:
        ray.shutdown()
    _connected = False


def _check_answer(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"`address` or RAY_ADDRESS {address!r}: expected HOST:PORT of a Ray head, auto or local; from outside a "
            "cluster use `ray job submit`"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS / 2).close()
        # Something listens, but ray.init would wait for minutes if it is not a Ray head.
        check = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
        done = subprocess.run(check, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
        healthy, why = done.returncode == 0, done.stderr
    except (OSError, OverflowError, subprocess.TimeoutExpired):
        healthy, why = False, ""
    if not healthy:
        # The reason, as when the head runs another version of Ray.
        reason = next((f" ({line.strip()})" for line in why.splitlines()[::-1] if "ersion" in line), "")
        raise UsageError(
            f"no Ray head answers at `address` or RAY_ADDRESS {address}{reason}; start one with `ray start --head`, "
            "export RAY_AUTH_MODE=token if it uses tokens, or take `address` local"
        )


def check_alive() -> None:
    """Check that Ray runs on this machine.

    Raises:
        RuntimeError: if it does not, so that nothing can be started from here.
    """
    here = ray.get_runtime_context().get_node_id()
    if not any(node["NodeID"] == here for node in live_nodes()):
        raise RuntimeError(
            "Ray has died on this machine, as when its memory runs out; finished shards are kept, and the same command "
            "goes on from there"
        )


def device_type(device: str) -> str:
    """The device type, "cpu" or "cuda"; for "auto", "cuda" if the connected cluster has a GPU."""
    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def count_devices(device: str, wanted: int | None) -> int:
    """Number of CPU cores or GPUs of the connected cluster to use: the wanted number, or all.

    Raises:
        UsageError: if there are none, or fewer than wanted.
    """
    resource = RESOURCES[device]
    available = _count(resource, {})
    if available < (wanted or 1):
        if available:
            way = "lower `devices`"
        else:
            way = "use `device` cpu or a cluster with GPUs" if device == "cuda" else "start nodes that have some"
        raise UsageError(f"{wanted or 1} {resource}s are needed and Ray has {available}; {way}")
    return wanted or available


def find_devices(kinds: Sequence[str], device: str) -> list[Devices]:
    """All devices of each kind in the connected cluster.

    A kind is "cpu", any CPU core; KEY=VALUE, the devices of type `device` on nodes with that label; or the name of an
    accelerator, such as "L4", by Ray's own label.

    Raises:
        UsageError: if a kind has no devices, or two kinds of one device type are on one node.
    """
    devices = []
    for kind in kinds:
        key, equals, value = kind.partition("=")
        labels = () if kind == "cpu" else ((key, value) if equals else (ACCELERATOR, kind),)
        type_ = "cpu" if kind == "cpu" else device
        count = _count(RESOURCES[type_], dict(labels))
        if not count:
            known = sorted({f"{key}={value}" for node in live_nodes() for key, value in node["Labels"].items()})
            raise UsageError(
                f"`placement`: no node has a {RESOURCES[type_]} and is of kind {kind!r}; expected cpu, an accelerator "
                f"such as L4, or a node label, of which there are {', '.join(known)}"
            )
        devices.append(Devices(type_, count, labels))
    for node in live_nodes():
        here = {
            one for one in devices if _has(node, dict(one.labels)) and node["Resources"].get(RESOURCES[one.type], 0)
        }
        if len({one.type for one in here}) < len(here):
            raise UsageError("`placement`: two of its kinds are on one node, whose devices would count twice")
    return devices


def largest_node() -> int:
    """Number of CPU cores of the node of the connected cluster that has most.

    Raises:
        UsageError: if no node has one.
    """
    cores = max((int(node["Resources"].get("CPU", 0)) for node in live_nodes()), default=0)
    if not cores:
        raise UsageError("1 CPU is needed and Ray has 0; start nodes that have some")
    return cores


def live_nodes() -> list[dict[str, Any]]:
    """The live nodes of the connected cluster, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def _has(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return labels.items() <= node["Labels"].items()


def _count(resource: str, labels: Mapping[str, str]) -> int:
    # Whole devices of each node: a bundle cannot span two nodes.
    return sum(int(node["Resources"].get(resource, 0)) for node in live_nodes() if _has(node, labels))
