"""Data, models, probes and stages of lam_vlm.py: on made-up data where only the plumbing counts, on real data at the end."""

import ast
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_when, refusal, run_script, start_script
from torch import Tensor, nn

import lam_vlm
from lam_vlm import Dataset, Probes, Run, load_policy, r2_score, random_shift, ridge

TASKS = ("reach", "push")
SIZE, EPISODES, LENGTH, GAP = 16, 5, 9, 2  # the last episode is held out; slot s has LENGTH + s frames; a transition spans GAP steps
TARGETS = ("pixels", "clean", "masked", "embedding")
FLAGS = dict(
    method="lapo", target="embedding", encoder="made_up", fdm_input="target", labelled_episodes=("1", "2"), latent_dim=5, idm_horizon=2,
    frame_gap=GAP, frame_stack=2, stages=("lam", "bc", "decoder"), widths=(4, 8), res_blocks=1, stem=2, fdm_hidden=16, fdm_dropout=0.1,
    lam_updates=4, bc_updates=4, decoder_updates=4, batch_size=8, lr=1e-3, decoder_lr=1e-3, weight_decay=1e-2, max_shift=2,
    decoder_noise=0.1, decoder_shifts=2, probe_fraction=0.2, log_every=1, resident="yes", device="cpu", seed=0,
)  # fmt: skip


def flags(**changes: object) -> list[str]:
    """Every flag spelt out: the script's defaults may change, these tests do not."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in (FLAGS | changes).items()}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", *map(str, value))]


def make_data(
    root: Path, other: Callable[[str, int], bool] = lambda name, slot: False, length: int = LENGTH, episodes: int = EPISODES
) -> Path:
    """A data set in collect.py's layout with random content: two tasks, two episodes a shard; the background is the left half.

    A frame's first pixel holds (task, episode, step). other(array, episode): whether that part is drawn from another seed.
    """
    meta = {"env": {"videos": "generated", "size": SIZE}, "tasks": list(TASKS), "episodes_per_task": episodes, "shards": []}
    for task, first in itertools.product(range(len(TASKS)), range(0, episodes, 2)):
        parts = []
        for slot in range(first, min(first + 2, episodes)):
            n = length + slot  # no two episodes of a task have the same length
            draw = lambda name: np.random.default_rng([task, slot, int(other(name, slot)), *name.encode()])  # noqa: B023, E731
            picture = {name: draw(name).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8) for name in ("frames", "clean")}
            picture["frames"][:, 0, 0] = np.stack([np.full(n, task), np.full(n, slot), np.arange(n)], axis=1)
            segments = draw("segments").integers(1, 5, (n, SIZE, SIZE), np.uint8)
            segments[:, :, : SIZE // 2] = 0
            part = {"actions": draw("actions").uniform(-1, 1, (n, 4)).astype(np.float32), "segments": segments, **picture}
            part |= {"states": draw("states").normal(size=(n, 39)).astype(np.float32), "episode": np.full(n, slot, np.int32)}
            parts.append(part | {"embedding": draw("embedding").normal(size=(n, 6)).astype(np.float16)})
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        name = f"{TASKS[task]}/shard_{first // 2:05d}"
        (root / name / "embeddings").mkdir(parents=True)
        np.save(root / name / "embeddings/made_up_L0.npy", arrays.pop("embedding"))
        for key, array in arrays.items():
            np.save(root / name / f"{key}.npy", array)
        about = {"frames_sha256": f"frames of {name}", "sha256": f"embeddings of {name}"}
        (root / name / "embeddings/made_up_L0.json").write_text(json.dumps(about))
        meta["shards"].append({"shard": name, "frames": len(arrays["frames"]), "sha256": {"frames": f"frames of {name}"}})
    (root / "meta.json").write_text(json.dumps(meta))
    return root


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("made_up"))


@pytest.fixture
def dataset(made_up):
    """dataset(**flags) -> the Dataset that a run of those flags reads."""
    return lambda **changes: Dataset(lam_vlm.parse_args(flags(**{"data": made_up} | changes)), torch.device("cpu"))


@pytest.fixture
def new_run(made_up, tmp_path):
    """new_run(**flags) -> a Run in a folder of its own; let go at the end."""
    runs = []

    def make(**changes: object) -> Run:
        runs.append(lam_vlm.open_run(lam_vlm.parse_args(flags(**{"data": made_up, "out": tmp_path / f"run{len(runs)}"} | changes))))
        return runs[-1]

    yield make
    for run in runs:
        os.close(run.lock)


def train_all(run: Run) -> dict[str, nn.Module]:
    """The stages of lam_vlm.main in this process: {stage: the module it leaves}."""
    modules = {} if run.args.method == "bc" else {"lam": lam_vlm.train_lam(run)}
    modules["bc"] = lam_vlm.train_bc(run, modules.get("lam"))
    if run.args.method == "lapo":
        modules |= {f"decoder_{count}": lam_vlm.train_decoder(run, modules["bc"], count) for count in run.args.labelled_episodes}
    lam_vlm.summarise(run)
    return modules


def what_is_trained(run: Run, monkeypatch) -> dict[str, tuple[nn.Module, Callable, Callable]]:
    """{stage: (module, make(rng) -> batch, loss_of(batch))} of each stage, without training."""
    caught = {}

    def catch(run: Run, stage: str, module: nn.Module, updates: int, lr: float, make: Callable, loss_of: Callable, *_: Callable) -> None:
        caught[stage] = module, make, loss_of

    monkeypatch.setattr(lam_vlm, "train", catch)
    lam_vlm.train_decoder(run, lam_vlm.train_bc(run, lam_vlm.train_lam(run)), "2")
    for module, _, _ in caught.values():
        module.train().requires_grad_(True)
    return caught


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stored_in(frames: Tensor) -> np.ndarray:
    """(task, episode, step) of made-up frames, from the first pixel of the newest frame of a stack: int (B, 3)."""
    return frames[:, -3:, 0, 0].numpy().astype(int)


# ------------------------------------------------------------------------------------------------ data


def test_transitions_stay_within_an_episode_and_splits_apart(dataset):
    data = dataset()
    frames, used = data.columns["frames"], []
    for rows, episodes in ((data.train, range(EPISODES - 1)), (data.held_out, [EPISODES - 1])):
        now, after = (frames[r][:, 0, 0].numpy().astype(int) for r in (rows, rows + GAP))
        assert np.array_equal(after - now, np.tile([0, 0, GAP], (len(rows), 1))), "same task, same episode, GAP steps later"
        assert set(now[:, 1]) == set(episodes)
        used += map(tuple, now)
    assert len(used) == len(set(used)) == len(TASKS) * sum(LENGTH + slot - GAP for slot in range(EPISODES)), "every transition once"


def test_an_observation_never_reaches_over_its_episodes_start(dataset):
    data = dataset()
    rows = np.arange(data.columns["frames"].ends[-1])
    observation = data.observe(rows, 3)
    assert observation.shape == (len(rows), 9, SIZE, SIZE) and observation.dtype == torch.uint8
    task, episode, step = stored_in(observation).T
    for back in range(3):  # frames back steps ago, oldest first in the stack
        expected = np.stack([task, episode, np.maximum(step - back, 0)], axis=1)
        assert np.array_equal(observation[:, 6 - 3 * back : 9 - 3 * back, 0, 0].numpy(), expected)


def test_the_idm_never_sees_over_its_episodes_end(new_run, monkeypatch):
    run = new_run(idm_horizon=3, batch_size=400, target="pixels")
    now, future, target_now, target_next, _ = what_is_trained(run, monkeypatch)["lam"][1](np.random.default_rng(0))
    (task, episode, step), (task_k, episode_k, step_k) = stored_in(now).T, stored_in(future).T
    assert np.array_equal(task, task_k) and np.array_equal(episode, episode_k)
    ahead, left = step_k - step, LENGTH + episode - 1 - step
    horizon = {GAP, 2 * GAP, 3 * GAP}
    assert all(steps in {min(k, most) for k in horizon} for steps, most in zip(ahead, left)) and horizon <= set(ahead)
    assert (left < 3 * GAP).any(), "none of these could reach over the end"
    pixel = lambda pictures: ((pictures[:, :, 0, 0] + 0.5) * 255).round().numpy().astype(int)  # noqa: E731
    assert np.array_equal(pixel(target_now), np.stack([task, episode, step], 1))
    assert np.array_equal(pixel(target_next), np.stack([task, episode, step + GAP], 1)), "the target stays one gap ahead"


def test_label_budgets_are_nested_and_of_the_right_size(dataset):
    data, sets = dataset(), {}
    for count in ("1", "2", "3", "all"):
        rows = data.labelled(count)
        sets[count] = set(rows)
        chosen = {tuple(pixel[:2]) for pixel in stored_in(data.observe(rows, 1))}
        assert len(chosen) == len(TASKS) * (EPISODES - 1 if count == "all" else int(count)), "of each task"
    assert sets["1"] < sets["2"] < sets["3"] < sets["all"]
    assert len(sets["all"]) == len(TASKS) * sum(LENGTH + slot - 1 for slot in range(EPISODES - 1)), "every frame but an episode's last"
    assert len({tuple(dataset(seed=seed).labelled("1")) for seed in range(6)}) > 1, "the seed chooses"


def test_no_stage_trains_on_held_out_episodes_or_unlabelled_actions(tmp_path, new_run, dataset):
    """All weights, statistics included, are equal where only held-out episodes and the actions without a label differ."""
    labelled = dataset().order[:2]
    held_out = make_data(tmp_path / "held_out", lambda name, slot: slot == EPISODES - 1)
    unlabelled = make_data(tmp_path / "unlabelled", lambda name, slot: name in ("actions", "states") and slot not in labelled)
    seen = make_data(tmp_path / "seen", lambda name, slot: name == "actions" and slot == labelled[0])
    expected = {stage: weights(module) for stage, module in train_all(new_run()).items()}
    for data in (held_out, unlabelled):
        for stage, module in train_all(new_run(data=data)).items():
            assert same(expected[stage], weights(module)), (data.name, stage)
    changed = train_all(new_run(data=seen))
    assert [same(expected[stage], weights(changed[stage])) for stage in ("lam", "bc", "decoder_1")] == [True, True, False]


def test_supervision_uses_the_actions_of_labelled_episodes_alone(tmp_path, new_run, dataset):
    """Stage 1 changes with a labelled action, not with an unlabelled one, and its z then tells the action better."""
    labelled = dataset(labelled_episodes=("2",)).order[:2]
    unlabelled = make_data(tmp_path / "unlabelled", lambda name, slot: name in ("actions", "states") and slot not in labelled)
    seen = make_data(tmp_path / "seen", lambda name, slot: name == "actions" and slot == labelled[0])
    supervised = dict(supervision=5.0, labelled_episodes=("2",), lam_updates=80, lr=1e-2, log_every=80)
    run = new_run(**supervised)
    trained = lam_vlm.train_lam(run)
    other, changed = (lam_vlm.train_lam(new_run(**supervised, data=data)) for data in (unlabelled, seen))
    assert same(weights(trained), weights(other)) and not same(weights(trained), weights(changed))
    assert not same(weights(trained.idm), weights(lam_vlm.train_lam(new_run(**supervised | {"supervision": 0.0})).idm))
    rows = np.intersect1d(run.data.labelled("2"), run.data.train)
    batch = run.data.observe(rows, 2), run.data.observe(rows + GAP, 1), run.data.columns["actions"][rows]
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.mse_loss(lam.action_head(lam.idm(*batch[:2])), batch[2]))
            for lam in (trained, lam_vlm.LAM(run.data, run.args))
        ]
    assert losses[0] < 0.7 * losses[1]


def test_statistics_are_those_of_the_training_split(new_run, monkeypatch):
    run = new_run(target="embedding")
    lam = what_is_trained(run, monkeypatch)["lam"][0]
    now, after = (run.data.columns["embedding"][run.data.train + ahead].float() for ahead in (0, GAP))
    assert torch.allclose(lam.mean, now.mean(0), atol=1e-5) and torch.allclose(lam.std, now.std(0), atol=1e-5)
    assert torch.allclose(lam.change_mean, (after - now).mean(0), atol=1e-5)
    assert torch.allclose(lam.change_std, (after - now).std(0), atol=1e-5)


def test_resident_data_and_data_read_from_files_give_the_same_weights(new_run):
    modules = [train_all(new_run(resident=resident)) for resident in ("yes", "no")]
    for stage in modules[0]:
        assert same(weights(modules[0][stage]), weights(modules[1][stage])), stage


def test_rows_read_from_files_are_those_asked_for(tmp_path, monkeypatch):
    arrays = [np.random.default_rng(s).integers(0, 255, (n, 2, 3), np.uint8) for s, n in enumerate((700, 1, 650))]
    for s, array in enumerate(arrays):
        np.save(tmp_path / f"{s}.npy", array)
    column = lam_vlm.Column([tmp_path / f"{s}.npy" for s in range(3)], torch.device("cpu"))
    whole, reads, preadv = np.concatenate(arrays), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: reads.append(len(into)) or preadv(file, into, at))
    for r in np.arange(1351), np.array([5, 5, 6, 700, 699, 701, 1350, 0]), np.random.default_rng(3).integers(0, 1350, 700):
        reads.clear()
        assert np.array_equal(column[r].numpy(), whole[r]) and sum(reads) == len(r)
        if len(r) == 1351:
            assert max(reads) <= 512 and len(reads) < 7, "neighbours are read together"


# ------------------------------------------------------------------------------------------------ models and losses


@pytest.mark.parametrize("target, fdm_input", [*itertools.product(TARGETS, ["target"]), ("embedding", "pixels"), ("clean", "pixels")])
def test_the_gradient_reaches_idm_and_fdm_but_never_the_target(new_run, monkeypatch, target, fdm_input):
    run = new_run(target=target, fdm_input=fdm_input, fdm_dropout=0.0)
    lam, make, loss_of = what_is_trained(run, monkeypatch)["lam"]
    batch = list(make(np.random.default_rng(0)))
    batch[2], batch[3] = batch[2].requires_grad_(), batch[3].requires_grad_()
    loss_of(tuple(batch)).backward()
    for name, parameter in lam.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert batch[3].grad is None
    assert fdm_input == "target" and target in ("clean", "embedding") or batch[2].grad is None, (
        "o_t counts as the FDM's input, not as target"
    )


@pytest.mark.parametrize("target", ["pixels", "embedding"])
def test_full_dropout_leaves_the_forward_model_nothing_but_z(new_run, monkeypatch, target):
    predictions = {}
    for dropout in (0.0, 1.0):
        lam, make, _ = what_is_trained(new_run(target=target, fdm_dropout=dropout), monkeypatch)["lam"]
        now, _, target_now, *_ = make(np.random.default_rng(0))
        start = target_now if target == "embedding" else lam_vlm.to_float(now)
        z = torch.ones(1, 5).expand(len(start), -1)
        predictions[dropout] = lam.fdm(start, z)
        assert not torch.equal(lam.fdm(start, 2 * z), predictions[dropout])
    assert torch.allclose(predictions[1.0], predictions[1.0][:1].expand_as(predictions[1.0]), atol=1e-6)
    assert predictions[0.0].std(0).mean() > 1e-3


def test_the_masked_loss_counts_only_the_robots_pixels(new_run, monkeypatch):
    lam, make, loss_of = what_is_trained(new_run(target="masked", fdm_dropout=0.0), monkeypatch)["lam"]
    now, future, target_now, target_next, weight = make(np.random.default_rng(0))
    assert weight.mean() == pytest.approx(1) and not weight[..., : SIZE // 2].any(), "the left half is background"
    assert len(weight.unique()) == 2
    change = lambda where: loss_of((now, future, target_now, torch.where(where, 0.5 - target_next, target_next), weight)).item()  # noqa: E731
    loss = loss_of((now, future, target_now, target_next, weight)).item()
    assert change(weight == 0) == pytest.approx(loss, rel=1e-6) and change(weight > 0) != pytest.approx(loss, rel=1e-3)
    z, target = lam.idm(now, future), (target_next - target_now - lam.change_mean) / lam.change_std
    errors = ((lam.fdm(lam_vlm.to_float(now), z) - target) ** 2)[weight.expand_as(target) > 0]
    assert loss == pytest.approx(errors.mean().item(), rel=1e-5)


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
    run = new_run()
    lam = lam_vlm.train_lam(run)
    lam_before = weights(lam)
    policy = lam_vlm.train_bc(run, lam)
    policy_before = weights(policy)
    lam_vlm.train_decoder(run, policy, "2")
    assert same(weights(lam), lam_before) and same(weights(policy), policy_before)
    assert not any(parameter.requires_grad for module in (lam, policy) for parameter in module.parameters())


def test_the_checkpoint_carries_the_scale_of_the_latents(new_run):
    run = new_run()
    lam = lam_vlm.train_lam(run)
    saved = torch.load(run.folder / "lam.pt", weights_only=True)["module"]
    with torch.no_grad():
        scale = lam_vlm.encode(lam.idm, run.data, run.args, run.data.train).std()
    assert same(saved, weights(lam)) and saved["latent_std"] != 1 and torch.isclose(saved["latent_std"], scale)


@pytest.mark.parametrize("target", TARGETS)
def test_one_batch_can_be_learnt_by_heart(tiny_data, new_run, monkeypatch, target):
    """In every stage, on real frames: what a bug in gradient, shapes or pairing prevents."""
    run = new_run(data=tiny_data, encoder="oracle_best", target=target, labelled_episodes=("2",), batch_size=4, widths=(16, 32), stem=4,
                  fdm_hidden=64, fdm_dropout=0.0, decoder_noise=0.0, latent_dim=8)  # fmt: skip
    for stage, (module, make, loss_of) in what_is_trained(run, monkeypatch).items():
        batch = make(np.random.default_rng(1))
        optimiser = torch.optim.Adam(module.parameters(), 3e-3)
        losses = []
        for _ in range(120):
            losses.append(loss_of(batch))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < (0.5 if stage == "lam" and target != "embedding" else 0.1) * losses[0], stage  # pictures take longer


GOLDEN = {  # meant to change with what they test; a failure shows the new values
    "pixels": {"lam": [1.067709, 1.043061], "bc": [0.961877, 0.926797], "decoder_2": [0.255821, 0.50117]},
    "clean": {"lam": [1.138114, 1.149407], "bc": [0.951983, 0.91518], "decoder_2": [0.255694, 0.502155]},
    "masked": {"lam": [1.122378, 1.077528], "bc": [0.982424, 0.9373], "decoder_2": [0.25573, 0.502089]},
    "embedding": {"lam": [1.23364, 1.455505], "bc": [0.986698, 0.952967], "decoder_2": [0.255738, 0.502079]},
    "bc": {"bc": [0.331937, 0.233727]},
}


@pytest.mark.parametrize("target", [*TARGETS, "bc"])
def test_golden_step(new_run, target):
    """Losses of the first two updates of each stage: data order, initial weights, loss and optimiser are what they were."""
    changes = {"method": "bc", "labelled_episodes": ("2",)} if target == "bc" else {"target": target}
    run = new_run(lam_updates=2, bc_updates=2, decoder_updates=2, dtype="float32", **changes)
    train_all(run)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {stage: [row["loss"] for row in rows if row["stage"] == stage] for stage in GOLDEN[target]}
    for stage, values in GOLDEN[target].items():
        assert losses[stage] == pytest.approx(values, abs=1e-4), (stage, losses)


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_takes_bfloat16_only_where_the_processor_has_it(new_run, monkeypatch, capsys, has_it):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_it, "amx_bf16": False})
    run = new_run()
    assert run.args.dtype == ("bfloat16" if has_it else "float32") and run.dtype == getattr(torch, run.args.dtype)
    assert ("the hardware has it" if has_it else "no bfloat16") in capsys.readouterr().out


def test_bfloat16_trains_float32_weights_to_nearly_the_same_loss(new_run):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = new_run(lam_updates=20, stages="lam", dtype=dtype)
        lam = lam_vlm.train_lam(run)
        assert all(value.dtype == torch.float32 for value in lam.state_dict().values())
        losses[dtype] = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


# ------------------------------------------------------------------------------------------------ probes


def test_ridge_by_hand_and_in_closed_form():
    x, y = np.array([[3.0], [5.0]]), np.array([[0.0], [4.0]])  # standardised x: -1, 1; centred y: -2, 2; weight 4 / (2 + 2 penalty)
    assert ridge(x, y, penalty=1.0)(np.array([[3.0], [4.0], [7.0]])) == pytest.approx(np.array([[1.0], [2.0], [5.0]]))
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (40, 5)), rng.normal(size=(40, 2))
    z = (x - x.mean(0)) / x.std(0)
    stacked = np.concatenate([z, np.sqrt(0.1 * 40) * np.eye(5)]), np.concatenate([y - y.mean(0), np.zeros((5, 2))])
    expected = z @ np.linalg.lstsq(*stacked, rcond=None)[0] + y.mean(0)
    assert np.allclose(ridge(x, y, 0.1)(x), expected, atol=1e-6)


def test_r2_by_hand():
    y = np.array([[0.0], [2.0]])
    assert [r2_score(y, prediction) for prediction in (y, y * 0 + 1, y * 0)] == [1, 0, -1]
    assert np.isnan(r2_score(y * 0, y))


@pytest.fixture(scope="module")
def long_data(tmp_path_factory) -> Path:
    """Made-up data with enough transitions to fit probes on."""
    return make_data(tmp_path_factory.mktemp("long"), length=60, episodes=10)


@pytest.fixture
def probe(long_data, dataset, monkeypatch):
    """probe(z) -> the probes' measures of latents given as a function of (data, probes, rows)."""
    data = dataset(data=long_data)
    data.columns["actions"].whole[:, 3] = 0.5  # a dimension of the action that never changes
    probes = Probes(data, lam_vlm.parse_args(flags(data=long_data)))

    def measure(z: Callable) -> dict:
        monkeypatch.setattr(lam_vlm, "encode", lambda idm, data, args, rows: torch.as_tensor(z(data, probes, rows)))
        return probes(None)

    return measure


def true_action(data: Dataset, probes: Probes, rows: np.ndarray) -> np.ndarray:
    return data.columns["actions"][rows].numpy()


def background_change(data: Dataset, probes: Probes, rows: np.ndarray) -> np.ndarray:
    return probes.background(rows)[1]


def test_probes_of_true_actions(probe):
    result = probe(true_action)
    assert result["action_probe_nmse"] < 0.01 and result["action_probe_mse"] < 0.01
    assert [r2 is None or r2 > 0.99 for r2 in result["action_probe_r2"]] == [True] * 4
    assert result["action_probe_r2"][3] is None, "a constant dimension says nothing and is left out"
    assert abs(result["leak_probe_r2"]) < 0.1 and result["state_probe_r2"] < 0.1


def test_probes_of_the_backgrounds_change(probe):
    result = probe(background_change)
    assert result["leak_probe_r2"] > 0.8 and result["action_probe_nmse"] > 0.9
    both = probe(lambda *given: np.concatenate([true_action(*given), background_change(*given)], axis=1))
    assert both["leak_probe_r2"] > 0.8 and both["action_probe_nmse"] < 0.3


def test_the_leak_probe_takes_the_present_frame_out_of_either_side(probe):
    """z = o_t predicts half of the change (random frames return to the mean) and leaks nothing; z = 4 o_t + o_{t+1} hides its leak."""
    assert probe(lambda data, probes, rows: probes.background(rows)[0])["leak_probe_r2"] < 0.1
    assert probe(lambda data, probes, rows: np.tensordot([5, 1], probes.background(rows), 1))["leak_probe_r2"] > 0.7


def test_probes_of_the_change_of_state(probe):
    change = lambda data, probes, rows: (data.columns["states"][rows + GAP] - data.columns["states"][rows])[:, :18]  # noqa: E731
    assert probe(change)["state_probe_r2"] > 0.95
    assert probe(lambda data, probes, rows: np.random.default_rng(rows).normal(size=(len(rows), 5)))["state_probe_r2"] < 0.1


def test_probes_are_measured_on_held_out_episodes(long_data, dataset):
    """Latents that know the training episodes by heart and nothing else are worth nothing."""
    data = dataset(data=long_data)
    probes = Probes(data, lam_vlm.parse_args(flags(data=long_data)))
    assert not set(probes.rows[0]) - set(data.train) and set(probes.rows[1]) == set(data.held_out)


# ------------------------------------------------------------------------------------------------ runs and policies


def read_run(folder: Path) -> tuple[dict[str, dict], list[dict]]:
    """Checkpoints and metrics of a run."""
    checkpoints = {stage: torch.load(folder / f"{stage}.pt", weights_only=True) for stage in ("lam", "bc", "decoder_1", "decoder_2")}
    return checkpoints, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_twice_and_resumed_equals_uninterrupted(made_up, tmp_path):
    """kill -9 between two checkpoints of stage 1, then of stage 2; the same command goes on, to bit-equal weights and the same metrics."""
    long = dict(data=made_up, lam_updates=150, bc_updates=150, decoder_updates=40, log_every=5)
    command = ["lam_vlm.py", *flags(**long, out="killed")]

    def reached(stage: str, update: int) -> bool:
        path = tmp_path / "killed/metrics.jsonl"
        lines = path.read_text().splitlines()[-1:] if path.exists() else []
        row = json.loads(lines[0]) if lines and lines[0].endswith("}") else {}
        return row.get("stage") == stage and row["update"] >= update

    for stage in ("lam", "bc"):
        kill_when(start_script(*command, cwd=tmp_path), lambda stage=stage: reached(stage, 30))
        checkpoint = torch.load(tmp_path / f"killed/{stage}.pt", weights_only=True)
        assert 0 < checkpoint["update"] < 150 and checkpoint["update"] % 20 == 0
        assert not (tmp_path / "killed/summary.json").exists()
    for result in (run_script(*command, cwd=tmp_path), run_script("lam_vlm.py", *flags(**long, out="whole"), cwd=tmp_path)):
        assert result.returncode == 0, result.stderr
    (killed, metrics), (whole, expected) = read_run(tmp_path / "killed"), read_run(tmp_path / "whole")
    for stage in whole:
        assert same(killed[stage]["module"], whole[stage]["module"]) and killed[stage]["update"] == whole[stage]["update"]
    keys = [(row["stage"], row["update"]) for row in metrics]
    assert len(keys) == len(set(keys)) and keys == [(row["stage"], row["update"]) for row in expected]
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")]
    for key in ("policy_hash", "stages", "action_probe_nmse", "action_probe_r2", "leak_probe_r2", "state_probe_r2", "data_hash"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["stages"] == ["lam", "bc", "decoder"]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names >= {
        "args.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "tensorboard",
        "lam.pt",
        "bc.pt",
        "decoder_1.pt",
        "decoder_2.pt",
    }
    again = run_script(*command, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("finished already") == 4


def test_stages_one_at_a_time_equal_all_at_once(made_up, tmp_path):
    folders = {name: tmp_path / name for name in ("at_once", "apart")}
    for name, stages in {"at_once": [("lam", "bc", "decoder")], "apart": [("lam",), ("bc",), ("decoder",)]}.items():
        for stage in stages:
            result = run_script("lam_vlm.py", *flags(data=made_up, out=folders[name], stages=stage), cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            done = json.loads((folders[name] / "summary.json").read_text())["stages"]
            assert done[-1] == stage[-1]
    hashes = [json.loads((folder / "summary.json").read_text())["policy_hash"] for folder in folders.values()]
    assert hashes[0] == hashes[1]


def test_a_label_budget_added_later_trains_its_decoder_alone(made_up, tmp_path):
    """The result equals that of both budgets in one command; the earlier policy keeps its hash, so its rollouts stay."""
    for out, budgets in (("apart", ("2",)), ("apart", ("1",)), ("at_once", ("1", "2"))):
        result = run_script("lam_vlm.py", *flags(data=made_up, out=tmp_path / out, labelled_episodes=budgets), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("finished already") == (2 if budgets == ("1",) else 0)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("apart", "at_once")]
    assert summaries[0]["labelled_episodes"] == ["1", "2"]
    assert summaries[0]["policy_hash"] == summaries[1]["policy_hash"] and len(set(summaries[0]["policy_hash"].values())) == 2


@pytest.mark.parametrize("method, labelled", [("lapo", ("1", "2")), ("bc", ("2",))])
def test_load_policy(new_run, method, labelled):
    run = new_run(method=method, labelled_episodes=labelled, bc_updates=30, decoder_updates=30, lr=1e-2, decoder_lr=1e-2)
    modules = train_all(run)
    policy = load_policy(run.folder, labelled[-1])
    rows = run.data.train[:6]
    stacks = run.data.observe(rows, 2).view(6, 2, 3, SIZE, SIZE).permute(0, 1, 3, 4, 2).numpy()  # (B, K, H, W, 3), oldest first
    actions = policy(stacks)
    assert policy.frame_stack == 2 and actions.shape == (6, 4) and actions.dtype == np.float32
    assert np.abs(actions).max() <= 1 and actions.std(0).max() > 1e-3
    with torch.no_grad():
        expected = modules["bc"](lam_vlm.to_float(run.data.observe(rows, 2)))
        expected = modules[f"decoder_{labelled[-1]}"](expected) if method == "lapo" else expected
    assert np.allclose(actions, expected.clamp(-1, 1), atol=1e-5)
    frames = stacks[:, -1]
    single = policy(frames[0])
    assert single.shape == (4,) and policy(frames).shape == (6, 4)
    assert np.allclose(policy(frames), policy(np.stack([frames, frames], axis=1)), atol=1e-5), "one frame stands for the whole stack"
    assert np.allclose(single, policy(frames)[0], atol=1e-5)
    for part in (slice(0, 1), slice(2, 5)):
        assert np.allclose(policy(stacks[part]), actions[part], atol=1e-5), "an action depends on the rest of the batch"
    if method == "lapo":
        assert not np.allclose(load_policy(run.folder, "1")(stacks), actions, atol=1e-4)
        assert np.array_equal(load_policy(run.folder)(stacks), load_policy(run.folder, "1")(stacks))


def test_actions_are_clamped(new_run):
    run = new_run()
    train_all(run)
    checkpoint = torch.load(run.folder / "decoder_1.pt", weights_only=True)
    checkpoint["module"]["mlp.4.bias"] += torch.tensor([9.0, -9.0, 9.0, -9.0])
    torch.save(checkpoint, run.folder / "decoder_1.pt")
    assert load_policy(run.folder)(np.zeros((SIZE, SIZE, 3), np.uint8)).tolist() == [1, -1, 1, -1]


# ------------------------------------------------------------------------------------------------ bad input


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of a SystemExit: a string makes Python print it to stderr and exit with status 1."""
    message = error.value.code
    assert isinstance(message, str) and message.startswith("lam_vlm.py: ") and "\n" not in message
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
        ({"batch_size": 0}, ["--batch-size"]),
        ({"idm_horizon": 0}, ["--idm-horizon"]),
        ({"device": "tpu9"}, ["tpu9"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_flags_are_refused(new_run, changes, hints):
    with pytest.raises(SystemExit) as error:
        new_run(**changes)
    assert all(hint in one_line(error) for hint in hints), error.value.code


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


@pytest.mark.parametrize("damage", [foreign_cache, truncated, missing_embeddings, unfinished, cut_json, cut_about, rows_missing])
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
    assert new_run(data=copy, encoder="made_up_L1").data.embedding["key"] == "made_up_L1"


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(new_run, monkeypatch):
    calls, loss = itertools.count(), lam_vlm.LAM.loss
    monkeypatch.setattr(lam_vlm.LAM, "loss", lambda lam, batch: loss(lam, batch) * (float("nan") if next(calls) >= 10 else 1))
    run = new_run(lam_updates=30)  # checkpoints at updates 4, 8, ...
    with pytest.raises(SystemExit) as error:
        lam_vlm.train_lam(run)
    assert "loss is nan near update 11" in one_line(error)
    checkpoint = torch.load(run.folder / "lam.pt", weights_only=True)
    assert checkpoint["update"] == 8 and all(value.isfinite().all() for value in checkpoint["module"].values())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def finished(new_run, made_up, tmp_path) -> Path:
    """The folder of a finished run of stage 1 that no process holds any more."""
    run = lam_vlm.open_run(lam_vlm.parse_args(flags(data=made_up, out=tmp_path / "finished")))
    train_all(run)
    os.close(run.lock)
    return run.folder


def refused(finished: Path, made_up: Path, **changes: object) -> str:
    before = snapshot(finished)
    message = refusal(run_script("lam_vlm.py", *flags(**{"data": made_up, "out": finished} | changes), cwd=finished.parent))
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
    train_all(other)
    shutil.copy(other.folder / "bc.pt", finished / "bc.pt")
    assert str(finished / "bc.pt") in refused(finished, made_up)


def test_a_loss_that_explodes_ends_with_one_line(made_up, tmp_path):
    message = refusal(run_script("lam_vlm.py", *flags(data=made_up, out="run", lr=1e20, lam_updates=20), cwd=tmp_path))
    assert "the loss is" in message and "--lr" in message


def test_load_policy_refuses_what_is_no_policy(new_run, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    half = new_run(stages=("lam",))
    lam_vlm.train_lam(half)
    lam_vlm.summarise(half)
    for arguments, hint in (((tmp_path / "empty",), "no finished run"), ((finished, "3"), "1, 2"), ((half.folder,), "only stage lam")):
        with pytest.raises(SystemExit) as error:
            load_policy(*arguments)
        assert hint in one_line(error)
    (finished / "bc.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit) as error:
        load_policy(finished)
    assert "bc.pt" in one_line(error)


# ------------------------------------------------------------------------------------------------ several processes


def torchrun(made_up: Path, cwd: Path, **changes: object) -> subprocess.Popen:
    """Two ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "lam_vlm.py")]
    command = [*launcher, *flags(**{"data": made_up, "out": "two", "dtype": "float32", "fdm_dropout": 1.0} | changes)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(folder: Path) -> dict[tuple, dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({(row["stage"], row["update"]) for row in rows}) == len(rows), "only one rank logs"
    return {(row["stage"], row["update"]): row for row in rows}


@pytest.mark.parametrize("target", ["embedding", "masked"])
def test_two_ranks_train_like_one(new_run, made_up, tmp_path, target):
    """With the same global batch every loss and probe is that of one process, up to rounding."""
    changes = {"target": target, "lam_updates": 6, "bc_updates": 6, "decoder_updates": 6}
    one = new_run(dtype="float32", fdm_dropout=1.0, **changes)
    train_all(one)
    process = torchrun(made_up, tmp_path, **changes)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and stdout.count("two: ") == 1, stderr  # rank 0 alone speaks
    mine, theirs = rows_of(one.folder), rows_of(tmp_path / "two")
    assert mine.keys() == theirs.keys()
    for key, row in mine.items():
        for name in row.keys() & {"loss", "action_probe_mse", "leak_probe_r2"}:
            assert theirs[key][name] == pytest.approx(row[name], rel=1e-4, abs=1e-4), (key, name)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["ranks"] == 2 and set(summary["policy_hash"]) == {"1", "2"}


def test_a_rank_that_dies_ends_the_job_and_the_same_command_goes_on(made_up, tmp_path):
    changes = {"lam_updates": 400, "stages": ("lam",), "log_every": 5}
    process = torchrun(made_up, tmp_path, **changes)
    while not (tmp_path / "two/lam.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    children = [int(line) for line in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(max(children), signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and "SIGKILL" in process.communicate()[1]
    update = torch.load(tmp_path / "two/lam.pt", weights_only=True)["update"]
    assert update < 400
    again = torchrun(made_up, tmp_path, **changes)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0 and f"goes on at update {update}" in stdout, stderr
    assert json.loads((tmp_path / "two/summary.json").read_text())["stages"] == ["lam"]


def test_a_batch_that_can_not_be_divided_is_refused(made_up, tmp_path):
    process = torchrun(made_up, tmp_path, batch_size=7)
    assert "lam_vlm.py: --batch-size 7 can not be divided among 2 ranks" in process.communicate(timeout=300)[1] and process.returncode == 1


# ------------------------------------------------------------------------------------------------ the paper's effect, small


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    """drawer-open, 12 episodes of 32 px, of which 2 are held out."""
    folder = tmp_path_factory.mktemp("small")
    command = "--episodes-per-task 12 --shard-episodes 3 --size 32 --camera corner --seed 0 --workers 2 --prompt best blind --out small"
    made = run_script("collect.py", *command.split(), cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "small"


def test_a_promptable_target_finds_the_action_where_pixels_find_the_background(small_data, new_run):
    """Mean of two seeds, held-out episodes. Measured: NMSE .62 best prompt, .74 clean, .89 blind, .93 pixels; leak -.10 best, .11 blind."""
    arms = {"best": ("embedding", "oracle_best"), "blind": ("embedding", "oracle_blind"), "clean": ("clean", ""), "pixels": ("pixels", "")}
    probes = {arm: [] for arm in arms}
    for seed, (arm, (target, encoder)) in itertools.product((0, 1), arms.items()):
        run = new_run(
            data=small_data, target=target, encoder=encoder, stages=("lam",), lam_updates=150, batch_size=64, widths=(16, 32), stem=4,
            latent_dim=16, fdm_hidden=256, frame_gap=4, frame_stack=1, idm_horizon=1, fdm_dropout=1.0, log_every=50, seed=seed,
        )  # fmt: skip
        lam_vlm.train_lam(run)
        probes[arm].append(run.probes)
    nmse, leak, state = (
        {arm: np.mean([row[key] for row in rows]) for arm, rows in probes.items()}
        for key in ("action_probe_nmse", "leak_probe_r2", "state_probe_r2")
    )
    assert nmse["best"] < nmse["pixels"] - 0.15 and nmse["clean"] < nmse["pixels"] - 0.08 and nmse["best"] < nmse["blind"] - 0.1, nmse
    assert state["best"] > state["pixels"] + 0.2, state
    assert leak["blind"] > leak["best"] + 0.08, leak


# ------------------------------------------------------------------------------------------------ arguments


def test_presets():
    assert lam_vlm.parse_args([]) == lam_vlm.parse_args(["quick"]) == lam_vlm.QUICK
    paper = lam_vlm.parse_args(["paper", "--seed", "3"])
    assert paper.seed == 3 and paper.latent_dim == 128 and paper.lam_updates == lam_vlm.PAPER.lam_updates > lam_vlm.QUICK.lam_updates


def test_every_flag_has_help(capsys):
    body = next(
        node.body for node in ast.parse(Path(lam_vlm.__file__).read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    with pytest.raises(SystemExit):
        lam_vlm.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(body) == 2 * len(lam_vlm.Args.__dataclass_fields__)
    for flag, doc in zip(body[::2], body[1::2], strict=True):
        assert f"--{flag.target.id.replace('_', '-')}" in text and doc.value.value in text
