"""Every command of README.md, of docs/, of the scripts' docstrings and of replicate.sh.

What needs no pretrained model, no download and no GPU is run, cut to its smallest size, in one folder and in
the order of the pages, as a reader would do it. The rest is parsed by its script's own parser.
"""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import as_videos
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import collect
import eval as evaluate
import import_videos
import lam_vlm
import latbot
import linear_lam
import univla

SCRIPTS = {
    "collect.py": collect,
    "import_videos.py": import_videos,
    "lam_vlm.py": lam_vlm,
    "univla.py": univla,
    "latbot.py": latbot,
    "eval.py": evaluate,
    "linear_lam.py": linear_lam,
}
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SCALES = {  # and how many runs each has at least
    "near": 108,
    "main": 216,
    "univla": 38,
    "latbot": 89,
    "motion": 40,
    "ablations": 120,
    "views": 96,
    "encoders": 34,
    "hard": 16,
    "mt10": 30,
    "paper": 390,
}
CUT = {
    "collect.py": "--episodes-per-task 3 --shard-episodes 3 --size 32 --max-steps 100 --workers 1",
    "import_videos.py": "--size 32",
    "lam_vlm.py": "--lam-updates 2 --bc-updates 2 --decoder-updates 2 --batch-size 4 --widths 8 16",
    "univla.py": "--lam-updates 2 --bc-updates 2 --decoder-updates 2 --lam-batch 4 --batch-size 4 --width 16",
    "latbot.py": "--teacher-updates 2 --student-updates 2 --expert-updates 2 --batch-size 4 --width 16",
    "eval.py": "--episodes 1 --envs 1 --workers 1 --media 1",
    "linear_lam.py": "--updates 5 --restarts 1",
}
# what a command that is only parsed needs: a GPU's hours, several processes, weights, a download, other runs
NEEDS = ("paper", "torchrun", "KEY", "davis", "/work", "user/name", "lerobot", "data/main")
NEEDS += ("allenai", "Molmo", "llava", "SmolVLM", "facebook", "openai", "google", "Qwen", "--help")


def commands(text: str) -> list[list[str]]:
    """The words of each command in a page: in fenced or indented blocks, and between back-quotes."""
    fenced = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^    (.*)", prose, re.MULTILINE)
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        line = re.split(r"\s#|\s{2,}", line.strip())[0]  # a comment, or a column of explanations
        for command in line.split("&&"):
            if re.match(r"\s*(python|torchrun|bash) \S+", command):
                command = re.sub(r"<[^>]+>", "KEY", command.replace("...", ""))
                found.append(shlex.split(command))
    return found


def script_and_flags(words: list[str]) -> tuple[str | None, list[str]]:
    """("lam_vlm.py", [flags]) of a command with one of our scripts, also under torchrun; else (None, [])."""
    for place, word in enumerate(words):
        if word in SCRIPTS:
            return word, words[place + 1 :]
    return None, []


def parse(script: str, flags: list[str]) -> object:
    """What the script's own parser makes of them; an unknown flag or value fails the test."""
    if "--help" in flags:
        return None
    if script == "eval.py":
        flags = [*flags, "--device", "cpu"]
    try:
        return SCRIPTS[script].parse_args(flags)
    except SystemExit as error:
        pytest.fail(f"python {shlex.join([script, *flags])}: {error}")


def cut(script: str, flags: list[str]) -> list[str]:
    """The same command at its smallest size: of a flag that is given twice, the last value counts."""
    given, flags = flags, flags + CUT[script].split()
    if script in ("lam_vlm.py", "univla.py", "latbot.py") and "--labelled-episodes all" not in shlex.join(
        flags
    ):
        flags += ["--labelled-episodes", "1"]  # of the two that the small data sets have
    if script == "eval.py" and "--labelled" in flags:
        flags += ["--labelled", "1"]
    if script == "linear_lam.py":
        what = linear_lam.asked_for(given)
        flags = {"the study": ["--quick"], "one case": flags}.get(what, given)
    return flags


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """The folder in which all pages' commands run, with a reader's own clips."""
    folder = tmp_path_factory.mktemp("reader")
    data = folder / "collected"
    flags = cut("collect.py", ["--out", str(data), "--encoder", "none", "--videos", "none"])
    collect.main(collect.parse_args(flags))
    as_videos.main(data, folder / "my_videos")
    rng = np.random.default_rng(0)
    for clip in range(4):
        frames = folder / f"my_clips/clip_{clip}"
        frames.mkdir(parents=True)
        for number in range(12):
            picture = rng.integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(picture).save(frames / f"{number:03d}.png")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/fork.md"])  # those: test_fork.py
def test_commands_of_a_page(page, workspace, monkeypatch):
    """The quick start first, whatever page is read: the others build on it."""
    monkeypatch.chdir(workspace)
    done = workspace / "done.txt"  # what need not run again: of eval.py, what came after all else
    done.touch()
    found = commands((ROOT / "README.md").read_text())[:6] + commands((ROOT / page).read_text())
    for words in found:
        script, flags = script_and_flags(words)
        if script is None:
            continue
        parse(script, flags)
        if any(word in shlex.join(words) for word in NEEDS):
            continue
        flags = [path for flag in cut(script, flags) for path in glob.glob(flag) or [flag]]  # as a shell does
        line, lines = shlex.join([script, *flags]), done.read_text().splitlines()
        if line in lines:
            continue
        monkeypatch.setattr(sys, "argv", [script, *flags])
        module = SCRIPTS[script]
        try:
            module.main(flags if module is linear_lam else module.parse_args(flags))
        except SystemExit as error:
            pytest.fail(f"python {line}\n{error}")
        if script != "eval.py":
            lines = [other for other in lines if not other.startswith("eval.py")]
        done.write_text("\n".join([*lines, line]))
    if page == "README.md":
        names = {path.name for path in (workspace / "results/quick").iterdir()}
        assert names >= {"report.md", "scores.csv", "success.png", "strip.png"}
        rows = (workspace / "runs/lapo-oracle_drawer-open_s0/rollouts.csv").read_text().splitlines()
        assert len(rows) == 2, "a header, and a row for the label budget and episode"
        assert len(list((workspace / "runs").glob("*/summary.json"))) >= 5, "the five ablations"


def test_pages_name_scales_files_and_pages_that_are_there():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for words in commands(text):
            if words[:2] == ["bash", "replicate.sh"] and words[2] != "SCALE":
                assert words[2] in SCALES, f"{page}: {shlex.join(words)}"
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not link.startswith("http"):
                assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_a_docstring_parse(script):
    found = [script_and_flags(words) for words in commands(SCRIPTS[script].__doc__)]
    assert len(found) >= 3
    for name, flags in found:
        parse(name, flags)


def listed(scale: str, folder: Path = ROOT, **environ: str) -> list[list[str]]:
    command, environ = ["bash", "replicate.sh", scale, "--list"], os.environ | environ
    result = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("scale, least", SCALES.items())
def test_replicate_lists_commands_that_parse(scale, least):
    """All folders differ. Commands that differ in seed, task or folder alone are parsed once."""
    kinds, folders = {}, []
    for _, script, *flags in listed(scale, ENCODERS="llava-hf/llava-1.5-7b-hf", ENCODER_FLAGS=""):
        if script in ("lam_vlm.py", "univla.py", "latbot.py"):
            folders.append(flags[-1])
            assert flags[-2] == "--out" and flags[-1].startswith(f"runs/{scale}/")
        kind = re.sub(r"--(seed|tasks|out) \S+", "", " ".join(flags))
        kinds[script, kind] = flags
    assert len(folders) == len(set(folders)) >= least
    assert {script for script, _ in kinds} > {"collect.py", "eval.py"}
    for (script, _), flags in kinds.items():
        parse(script, flags)


STUB = """#!/usr/bin/env bash
# a python that writes down its arguments, leaves what the scripts leave, and fails once
echo "$*" >> log
if [[ "$*" == *"--target masked"* && ! -e failed ]]; then
  touch failed; echo "lam_vlm.py: no luck" >&2; exit 1
fi
for word in "$@"; do
  if [[ $before == --out && $1 == lam_vlm.py ]]; then
    mkdir -p "$word"; echo {} | tee "$word"/{args,summary}.json
  fi
  if [[ $before == --runs && $* == *--workers* ]]; then echo row > "$word/rollouts.csv"; fi
  before=$word
done
"""


@pytest.mark.parametrize("scale", ["near", "main"])
def test_replicate_lets_the_oracles_fdm_see_z_alone(scale):
    """On every task: what LAPO's own FDM sees must not leak into the next task's runs."""
    found = [flags for _, script, *flags in listed(scale) if "lapo-oracle-" in flags[-1]]
    assert len(found) == {"near": 3, "main": 6}[scale] * 3 * 2
    assert all("--fdm-sees" not in flags for flags in found)


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "paper"])
def test_what_replicate_keeps_can_be_committed(scale):
    """Else a new machine would not go on where another stopped."""
    kept = f"results/{scale}/runs/name/rollouts.csv"
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", kept, "runs/name/lam.pt"], cwd=ROOT, capture_output=True
    )
    assert ignored.stdout.decode().split() == ["runs/name/lam.pt"]


def test_replicate_paper_takes_the_view_that_the_labels_prefer(tmp_path):
    """What an encoder's FDM sees, by probes of its three views; LAPO on pixels stays as it is."""
    (tmp_path / "common").mkdir()
    for name in ("replicate.sh", "common/grid.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    places = {"z": "results/paper/runs", "target": "runs/paper", "frame": "runs/paper"}  # kept; run by --list
    for view, nmse in {"z": 0.9, "target": 0.4, "frame": 0.6}.items():
        folder = tmp_path / f"{places[view]}/view-oracle-{view}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"labelled_probe_nmse": {"32": nmse}}))
    lines = {line[-1]: shlex.join(line) for line in listed("paper", tmp_path) if line[1] == "lam_vlm.py"}
    assert "--fdm-sees target" in lines["runs/paper/lapo-oracle-blind_reach_s1"]
    assert "--fdm-sees z" in lines["runs/paper/lapo-Molmo-7B-D-0924-best_reach_s1"], (
        "nothing is known of it yet"
    )
    assert "--fdm-sees frame" in lines["runs/paper/lapo-frame_reach_s1"]


def test_replicate_goes_on_after_a_failure_and_on_another_machine(tmp_path):
    """A failed run is named, the others are done, there is no table. The same line then does the rest."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "common").mkdir()
    for name in ("replicate.sh", "common/grid.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    environ = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environ |= {"TASKS": "door-open", "SEEDS": "0 1", "JOBS": "2"}

    def replicate(scale: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        command = ["bash", "replicate.sh", scale]
        result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        return result, log.read_text().splitlines()

    result, lines = replicate("near")
    runs = 2 * 12
    assert result.returncode == 1
    assert result.stderr.count("FAILED: masklam_door-open_s") == 1 and "lam_vlm.py: no luck" in result.stderr
    assert len([line for line in lines if line.startswith("lam_vlm.py")]) == runs
    assert len([line for line in lines if line.startswith("eval.py")]) == runs - 1, "no table yet"
    kept = [path.name for path in tmp_path.glob("results/near/runs/*/*")]
    assert sorted(kept) == sorted(["args.json", "rollouts.csv", "summary.json"] * (runs - 1))

    result, lines = replicate("near")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in lines] == ["collect.py"] * 2 + ["lam_vlm.py", "eval.py", "eval.py"]
    assert "--target masked" in lines[2] and lines[-1].count("results/near/runs/") == runs
    assert f"[{runs}/{runs}, 0 min] masklam_door-open_s" in result.stdout
    assert f"{runs - 1} of {runs} runs are in results/near/runs already" in result.stdout

    shutil.rmtree(tmp_path / "runs")  # another machine has what was committed
    result, lines = replicate("near")
    assert result.returncode == 0 and not [line for line in lines if line.startswith("lam_vlm.py")]

    result, lines = replicate("large")
    assert result.returncode == 1 and not lines and "unknown scale 'large'" in result.stderr


@pytest.mark.parametrize("scale", SCALES)
def test_replicate_trains_nothing_without_its_data(scale, tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log\nexit 3\n')
    (tmp_path / "python").chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", ROOT / "replicate.sh", scale], env=environ, capture_output=True)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert result.returncode == 3 and line.startswith("collect.py")


@pytest.mark.parametrize("flags", ["", "--big 0.1", "--cost"])
def test_benchmark_runs(flags, tmp_path):
    command = [sys.executable, str(ROOT / "tests/benchmark.py"), "--json", "--smoke", *flags.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(value is not None for value in json.loads(result.stdout.splitlines()[-1]).values())
