"""Models and stages of lam_vlm.py: on made-up data where the plumbing counts, on real data at the end."""

import ast
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import kill_when, refusal, run_script, start_script, torchrun
from made_up import EPISODES, GAP, LABEL_ORDERS, LENGTH, SIZE, flags, make_data, policy_nmse
from torch import Tensor, nn
from torch.nn import functional as F

import lam_vlm
from common import records, runs
from common.dataset import Dataset, random_shift, to_float
from common.runs import Run
from lam_vlm import load_policy

TARGETS = ("pixels", "clean", "masked", "embedding")
VIEWS = [(target, view) for target in TARGETS for view in ("z", "target", "frame")]


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("made_up"))


@pytest.fixture(autouse=True)
def log_every_update(monkeypatch):
    """In this process; scripts that tests start log every 50 updates and save every 200, as a user's do."""
    monkeypatch.setattr(runs, "LOG_EVERY", 1)
    monkeypatch.setattr(runs, "CHECKPOINT_EVERY", 4)


@pytest.fixture
def new_run(made_up, tmp_path):
    """new_run(**flags) -> Run, Dataset, Args, in a folder of its own; let go at the end."""
    opened = []

    def make(**changes: object) -> tuple[Run, Dataset, lam_vlm.Args]:
        out = {"data": made_up, "out": tmp_path / f"run{len(opened)}"}
        args = lam_vlm.parse_args(flags(**out | changes))
        run, data = lam_vlm.open_run(args)
        opened.append(run)
        return run, data, args

    yield make
    for run in opened:
        run.close()


def train_all(run: Run, data: Dataset, args: lam_vlm.Args) -> dict[str, nn.Module]:
    """The stages of lam_vlm.main in this process: {stage: its module}, which the run itself lets go of."""
    modules, finish = {}, run.finish

    def keep(stage: str, **results: object) -> None:
        modules[stage] = run.training[stage].module
        finish(stage, **results)

    run.finish = keep
    lam = None
    if args.method == "lapo":
        lam = lam_vlm.train_lam(run, data, args)
    policy = lam_vlm.train_bc(run, data, args, *lam_vlm.what_to_clone(data, args, lam))
    if args.method == "lapo":
        for budget in args.labelled_episodes:
            lam_vlm.train_decoder(run, data, args, policy, budget)
    lam_vlm.summarise(run, data, args, lam)
    assert not any(hasattr(training, "module") for training in run.training.values())
    return modules


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rows_of(folder: Path, stage: str = "") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if stage in ("", row["stage"])]


# ------------------------------------------------------------ what is trained on what


def test_the_idm_never_sees_over_its_episodes_end(new_run, monkeypatch):
    run, data, args = new_run(idm_horizon=3, batch_size=400, target="pixels", lam_updates=1, stages=("lam",))
    seen, forward = [], lam_vlm.IDM.forward

    def watch(idm: lam_vlm.IDM, obs: Tensor, future: Tensor) -> Tensor:
        seen.append([frames[:, -3:, 0, 0].numpy().astype(int) for frames in (obs, future)])
        return forward(idm, obs, future)

    monkeypatch.setattr(lam_vlm.IDM, "forward", watch)
    lam_vlm.train_lam(run, data, args)
    (task, episode, step), (task_k, episode_k, step_k) = (pixels.T for pixels in seen[0])
    assert np.array_equal(task, task_k) and np.array_equal(episode, episode_k)
    ahead, left = step_k - step, LENGTH + episode - 1 - step
    horizon = {GAP, 2 * GAP, 3 * GAP}
    for steps, most in zip(ahead, left):
        assert steps in {min(k, most) for k in horizon}
    assert horizon <= set(ahead) and (left < 3 * GAP).any(), "none of these could reach over the end"


def test_no_stage_trains_on_held_out_episodes_or_unlabelled_actions(tmp_path, new_run):
    """All weights are equal where only held-out episodes and unlabelled actions differ."""
    original = new_run()
    labelled = original[1].label_order[0][:2]
    held_out = make_data(tmp_path / "held_out", lambda name, episode: episode == EPISODES - 1)
    actions = ("actions", "states")
    unlabelled = make_data(tmp_path / "unlabelled", lambda name, e: name in actions and e not in labelled)
    seen = make_data(tmp_path / "seen", lambda name, episode: name == "actions" and episode == labelled[0])
    expected = {stage: weights(module) for stage, module in train_all(*original).items()}
    for root in (held_out, unlabelled):
        for stage, module in train_all(*new_run(data=root)).items():
            assert same(expected[stage], weights(module)), (root.name, stage)
    changed = train_all(*new_run(data=seen))
    equal = [same(expected[stage], weights(changed[stage])) for stage in ("lam", "bc", "decoder_1")]
    assert equal == [True, True, False]


def test_supervision_uses_the_actions_of_labelled_episodes_alone(tmp_path, new_run):
    """Stage 1 changes with a labelled action, not with an unlabelled one; its z tells the action better."""
    supervised = dict(supervision=5.0, labelled_episodes=("2",), lam_updates=80, lr=1e-2)
    run, data, args = new_run(**supervised)
    labelled = data.label_order[0][:2]
    actions = ("actions", "states")
    unlabelled = make_data(tmp_path / "unlabelled", lambda name, e: name in actions and e not in labelled)
    seen = make_data(tmp_path / "seen", lambda name, episode: name == "actions" and episode == labelled[0])
    trained = lam_vlm.train_lam(run, data, args)
    other, changed = (lam_vlm.train_lam(*new_run(**supervised, data=root)) for root in (unlabelled, seen))
    assert same(weights(trained), weights(other)) and not same(weights(trained), weights(changed))
    unsupervised = lam_vlm.train_lam(*new_run(**supervised | {"supervision": 0.0}))
    assert not same(weights(trained.idm), weights(unsupervised.idm))
    rows = rows_of(run.folder, "lam")
    assert rows[-1]["action_loss"] < 0.7 * rows[0]["action_loss"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["fdm_loss"] + 5 * rows[0]["action_loss"], rel=1e-5)


# ------------------------------------------------------------ models and losses


@pytest.mark.parametrize("target, view", VIEWS)
def test_every_parameter_gets_a_gradient_and_the_target_none(new_run, monkeypatch, target, view):
    """Whatever the FDM sees: a network that gets no gradient is not built."""
    run, data, args = new_run(
        target=target, fdm_sees=view, lam_updates=1, supervision=1.0, labelled_episodes=("2",)
    )
    targets, read = [], Dataset.target

    def watch(data: Dataset, rows: np.ndarray) -> Tensor:
        targets.append(read(data, rows))
        return targets[-1]

    monkeypatch.setattr(Dataset, "target", watch)
    lam = lam_vlm.train_lam(run, data, args)
    for name, parameter in lam.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert targets and not any(value.requires_grad for value in targets)


@pytest.mark.parametrize("target, view", VIEWS)
def test_what_the_forward_model_sees_besides_z(new_run, target, view):
    run, data, args = new_run(target=target, fdm_sees=view)
    lam = lam_vlm.LAM(data, args)
    rows = data.train[:6]
    obs, target_now = data.observe(rows), data.target(rows)

    def prediction(obs: Tensor, target_now: Tensor, z: float) -> Tensor:
        return lam.fdm(lam.context(obs, target_now), torch.full((len(obs), 5), z))

    first = prediction(obs, target_now, 1.0)
    assert first.shape == target_now.shape and not torch.equal(first, prediction(obs, target_now, 2.0))
    sees_target = not torch.equal(first, prediction(obs, target_now + 1, 1.0))
    sees_frame = not torch.equal(first, prediction(255 - obs, target_now, 1.0))
    expected = view
    if view == "target" and target in ("pixels", "masked"):
        expected = "frame"  # one and the same
    assert args.fdm_sees == expected
    assert (sees_target, sees_frame) == (expected == "target", expected == "frame")
    if view == "z":
        assert torch.allclose(first, first[:1].expand_as(first), atol=1e-6)


def test_a_forward_model_of_pictures_that_sees_z_alone_knows_places():
    """It learns squares of random colours far from the borders, whose padding would give them away."""
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    statistics = {"mean": zero, "std": one, "change_mean": zero, "change_std": one}
    data = SimpleNamespace(size=64, statistics=lambda: statistics)
    torch.manual_seed(0)
    lam = lam_vlm.LAM(data, lam_vlm.Args(target="pixels"))
    picture = F.interpolate(torch.randn(1, 3, 4, 4), scale_factor=8)
    z, optimizer = torch.zeros(1, 16), torch.optim.Adam(lam.parameters(), 1e-2)
    for _ in range(60):
        drawn = lam.fdm(lam.context(torch.zeros(1, 3, 64, 64), None), z)
        loss = F.mse_loss(drawn[..., 16:48, 16:48], picture)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * picture.var()


def test_the_masked_loss_counts_only_the_robots_pixels(new_run):
    """The first logged loss by hand: MSE of the standardised change over the robot's pixels."""
    run, data, args = new_run(
        target="masked", fdm_sees="frame", lam_updates=1, dtype="float32", idm_horizon=1
    )
    torch.manual_seed(args.seed)
    lam = lam_vlm.LAM(data, args)
    t = np.random.default_rng([args.seed, 1, 0]).choice(data.train, args.batch_size)
    obs, after = data.observe(t), data.observe(t + GAP)
    with torch.no_grad():
        change = to_float(after[:, -3:]) - to_float(obs[:, -3:])
        change = (change - lam.change_mean) / lam.change_std
        error = (lam.fdm(lam.context(obs, None), lam.idm(obs, after)) - change) ** 2
    robot = data.columns["segments"][t + GAP][:, None].repeat(3, 1) == 2
    assert not robot[..., : SIZE // 2].any(), "the left half is background"
    lam_vlm.train_lam(run, data, args)
    assert rows_of(run.folder, "lam")[0]["loss"] == pytest.approx(error.numpy()[robot].mean(), rel=1e-4)


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_random_shift_against_a_naive_loop(pad):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 6, 10, 10), np.uint8)
    shifts = rng.integers(0, 2 * pad + 1, (6, 2))
    padded = np.pad(frames, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="edge")
    expected = [picture[:, y : y + 10, x : x + 10] for picture, (y, x) in zip(padded, shifts)]
    shifted = random_shift(torch.from_numpy(frames), torch.from_numpy(shifts), pad)
    assert shifted.dtype == torch.uint8 and np.array_equal(shifted.numpy(), expected)


def test_each_stage_leaves_the_earlier_ones_frozen(new_run):
    run, data, args = new_run()
    lam = lam_vlm.train_lam(run, data, args)
    lam_before = weights(lam)
    policy = lam_vlm.train_bc(run, data, args, *lam_vlm.what_to_clone(data, args, lam))
    policy_before = weights(policy)
    lam_vlm.train_decoder(run, data, args, policy, "2")
    assert same(weights(lam), lam_before) and same(weights(policy), policy_before)
    assert not any(parameter.requires_grad for module in (lam, policy) for parameter in module.parameters())


def test_the_checkpoint_carries_the_scale_of_the_latents(new_run):
    run, data, args = new_run()
    lam = lam_vlm.train_lam(run, data, args)
    saved = torch.load(run.folder / "lam.pt", weights_only=True)["module"]
    z = lam_vlm.encode(lam, data, data.train)
    scale = (z - z.mean(0)).std(correction=0)
    assert (
        same(saved, weights(lam)) and saved["latent_std"] != 1 and torch.isclose(saved["latent_std"], scale)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_one_batch_can_be_learnt_by_heart(tiny_data, new_run, monkeypatch, target):
    """In every stage, on real frames: what a bug in gradient, shapes or pairing prevents, on any CPU."""
    monkeypatch.setattr(runs, "CHECKPOINT_EVERY", 200)
    network = dict(widths=(16, 32), stem=4, fdm_hidden=64, latent_dim=8, dtype="float32")
    exact = dict(decoder_noise=0.0, max_shift=0, batch_size=8)
    updates = dict(lam_updates=150, bc_updates=150, decoder_updates=400, lr=5e-3, decoder_lr=5e-3)
    run, data, args = new_run(
        data=tiny_data,
        encoder="oracle_best",
        target=target,
        labelled_episodes=("2",),
        **network,
        **exact,
        **updates,
    )
    data.train = data.train[[5, 40, 90, 150]]
    data.labelled = lambda budget: data.train
    train_all(run, data, args)
    for stage in ("lam", "bc", "decoder_2"):
        losses = [row["loss"] for row in rows_of(run.folder, stage)]
        most = 0.1
        if stage == "lam" and target != "embedding":
            most = 0.5  # pictures take longer
        assert losses[-1] < most * losses[0], (stage, losses[0], losses[-1])


GOLDEN = {  # meant to change with what they test; a failure shows the new values
    "pixels": {
        "lam": [1.078812, 1.038334],
        "bc": [1.398668, 1.276685],
        "decoder_1": [0.340566, 0.333886],
        "decoder_2": [0.255806, 0.502057],
    },
    "clean": {
        "lam": [1.067404, 1.081396],
        "bc": [1.360169, 1.304366],
        "decoder_1": [0.340601, 0.333721],
        "decoder_2": [0.25582, 0.502018],
    },
    "masked": {
        "lam": [1.099396, 1.032386],
        "bc": [1.394646, 1.302012],
        "decoder_1": [0.340589, 0.333737],
        "decoder_2": [0.255815, 0.502053],
    },
    "embedding": {
        "lam": [1.134775, 1.364019],
        "bc": [1.391494, 1.282707],
        "decoder_1": [0.340601, 0.333694],
        "decoder_2": [0.255826, 0.501855],
    },
    "embedding-z": {
        "lam": [1.194387, 1.228839],
        "bc": [1.321292, 1.213266],
        "decoder_1": [0.340556, 0.3337],
        "decoder_2": [0.255797, 0.502014],
    },
    "bc": {"bc": [0.331937, 0.233727]},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_step(new_run, name):
    """Losses of two updates of each stage: data, initial weights, loss and optimiser are what they were."""
    changes = {"target": name.removesuffix("-z")}
    if name == "bc":
        changes = {"method": "bc", "labelled_episodes": ("2",)}
    if name == "embedding-z":
        changes["fdm_sees"] = "z"
    run, data, args = new_run(lam_updates=2, bc_updates=2, decoder_updates=2, dtype="float32", **changes)
    train_all(run, data, args)
    losses = {stage: [row["loss"] for row in rows_of(run.folder, stage)] for stage in run.training}
    assert losses.keys() == GOLDEN[name].keys(), losses
    for stage, values in GOLDEN[name].items():
        assert losses[stage] == pytest.approx(values, abs=1e-4), (stage, losses)


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_takes_bfloat16_only_where_the_processor_has_it(new_run, monkeypatch, capsys, has_it):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_it, "amx_bf16": False})
    run, _, args = new_run()
    assert args.dtype == ("bfloat16" if has_it else "float32") and run.dtype == getattr(torch, args.dtype)
    assert ("the hardware has it" if has_it else "no bfloat16") in capsys.readouterr().out


def test_bfloat16_trains_float32_weights_to_nearly_the_same_loss(new_run):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run, data, args = new_run(lam_updates=20, stages=("lam",), dtype=dtype)
        lam = lam_vlm.train_lam(run, data, args)
        assert all(value.dtype == torch.float32 for value in lam.state_dict().values())
        losses[dtype] = rows_of(run.folder)[-1]["loss"]
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_frames_that_the_blocks_can_not_predict_are_refused(new_run):
    run, data, args = new_run(target="pixels", stem=3)
    with pytest.raises(SystemExit, match="multiple of 6 px, these have 16"):
        lam_vlm.LAM(data, args)


# ------------------------------------------------------------ runs and policies


LONG = dict(lam_updates=300, bc_updates=300, decoder_updates=100)  # checkpoints at 200


def test_killed_twice_and_resumed_equals_uninterrupted(made_up, tmp_path):
    """kill -9 between two checkpoints of stage 1, then of stage 2; the same command goes on, bit for bit."""
    command = ["lam_vlm.py", *flags(data=made_up, **LONG, out="killed")]

    for stage in ("lam", "bc"):
        path = tmp_path / f"killed/{stage}.pt"
        kill_when(start_script(*command, cwd=tmp_path), path.exists)
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["update"] == 200 and not checkpoint["finished"]
        assert not (tmp_path / "killed/summary.json").exists()
    whole = ["lam_vlm.py", *flags(data=made_up, **LONG, out="whole")]
    for script in (command, whole):
        result = run_script(*script, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    for stage in ("lam", "bc", "decoder_1", "decoder_2"):
        killed, expected = (
            torch.load(tmp_path / run / f"{stage}.pt", weights_only=True) for run in ("killed", "whole")
        )
        assert same(killed["module"], expected["module"]) and killed["update"] == expected["update"]
    metrics, expected = rows_of(tmp_path / "killed"), rows_of(tmp_path / "whole")
    timeless = [[{**row, "updates_per_second": 0} for row in rows] for rows in (metrics, expected)]
    assert timeless[0] == timeless[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")]
    for key in ("policy_hash", "stages", "action_probe_nmse", "leak_probe_r2", "state_probe_r2", "data_hash"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["stages"] == ["lam", "bc", "decoder"]
    assert summaries[0]["per_stage"]["bc"]["commit"] == records.code_version()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names >= {"args.json", "metrics.jsonl", "summary.json", "curves.png", "tensorboard"}
    again = run_script(*command, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("finished already") == 4


def test_a_stage_killed_after_its_last_update_is_not_finished(new_run, made_up, tmp_path, monkeypatch):
    """The latents' scale and the last probes belong to stage 1: a run cut off before them goes on."""
    whole = new_run()
    expected = train_all(*whole)
    args = lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "cut"))
    run, data = lam_vlm.open_run(args)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lam_vlm.train_lam(run, data, args)
    run.close()
    assert not (tmp_path / "cut/lam.pt").exists() or not torch.load(tmp_path / "cut/lam.pt")["finished"]
    again = new_run(out=tmp_path / "cut")
    modules = train_all(*again)
    for stage in expected:
        assert same(weights(expected[stage]), weights(modules[stage])), stage
    probes = [
        json.loads((run.folder / "summary.json").read_text())["action_probe_nmse"] for run in (whole[0], run)
    ]
    assert probes[0] == probes[1] is not None


def test_a_flag_that_is_new_does_not_lock_out_older_runs(new_run, made_up, tmp_path):
    """args.json of before the flag lacks it: at its default the run goes on, with another value not."""
    args = lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "old"))
    run, data = lam_vlm.open_run(args)
    train_all(run, data, args)
    path = tmp_path / "old/args.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "supervision"}))
    run.close()
    run, _ = lam_vlm.open_run(args)
    run.close()
    assert run.identity["run"] == json.loads((tmp_path / "old/summary.json").read_text())["identity"]
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "supervision"}))
    before = path.read_text()
    with pytest.raises(SystemExit, match="supervision: 0.0 there, 1.0 here"):
        new_run(out=tmp_path / "old", supervision=1.0, labelled_episodes=("1",))
    assert path.read_text() == before, "a refused command leaves the folder as it was"


def test_a_run_without_its_weights_is_one_line(new_run):
    """As replicate.sh keeps runs: args.json, summary.json, rollouts.csv."""
    run, data, args = new_run()
    train_all(run, data, args)
    for name, words in (("decoder_1", "decoder_1.pt is missing"), ("bc", "bc.pt is missing")):
        (run.folder / f"{name}.pt").unlink()
        with pytest.raises(SystemExit) as error:
            load_policy(run.folder, "1")
        assert words in one_line(error)


def test_results_of_a_stage_outlive_the_process(new_run, made_up, tmp_path):
    """A later command for another stage alone leaves the probes in summary.json."""
    args = lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "run"))
    lam_vlm.main(args)
    run, data = lam_vlm.open_run(args)
    assert run.results("lam")["action_probe_nmse"] is not None and run.results("decoder_9") == {}
    run.close()


def test_tensorboard_has_each_update_once_after_a_resume(new_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = records.Log(tmp_path)
    for update in (1, 2, 3):
        log.write("lam", update, loss=1.0 / update)
    log.writer.close()
    log = records.Log(tmp_path)
    log.rewind("lam", 2)
    log.write("lam", 3, loss=5.0)
    log.writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("lam/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5), (3, 5.0)]
    assert [row["loss"] for row in log.rows()] == [1.0, 0.5, 5.0]


def test_a_loss_that_some_updates_log_is_averaged_over_those(new_run, monkeypatch):
    monkeypatch.setattr(runs, "LOG_EVERY", 4)
    run, _, args = new_run()
    module = nn.Linear(1, 1)
    optimizer, schedule = runs.one_cycle(module, 1e-3, 0.0, 4)
    for step in run.steps("lam", module, optimizer, schedule, 4):
        step.log(loss=torch.tensor(float(step.update)))
        if step.update % 2:
            step.log(rare_loss=torch.tensor(10.0 + step.update))
    (row,) = rows_of(run.folder, "lam")
    assert row["loss"] == 1.5 and row["rare_loss"] == 12


def test_stages_one_at_a_time_equal_all_at_once(new_run, tmp_path):
    at_once = new_run()
    train_all(*at_once)
    for stage in ("lam", "bc", "decoder"):
        lam_vlm.main(lam_vlm.parse_args(flags(data=at_once[2].data, out=tmp_path / "apart", stages=(stage,))))
        done = json.loads((tmp_path / "apart/summary.json").read_text())["stages"]
        assert done[-1] == stage
    folders = at_once[0].folder, tmp_path / "apart"
    hashes = [json.loads((folder / "summary.json").read_text())["policy_hash"] for folder in folders]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


def test_a_label_budget_added_later_trains_its_decoder_alone(made_up, tmp_path, capsys):
    """As both budgets in one command; the earlier policy keeps its hash, so its rollouts stay."""
    for out, budgets in (("apart", ("2",)), ("apart", ("1",)), ("at_once", ("1", "2"))):
        command = flags(data=made_up, out=tmp_path / out, labelled_episodes=budgets)
        capsys.readouterr()
        lam_vlm.main(lam_vlm.parse_args(command))
        assert capsys.readouterr().out.count("finished already") == (2 if budgets == ("1",) else 0)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("apart", "at_once")]
    assert summaries[0]["labelled_episodes"] == ["1", "2"]
    assert summaries[0]["policy_hash"] == summaries[1]["policy_hash"]
    assert len(set(summaries[0]["policy_hash"].values())) == 2
    for name in ("labelled_probe_nmse", "policy_nmse"):
        assert list(summaries[0][name]) == ["1", "2"] and summaries[0][name] == summaries[1][name]


@pytest.mark.parametrize("method, labelled", [("lapo", ("1", "2")), ("bc", ("2",))])
def test_load_policy(new_run, method, labelled):
    fast = dict(bc_updates=30, decoder_updates=30, lr=1e-2, decoder_lr=1e-2)
    run, data, args = new_run(method=method, labelled_episodes=labelled, **fast)
    modules = train_all(run, data, args)
    policy = load_policy(run.folder, labelled[-1])

    def see(rows: np.ndarray) -> np.ndarray:  # (B, K, H, W, 3)
        return data.observe(rows).view(-1, 2, 3, SIZE, SIZE).permute(0, 1, 3, 4, 2).numpy()

    rows = data.train[:6]
    stacks = see(rows)
    actions = policy(stacks)
    assert policy.frame_stack == 2 and actions.shape == (6, 4) and actions.dtype == np.float32
    assert np.abs(actions).max() <= 1 and actions.std(0).max() > 1e-3
    with torch.no_grad():
        expected = modules["bc"](data.observe(rows))
        if method == "lapo":
            expected = modules[f"decoder_{labelled[-1]}"](expected)
    assert np.allclose(actions, expected.clamp(-1, 1), atol=1e-5)
    frames = stacks[:, -1]
    single = policy(frames[0])
    assert single.shape == (4,) and policy(frames).shape == (6, 4)
    twice = np.stack([frames, frames], axis=1)
    assert np.allclose(policy(frames), policy(twice), atol=1e-5), "one frame stands for the whole stack"
    assert np.allclose(single, policy(frames)[0], atol=1e-5)
    for part in (slice(0, 1), slice(2, 5)):
        assert np.allclose(policy(stacks[part]), actions[part], atol=1e-5), "an action depends on the batch"
    if method == "lapo":
        assert not np.allclose(load_policy(run.folder, "1")(stacks), actions, atol=1e-4)
        assert np.array_equal(load_policy(run.folder)(stacks), load_policy(run.folder, "1")(stacks))
    measured = json.loads((run.folder / "summary.json").read_text())["policy_nmse"]
    assert tuple(measured) == labelled
    expected = policy_nmse(data, lambda rows: policy(see(rows)))
    assert measured[labelled[-1]] == pytest.approx(expected, rel=1e-4)


def test_actions_are_clamped(new_run):
    run, data, args = new_run()
    train_all(run, data, args)
    checkpoint = torch.load(run.folder / "decoder_1.pt", weights_only=True)
    checkpoint["module"]["mlp.4.bias"] += torch.tensor([9.0, -9.0, 9.0, -9.0])
    torch.save(checkpoint, run.folder / "decoder_1.pt")
    with pytest.raises(SystemExit, match="decoder_1.pt is not what .*summary.json tells of"):
        load_policy(run.folder)
    summary = json.loads((run.folder / "summary.json").read_text())
    summary["per_stage"]["decoder_1"]["sha256"] = records.hash_weights(checkpoint["module"])
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert load_policy(run.folder)(np.zeros((SIZE, SIZE, 3), np.uint8)).tolist() == [1, -1, 1, -1]


# ------------------------------------------------------------ without a simulator


def test_videos_with_actions_train_all_stages(tmp_path, new_run):
    root = make_data(tmp_path / "videos", arrays=["frames", "episode", "step", "actions"])
    run, data, args = new_run(data=root, target="pixels", variant="")
    train_all(run, data, args)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["stages"] == ["lam", "bc", "decoder"] and summary["variant"] == "lapo-frame"
    assert summary["action_probe_nmse"] is not None and summary["leak_probe_r2"] is None


def test_videos_without_actions_train_two_stages_and_refuse_the_third(tmp_path):
    root = make_data(tmp_path / "videos", arrays=["frames", "episode", "step"])
    command = flags(data=root, target="pixels", out=tmp_path / "run", export=True)
    command[command.index("--export") :] = ["--export"]
    with pytest.raises(SystemExit) as error:
        lam_vlm.main(lam_vlm.parse_args(command))
    assert "stage 3 needs actions" in one_line(error)
    assert json.loads((tmp_path / "run/summary.json").read_text())["stages"] == ["lam", "bc"]
    assert (tmp_path / "run/latents.parquet").exists()
    lam_vlm.main(lam_vlm.parse_args([*command, "--stages", "lam", "bc"]))
    with pytest.raises(SystemExit) as error:
        clone = ["--no-export", "--method", "bc", "--labelled-episodes", "1"]
        lam_vlm.main(lam_vlm.parse_args([*command, *clone]))
    assert "no actions" in one_line(error)


# ------------------------------------------------------------ bad input


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of a SystemExit: a string makes Python print it to stderr and exit with status 1."""
    message = error.value.code
    assert isinstance(message, str) and ": " in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "changes, hints",
    [
        ({"tasks": ("door-open",)}, ["door-open", "reach, push"]),
        ({"encoder": "mode_up"}, ["mode_up", "made_up_L0"]),
        ({"labelled_episodes": ("5",)}, ["5", "1 to 4"]),
        ({"labelled_episodes": ("some",)}, ["some", "all"]),
        ({"supervision": -1.0}, ["--supervision"]),
        ({"supervision": 1.0, "labelled_episodes": ("1", "2")}, ["--supervision", "one value"]),
        ({"data": "data/none"}, ["data/none", "python collect.py --out data/none"]),
        ({"method": "bc"}, ["--labelled-episodes"]),
        ({"method": "bc", "labelled_episodes": ("1",), "supervision": 1.0}, ["--supervision", "--method bc"]),
        ({"batch_size": 0}, ["--batch-size"]),
        ({"idm_horizon": 0}, ["--idm-horizon"]),
        ({"lr": float("nan")}, ["--lr"]),
        ({"widths": (8, 0)}, ["--widths"]),
        ({"device": "tpu9"}, ["tpu9"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_flags_are_refused(new_run, changes, hints):
    with pytest.raises(SystemExit) as error:
        new_run(**changes)
    assert all(hint in one_line(error) for hint in hints), error.value.code


def test_labelled_episodes_shorter_than_the_gap(new_run, made_up, tmp_path):
    """Seed 2 labels the shortest: there is nothing to probe, and nothing to supervise stage 1 with."""
    short = dict(frame_gap=10, labelled_episodes=("1",), seed=2)
    lam_vlm.main(lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "whole", **short)))
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["labelled_probe_nmse"] == {"1": None} and summary["policy_hash"]["1"]
    with pytest.raises(SystemExit, match="longer than a gap of 10 steps"):
        lam_vlm.train_lam(*new_run(**short, supervision=1.0))


@pytest.fixture
def copy(made_up, tmp_path) -> Path:
    """A copy of the made-up data that a test may damage."""
    return Path(shutil.copytree(made_up, tmp_path / "data"))


def foreign_cache(data: Path) -> Path:
    path = data / "push/shard_00001/embeddings/made_up_L0.json"
    path.write_text(path.read_text().replace("frames of push", "frames of another"))
    return path.with_suffix(".npy")


def truncated(data: Path) -> Path:
    path = data / "push/shard_00001/frames.npy"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def missing_embeddings(data: Path) -> Path:
    (data / "push/shard_00001/embeddings/made_up_L0.json").unlink()
    return data / "push/shard_00001"


def unfinished(data: Path) -> Path:
    meta = json.loads((data / "meta.json").read_text())
    del meta["shards"]
    (data / "meta.json").write_text(json.dumps(meta))
    return data


def cut_json(data: Path) -> Path:
    (data / "meta.json").write_text((data / "meta.json").read_text()[:-9])
    return data / "meta.json"


def cut_about(data: Path) -> Path:
    path = data / "push/shard_00001/embeddings/made_up_L0.json"
    path.write_text(path.read_text()[:-9])
    return path


def rows_missing(data: Path) -> str:
    path = data / "push/shard_00001/actions.npy"
    np.save(path, np.load(path)[:-1])
    return "actions.npy"


@pytest.mark.parametrize(
    "damage", [foreign_cache, truncated, missing_embeddings, unfinished, cut_json, cut_about, rows_missing]
)
def test_damaged_data_is_named(new_run, copy, damage):
    named = damage(copy)
    with pytest.raises(SystemExit) as error:
        new_run(data=copy)
    assert str(named) in one_line(error)


def test_an_ambiguous_encoder_lists_its_names(new_run, copy):
    for path in list(copy.rglob("made_up_L0.*")):
        shutil.copy(path, path.with_name(path.name.replace("L0", "L1")))
    with pytest.raises(SystemExit) as error:
        new_run(data=copy)
    assert "made_up_L0, made_up_L1" in one_line(error)
    assert new_run(data=copy, encoder="made_up_L1")[1].embedding["key"] == "made_up_L1"


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(new_run, monkeypatch):
    calls, standardise = itertools.count(), lam_vlm.LAM.standardise

    def break_at_the_eleventh(lam: lam_vlm.LAM, change: Tensor) -> Tensor:
        return standardise(lam, change) * (float("nan") if next(calls) >= 10 else 1)

    monkeypatch.setattr(lam_vlm.LAM, "standardise", break_at_the_eleventh)
    run, data, args = new_run(lam_updates=30)  # checkpoints at updates 4, 8, ...
    with pytest.raises(SystemExit) as error:
        lam_vlm.train_lam(run, data, args)
    assert "loss is nan near update 11" in one_line(error)
    checkpoint = torch.load(run.folder / "lam.pt", weights_only=True)
    assert checkpoint["update"] == 8 and all(
        value.isfinite().all() for value in checkpoint["module"].values()
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def finished(new_run, made_up, tmp_path) -> Path:
    """The folder of a finished run of stage 1 that no process holds any more."""
    args = lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "finished"))
    run, data = lam_vlm.open_run(args)
    train_all(run, data, args)
    run.close()
    return run.folder


def test_the_codes_version_is_dirty_where_code_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "common/records.py"))
    (tmp_path / "common").mkdir()
    assert records.code_version() == "none"
    files = [tmp_path / "common/records.py", tmp_path / "report.md"]
    for file in files:
        file.write_text("committed")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "code"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit = records.code_version()
    assert len(commit) >= 7 and "-" not in commit
    files[1].write_text("another table")
    assert records.code_version() == commit
    files[0].write_text("another line")
    assert records.code_version() == f"{commit}-dirty"


def refused(finished: Path, made_up: Path, **changes: object) -> str:
    before = snapshot(finished)
    message = refusal(
        run_script("lam_vlm.py", *flags(**{"data": made_up, "out": finished} | changes), cwd=finished.parent)
    )
    assert snapshot(finished) == before, "a refused command changed the run"
    return message


def test_other_arguments_in_the_same_folder_are_refused(finished, made_up):
    message = refused(finished, made_up, latent_dim=6)
    assert "latent_dim: 5 there, 6 here" in message and "--out" in message


def test_a_run_in_use_is_refused(finished, made_up):
    with open(finished / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another process is writing {finished}" in refused(finished, made_up)


def test_a_truncated_checkpoint_is_named_and_refused(finished, made_up):
    content = (finished / "lam.pt").read_bytes()
    (finished / "lam.pt").write_bytes(content[: len(content) // 2])
    assert str(finished / "lam.pt") in refused(finished, made_up)


def test_a_foreign_checkpoint_is_named_and_refused(finished, made_up, new_run):
    other = new_run(seed=1)
    train_all(*other)
    shutil.copy(other[0].folder / "bc.pt", finished / "bc.pt")
    assert str(finished / "bc.pt") in refused(finished, made_up)


def test_a_stage_whose_earlier_one_has_changed_is_named_and_refused(made_up, tmp_path):
    """As after a damaged lam.pt was deleted and trained again: bc.pt has learnt other latents."""
    lam_vlm.main(lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "whole")))
    checkpoint = torch.load(tmp_path / "whole/lam.pt", weights_only=True)
    for name, weight in checkpoint["module"].items():
        if name.startswith("idm."):
            weight.add_(0.1)
    torch.save(checkpoint, tmp_path / "whole/lam.pt")
    for stage, deleted in {"bc": "", "decoder_1": "bc.pt"}.items():
        ignore = shutil.ignore_patterns(deleted)
        copy = shutil.copytree(tmp_path / "whole", tmp_path / stage, ignore=ignore)
        with pytest.raises(SystemExit, match=f"{stage}.pt: an earlier stage has changed"):
            lam_vlm.main(lam_vlm.parse_args(flags(data=made_up, out=copy)))


def test_a_loss_that_explodes_ends_with_one_line(made_up, tmp_path):
    message = refusal(
        run_script("lam_vlm.py", *flags(data=made_up, out="run", lr=1e20, lam_updates=20), cwd=tmp_path)
    )
    assert "the loss is" in message and "--lr" in message


def test_load_policy_refuses_what_is_no_policy(new_run, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    half, data, args = new_run(stages=("lam",))
    lam_vlm.summarise(half, data, args, lam_vlm.train_lam(half, data, args))
    cases = {
        "no finished run": (tmp_path / "empty",),
        "1, 2": (finished, "3"),
        "only stage lam": (half.folder,),
    }
    for hint, arguments in cases.items():
        with pytest.raises(SystemExit) as error:
            load_policy(*arguments)
        assert hint in one_line(error)
    checkpoint = torch.load(finished / "bc.pt", weights_only=True)
    torch.save(checkpoint | {"finished": False}, finished / "bc.pt")  # it is being trained again
    with pytest.raises(SystemExit) as error:
        load_policy(finished)
    assert "bc.pt is not what" in one_line(error)
    (finished / "bc.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit) as error:
        load_policy(finished)
    assert "bc.pt" in one_line(error)
    stored = json.loads((finished / "args.json").read_text())
    (finished / "args.json").write_text(json.dumps(stored | {"flag_of_tomorrow": 1}))
    with pytest.raises(SystemExit) as error:
        load_policy(finished)
    assert "args.json has flag_of_tomorrow, unknown here" in one_line(error)


# ------------------------------------------------------------ several processes


def two_ranks(made_up: Path, cwd: Path, **changes: object) -> subprocess.Popen:
    arguments = flags(**{"data": made_up, "out": "two", "dtype": "float32"} | changes)
    return torchrun("lam_vlm.py", *arguments, cwd=cwd)


@pytest.mark.parametrize("target", ["embedding", "masked"])
def test_two_ranks_train_like_one(new_run, made_up, tmp_path, monkeypatch, target):
    """With the same global batch every loss and probe is that of one process, up to rounding."""
    changes = {"target": target, "lam_updates": 6, "bc_updates": 6, "decoder_updates": 6}
    if target == "masked":
        changes |= {"supervision": 1.0, "labelled_episodes": ("2",)}
    monkeypatch.setattr(runs, "LOG_EVERY", 50)
    one, data, args = new_run(dtype="float32", **changes)
    train_all(one, data, args)
    process = two_ranks(made_up, tmp_path, **changes)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and stdout.count("two: ") == 1, stderr  # rank 0 alone speaks
    mine, theirs = rows_of(one.folder), rows_of(tmp_path / "two")
    assert [(row["stage"], row["update"]) for row in mine] == [
        (row["stage"], row["update"]) for row in theirs
    ]
    for row, other in zip(mine, theirs):
        for name in row.keys() & {"loss", "fdm_loss", "action_loss", "action_probe_mse", "leak_probe_r2"}:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-4), (row["stage"], name)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["per_stage"]["lam"]["trained_on"]["ranks"] == 2
    assert set(summary["policy_hash"]) == set(args.labelled_episodes)


def test_a_rank_that_dies_ends_the_job_and_the_same_command_goes_on(made_up, tmp_path):
    changes = {"lam_updates": 400, "stages": ("lam",)}
    process = two_ranks(made_up, tmp_path, **changes)
    while not (tmp_path / "two/lam.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and "SIGKILL" in process.communicate()[1]
    update = torch.load(tmp_path / "two/lam.pt", weights_only=True)["update"]
    assert update < 400
    again = two_ranks(made_up, tmp_path, **changes)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0 and f"goes on at update {update}" in stdout, stderr
    assert json.loads((tmp_path / "two/summary.json").read_text())["stages"] == ["lam"]


def test_a_batch_that_can_not_be_divided_is_refused(made_up, tmp_path):
    process = two_ranks(made_up, tmp_path, batch_size=7)
    assert (
        "lam_vlm.py: --batch-size 7 can not be divided among 2 ranks" in process.communicate(timeout=300)[1]
        and process.returncode == 1
    )


# ------------------------------------------------------------ the paper's effect, small


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    """drawer-open, 12 episodes of 32 px, of which 2 are held out."""
    folder = tmp_path_factory.mktemp("small")
    command = (
        "--episodes-per-task 12 --shard-episodes 3 --size 32 --camera corner --seed 0 --workers 2".split()
    )
    made = run_script("collect.py", *command, "--prompt", "best", "blind", "--out", "small", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "small"


def test_a_promptable_target_finds_the_action_where_pixels_find_the_background(
    small_data, new_run, monkeypatch
):
    """Mean of two seeds, held-out episodes. Measured: NMSE .62 best, .74 clean, .89 blind, .93 pixels."""
    monkeypatch.setattr(runs, "LOG_EVERY", 50)
    monkeypatch.setattr(runs, "CHECKPOINT_EVERY", 200)
    targets = {
        "best": ("embedding", "oracle_best"),
        "blind": ("embedding", "oracle_blind"),
        "clean": ("clean", ""),
        "pixels": ("pixels", ""),
    }
    network = dict(widths=(16, 32), stem=4, latent_dim=16, fdm_hidden=256, frame_gap=4, frame_stack=1)
    probes = {name: [] for name in targets}
    for seed, (name, (target, encoder)) in itertools.product((0, 1), targets.items()):
        run, data, args = new_run(
            data=small_data,
            target=target,
            encoder=encoder,
            fdm_sees="z",
            stages=("lam",),
            lam_updates=150,
            batch_size=64,
            idm_horizon=1,
            seed=seed,
            **network,
        )
        lam_vlm.train_lam(run, data, args)
        probes[name].append(run.training["lam"].results)
    nmse, leak, state = (
        {name: np.mean([row[key] for row in rows]) for name, rows in probes.items()}
        for key in ("action_probe_nmse", "leak_probe_r2", "state_probe_r2")
    )
    assert nmse["best"] < nmse["pixels"] - 0.15 and nmse["clean"] < nmse["pixels"] - 0.08, nmse
    assert nmse["best"] < nmse["blind"] - 0.1, nmse
    assert state["best"] > state["pixels"] + 0.2, state
    assert leak["blind"] > leak["best"] + 0.08, leak


# ------------------------------------------------------------ arguments


def test_presets():
    assert lam_vlm.parse_args([]) == lam_vlm.parse_args(["quick"]) == lam_vlm.QUICK
    paper = lam_vlm.parse_args(["paper", "--seed", "3"])
    assert (
        paper.seed == 3
        and paper.latent_dim == 128
        and paper.lam_updates == lam_vlm.PAPER.lam_updates > lam_vlm.QUICK.lam_updates
    )


def test_every_flag_has_help(capsys):
    tree = ast.parse(Path(lam_vlm.__file__).read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    with pytest.raises(SystemExit):
        lam_vlm.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(body) == 2 * len(lam_vlm.Args.__dataclass_fields__)
    for flag, doc in zip(body[::2], body[1::2], strict=True):
        assert f"--{flag.target.id.replace('_', '-')}" in text and doc.value.value in text


# ------------------------------------------------------------ what a slip of one line would change


@pytest.mark.parametrize("seed", [0, 1])
def test_what_an_update_draws(new_run, monkeypatch, seed):
    """The transitions of an update come from (seed, stage, update)."""
    run, data, args = new_run(seed=seed, lam_updates=2)
    expected = [np.random.default_rng([seed, 1, k]).choice(data.train, 8) for k in range(2)]
    seen, module = [], nn.Linear(1, 1)
    for step in run.steps("lam", module, *runs.one_cycle(module, 1e-3, 0.0, 2), 2):
        seen.append(step.rng.choice(data.train, 8))
        step.log(loss=torch.zeros(()))
    assert np.array_equal(seen, expected)


def test_the_weight_decay_is_the_flags():
    optimizer, _ = runs.one_cycle(nn.Linear(2, 2), 1e-3, 0.3, 4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_flags_of_the_split_reach_the_data(new_run):
    orders = [new_run(seed=seed)[1].label_order[0].tolist() for seed in range(6)]
    assert orders == LABEL_ORDERS
    assert new_run(train_episodes=3)[1].n_train == [3, 3]
    assert new_run(probe_fraction=0.4)[1].n_held_out == [2, 2]


def other_frames(root: Path) -> None:
    (root / "meta.json").write_text((root / "meta.json").read_text().replace("frames of", "new frames of"))
    for path in root.rglob("made_up_L0.json"):
        path.write_text(path.read_text().replace("frames of", "new frames of"))


def other_embeddings(root: Path) -> None:
    for path in root.rglob("made_up_L0.json"):
        path.write_text(path.read_text().replace("embeddings of", "new embeddings of"))


@pytest.mark.parametrize("change", [other_frames, other_embeddings])
def test_a_run_of_other_data_is_refused(copy, tmp_path, change):
    args = lam_vlm.parse_args(flags(data=copy, out=tmp_path / "run"))
    lam_vlm.main(args)
    change(copy)
    with pytest.raises(SystemExit, match="belongs to another run"):
        lam_vlm.main(args)


def test_the_policy_of_other_data_is_refused(copy, tmp_path):
    """Same arguments, data made anew: weights of one run do not load in the other's folder."""
    for name in ("old", "new"):
        lam_vlm.main(lam_vlm.parse_args(flags(data=copy, out=tmp_path / name)))
        other_frames(copy)
    shutil.copy(tmp_path / "old/bc.pt", tmp_path / "new/bc.pt")
    with pytest.raises(SystemExit, match="belongs to another run"):
        load_policy(tmp_path / "new")


def test_supervision_sees_transitions_of_the_labelled_episodes(new_run, monkeypatch):
    """Both frames of one episode, a gap apart."""
    run, data, args = new_run(supervision=1.0, labelled_episodes=("2",), batch_size=400, lam_updates=1)
    seen, forward = [], lam_vlm.IDM.forward
    watch = lambda idm, *frames: seen.append(frames) or forward(idm, *frames)  # noqa: E731
    monkeypatch.setattr(lam_vlm.IDM, "forward", watch)
    lam_vlm.train_lam(run, data, args)
    now, after = (frames[:, -3:, 0, 0].numpy().astype(int) for frames in seen[1])
    assert np.array_equal(after - now, np.tile([0, 0, GAP], (400, 1)))


def test_supervised_latents_are_not_probed_where_they_learnt_the_actions(new_run):
    run, data, args = new_run(supervision=1.0, labelled_episodes=("2",))
    train_all(run, data, args)
    assert json.loads((run.folder / "summary.json").read_text())["labelled_probe_nmse"] == {}


def test_under_supervision_another_label_budget_is_another_run(made_up, tmp_path):
    same = dict(data=made_up, out=tmp_path / "run", supervision=1.0)
    lam_vlm.main(lam_vlm.parse_args(flags(**same, labelled_episodes=("2",))))
    with pytest.raises(SystemExit, match="labelled_episodes"):
        lam_vlm.open_run(lam_vlm.parse_args(flags(**same, labelled_episodes=("1",))))


def test_what_torch_draws_is_new_in_each_update_and_run(new_run):
    drawn = []
    for seed in (0, 1):
        run, _, _ = new_run(seed=seed)
        module = nn.Linear(1, 1)
        for step in run.steps("lam", module, *runs.one_cycle(module, 1e-3, 0.0, 3), 3):
            drawn.append(float(torch.rand(())))
            step.log(loss=torch.zeros(()))
    assert len(set(drawn)) == 6
