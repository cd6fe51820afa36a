"""Two hosts with a cable between them and a disk each: network namespaces, where the system lets us make them."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, metrics, smoke_args

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")]
HOSTS = {0: ("ddpm-a", "10.177.0.1"), 1: ("ddpm-b", "10.177.0.2")}


def ip(*args: str) -> bool:
    return subprocess.run(["ip", *args], capture_output=True).returncode == 0


@pytest.fixture
def cable():
    """The two hosts, connected; yields nothing. Skips where namespaces are not allowed (`ip netns` needs root)."""
    for name, _ in HOSTS.values():
        ip("netns", "del", name)
    if not all(ip("netns", "add", name) for name, _ in HOSTS.values()):
        pytest.skip("network namespaces are not allowed here")
    assert ip("link", "add", "ddpm0", "type", "veth", "peer", "name", "ddpm1")
    for rank, (name, address) in HOSTS.items():
        assert ip("link", "set", f"ddpm{rank}", "netns", name)
        assert ip("-n", name, "addr", "add", f"{address}/24", "dev", f"ddpm{rank}")
        assert ip("-n", name, "link", "set", f"ddpm{rank}", "up") and ip("-n", name, "link", "set", "lo", "up")
    yield
    for name, _ in HOSTS.values():
        ip("netns", "del", name)


def start(rank: int, disk, args: list[str]) -> subprocess.Popen:
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": HOSTS[0][1], "MASTER_PORT": "29517", "GLOO_SOCKET_IFNAME": f"ddpm{rank}"}
    environment |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    disk.mkdir(exist_ok=True)
    command = ["ip", "netns", "exec", HOSTS[rank][0], sys.executable, str(ROOT / "train_ddpm_mnist.py"), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=disk, env=environment, text=True, **pipes)


def test_two_hosts_with_a_disk_each(cable, dataset_dir, tmp_path):
    """Only the first writes; both resume from a checkpoint that is copied to the second."""
    disks = {rank: tmp_path / f"disk{rank}" for rank in HOSTS}
    options = {"train_batch_size": 8, "validation_steps": 0, "logging_steps": 1}
    for more in ({"max_train_steps": 4}, {"max_train_steps": 6, "resume_from_checkpoint": "latest"}):
        hosts = [start(rank, disks[rank], smoke_args(dataset_dir, "out", **options, **more)) for rank in HOSTS]
        output = [host.communicate(timeout=200) for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], output
        if not (disks[1] / "out").exists():
            shutil.copytree(disks[0] / "out", disks[1] / "out")
    assert sorted(metrics(disks[0] / "out", "loss")) == [1, 2, 3, 4, 5, 6]
    assert not (disks[1] / "out/checkpoint-6").exists()
