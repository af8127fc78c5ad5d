"""Shared by all tests: one thread, scripts run as a user runs them, a tiny data set made by collect.py."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from warm import Script

for variable in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):  # several threads make small work slower
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for a model

import common.distracting_metaworld  # noqa: E402, F401  picks MUJOCO_GL for the processes started below

ROOT = Path(__file__).resolve().parents[1]
TINY = "--episodes-per-task 5 --shard-episodes 2 --size 32 --seed 0 --camera corner --max-steps 200".split()


def start_script(script: str | Path, *arguments: object, cwd: Path) -> Script:
    """Starts `python <script> <arguments>` in the folder `cwd`; a relative script is one of ours."""
    return Script([str(ROOT / script), *map(str, arguments)], cwd)


def run_script(script: str | Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs it to its end. The result has returncode, stdout and stderr; nothing is asserted."""
    process = start_script(script, *arguments, cwd=cwd)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def torchrun(script: str | Path, *arguments: object, cwd: Path) -> subprocess.Popen:
    """Starts a script on two ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def kill_when(process: Script, ready: Callable[[], bool]) -> None:
    """kill -9 as soon as `ready()`; the process must not have ended by itself before."""
    while not ready():
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[1]}"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def refusal(result: subprocess.CompletedProcess) -> str:
    """The line with which a script refuses its input: it ends stderr, with exit status 1 and no traceback."""
    script = Path(result.args[1]).name
    lines = result.stderr.splitlines()
    assert result.returncode == 1, (result.returncode, result.stderr)
    own = [line for line in lines if line.startswith(f"{script}: ")]
    assert len(own) == 1 and lines[-1] == own[0] and "Traceback" not in result.stderr, result.stderr
    return lines[-1]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder but its locks, by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """drawer-open, 5 episodes of 32 px in 3 shards, prompts best and blind. Tests change copies of it."""
    folder = tmp_path_factory.mktemp("tiny")
    prompts = "--workers", 1, "--prompt", "best", "blind"
    made = run_script("collect.py", *TINY, *prompts, "--out", "data/tiny", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "data" / "tiny"
