"""The commands of the README, of the scripts' docstrings and of replicate.sh: each one parses, and the three scripts fit together."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT, run_script

import collect
import eval as ev
import lam_vlm

PARSERS = {"collect.py": collect.parse_args, "lam_vlm.py": lam_vlm.parse_args, "eval.py": ev.parse}


def read(source: str) -> str:
    """Text of README.md, docstring of a script, or the commands that replicate.sh lists for a scale."""
    if source == "README.md":
        return (ROOT / source).read_text()
    if source in PARSERS:
        return {"collect.py": collect, "lam_vlm.py": lam_vlm, "eval.py": ev}[source].__doc__
    return subprocess.run(["bash", "replicate.sh", source, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "source, least", [("README.md", 10), ("collect.py", 4), ("lam_vlm.py", 6), ("eval.py", 3), ("quick", 10), ("paper", 10)]
)
def test_every_command_parses(source, least):
    """A command ends at a back-quote, a comment, &&, or the column of explanations."""
    found = [re.split(r"\s{3,}", command)[0] for command in re.findall(r"python ((?:collect|lam_vlm|eval)\.py[^`#&|;\n]*)", read(source))]
    assert len(found) >= least, found
    for command in found:
        script, *arguments = shlex.split(command.replace("...", ""))
        try:
            PARSERS[script](arguments + ["--device", "cpu"] * (script == "eval.py"))
        except SystemExit as error:
            pytest.fail(f"python {command}: {error}")


def test_the_three_scripts_in_a_row(tiny_data, tmp_path):
    """collect.py's data trains a policy that eval.py rolls out in the data's environment; two updates a stage will do."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tiny").symlink_to(tiny_data)
    flags = (
        "--data data/tiny --lam-updates 2 --bc-updates 2 --decoder-updates 2 --widths 8 16 --labelled-episodes 1 2 --device cpu --arm tiny"
    )
    for command in (f"lam_vlm.py {flags}", "eval.py --episodes 2 --envs 2 --workers 1 --media 1 --out results/tiny"):
        result = run_script(*command.split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "results/tiny").iterdir()}
    assert names >= {"report.md", "scores.csv", "success.png", "strip.png"}
    rows = (tmp_path / "runs/tiny_drawer-open_s0/rollouts.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2, "a row for each label budget and episode"
