"""The commands of the README, of the scripts' docstrings and of replicate.sh: each one parses, and the three scripts fit together."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

import collect
import eval as ev
import lam_vlm
import linear_lam

PARSERS = {"collect.py": collect.parse_args, "lam_vlm.py": lam_vlm.parse_args, "eval.py": ev.parse, "linear_lam.py": linear_lam.parse_args}


def read(source: str) -> str:
    """Text of README.md, docstring of a script, or the commands that replicate.sh lists for a scale."""
    if source == "README.md":
        return (ROOT / source).read_text()
    if source in PARSERS:
        return {"collect.py": collect, "lam_vlm.py": lam_vlm, "eval.py": ev, "linear_lam.py": linear_lam}[source].__doc__
    return subprocess.run(["bash", "replicate.sh", source, "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def commands(source: str, scripts: str = "collect|lam_vlm|eval|linear_lam") -> list[list[str]]:
    """[script, *arguments] of each command; one ends at a back-quote, a comment, &&, or the column of explanations."""
    found = re.findall(rf"python ((?:{scripts})\.py[^`#&|;\n]*)", read(source))
    return [shlex.split(re.split(r"\s{3,}", command)[0].replace("...", "")) for command in found]


@pytest.mark.parametrize(
    "source, least",
    [
        ("README.md", 10),
        ("collect.py", 4),
        ("lam_vlm.py", 6),
        ("eval.py", 3),
        ("linear_lam.py", 4),
        ("quick", 90),
        ("ablations", 50),
        ("encoders", 9),
        ("paper", 200),
    ],
)
def test_every_command_parses(source, least):
    found = commands(source)
    assert len(found) >= least, found
    for script, *arguments in found:
        try:
            PARSERS[script](arguments + ["--device", "cpu"] * (script == "eval.py"))
        except SystemExit as error:
            pytest.fail(f"python {shlex.join([script, *arguments])}: {error}")


def test_no_two_commands_want_the_same_run_folder():
    """The quick start, the README's ablations and all of replicate.sh, one after the other, in one checkout."""
    folders = {}
    for source in ("README.md", "screen", "quick", "ablations", "encoders", "paper"):
        for _, *arguments in commands(source, "lam_vlm"):
            args = lam_vlm.parse_args(arguments)
            args.tasks = args.tasks or ("drawer-open",)
            args.arm = args.arm or lam_vlm.default_arm(args, "none" if "clean" in args.data else "generated")
            out = args.out or lam_vlm.default_out(args)
            assert folders.setdefault(out, identity := lam_vlm.identity_of(args)) == identity, arguments
    assert len(folders) > 400


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
    rows = (tmp_path / "runs/tiny_drawer-open_s0_tiny/rollouts.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2, "a row for each label budget and episode"


def test_replicate_goes_on_after_a_failed_cell(tmp_path):
    """With a python that only writes down its arguments, and fails once: all other cells run, the exit status is 1, then all is well."""
    (tmp_path / "bin").mkdir()
    stub = f"""#!/usr/bin/env bash
[[ $1 == -c || $1 == - ]] && exec {sys.executable} "$@"
echo "$*" >> log
if [[ "$*" == *"--target masked"* && ! -e failed ]]; then touch failed; echo "lam_vlm.py: no luck" >&2; exit 1; fi
echo "runs/x: made"
"""
    (tmp_path / "bin/python").write_text(stub)
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "replicate.sh").write_text((ROOT / "replicate.sh").read_text())
    environ = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TASKS": "reach", "JOBS": "2", "VIRTUAL_ENV": "one"}
    command = ["bash", "replicate.sh", "quick"]
    first = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert first.returncode == 1 and first.stderr.count("FAILED") == 1 and "no luck" in first.stderr
    assert len(lines) == 2 + 3 * 10 and not any("eval.py" in line for line in lines), "two data sets, ten cells a seed, no evaluation"
    second = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "[30/30, 0 min, about 0 min to go] runs/x: made" in second.stdout
    listed = subprocess.run([*command, "--list"], cwd=tmp_path, env=environ, capture_output=True, text=True).stdout.splitlines()
    again = (tmp_path / "log").read_text().splitlines()[len(lines) :]
    assert sorted(f"python {line}" for line in again[:-1]) == sorted(listed[:-1]) and again[-1].startswith("eval.py --out results/quick")
    wrong = subprocess.run(["bash", "replicate.sh", "large"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert wrong.returncode == 1 and "unknown scale 'large'" in wrong.stderr
