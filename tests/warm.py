"""Scripts run as `python <script>` runs them, in processes forked from one that has imported their packages.

torch alone takes seconds to import. No module of the project is imported before the fork.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "matplotlib.pyplot", "metaworld.env_dict", "scipy.ndimage", "imageio.v3", "tyro"]
)


def run_as_main(command: list[str], cwd: Path, environ: dict[str, str], outputs: list[Path]) -> None:
    for number, output in enumerate(outputs, start=1):  # stdout, stderr
        os.dup2(os.open(output, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


class Script:
    """A running `python <command>`, with what the tests use of subprocess.Popen."""

    def __init__(self, command: list[str], cwd: Path):
        self.args = [sys.executable, *command]
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for output in self.outputs:
            output.touch()
        self.process = SERVER.Process(target=run_as_main, args=(command, cwd, dict(os.environ), self.outputs))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> list[str]:
        """stdout and stderr, after its end."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        return [output.read_text() for output in self.outputs]
