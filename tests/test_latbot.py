"""latbot.py: words, masks, normalisation, flow, stages; on made-up data."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from conftest import kill_when, refusal, run_script, start_script, torchrun
from made_up import LABEL_ORDERS, SIZE, make_data, policy_nmse

import latbot
from common import runs
from common.backbones import VLMBackbone, spatial_entropy
from common.dataset import random_shift, to_float
from common.tasks import language_motion

SMALL = "--motion-dim 3 --scene-dim 5 --frames 3 --span 4 --tokens 2 --width 16 --heads 2 --blocks 1"
SMALL += " --widths 4 8 --stem 2 --batch-size 8 --teacher-updates 4 --student-updates 4 --expert-updates 4"
SMALL += " --labelled-episodes 2 --max-shift 2 --euler-steps 3 --device cpu --dtype float32"
GOLDEN = {"teacher": [2.279758, 2.313075], "student": [3.210009, 3.364762], "expert_2": [1.961996, 1.911203]}


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    root = make_data(tmp_path_factory.mktemp("made_up"))
    for path in root.glob("*/shard_*/states.npy"):  # a hand that moves by centimetres
        np.save(path, 0.02 * np.load(path))
    return root


@pytest.fixture(autouse=True)
def log_every_update(monkeypatch):
    monkeypatch.setattr(runs, "LOG_EVERY", 1)


def parse(data: Path, out: Path, *flags: object) -> latbot.Args:
    return latbot.parse_args([*SMALL.split(), "--data", str(data), "--out", str(out), *map(str, flags)])


@pytest.fixture
def new_run(made_up, tmp_path):
    """new_run(*flags) -> Run, Windows, Args, in a folder of its own; let go at the end."""
    opened = []

    def make(*flags: object):
        args = parse(made_up, tmp_path / f"run{len(opened)}", *flags)
        run, windows = latbot.open_run(args)
        opened.append(run)
        return run, windows, args

    yield make
    for run in opened:
        run.close()


def rows_of(folder: Path, stage: str) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


# ------------------------------------------------------------ words


@pytest.mark.parametrize(
    "change, words",
    [
        ((0, 0, 0, 0), "stay"),
        ((0.02, 0, 0, 0), "move right"),
        ((-0.02, 0.03, 0.005, 0), "move left and forward"),
        ((0.02, -0.02, -0.02, 0.1), "move right and back and down, open the gripper"),
        ((0, 0, 0.011, -0.2), "move up, close the gripper"),
        ((0.01, 0, 0, 0.05), "stay"),
    ],
)
def test_language_motions(change, words):
    now = np.zeros(39)
    later = now.copy()
    later[:4] = change
    assert language_motion(now, later) == words


def test_subtasks_are_those_of_the_labelled_episodes(new_run):
    _, windows, _ = new_run()
    _, all_windows, _ = new_run("--text", "all")
    states = windows.data.columns["states"]
    for row in windows.chunk_rows[:5]:
        name = windows.domain.subtasks[windows.subtask[row]]
        assert name == language_motion(*states[np.array([row, row + 4])])
    assert set(windows.text_rows) < set(all_windows.text_rows)
    assert len(all_windows.text_rows) == len(windows.data.train)
    assert set(windows.domain.subtasks) <= set(all_windows.domain.subtasks)
    assert new_run("--text", "none")[1].domain.subtasks == []


# ------------------------------------------------------------ models


def test_text_is_causal_and_nothing_else_sees_it(new_run):
    """A word's logits do not depend on it or on later ones; the queries do not depend on any."""
    _, windows, args = new_run()
    torch.manual_seed(0)
    student = latbot.Student(windows.domain, args).eval()
    backbone, rows = student.backbone, windows.text_rows[:2]
    first, task, subtask = windows.data.frame(rows), windows.task(rows), windows.subtask_of(rows)
    states, logits, targets = backbone(first[:, None], task, subtask)
    assert logits.shape[:2] == targets.shape
    assert torch.allclose(student.to_latents(states), student.latents(first, task), atol=1e-6)
    place = 1
    changed = backbone.subtasks.clone()
    backbone.subtasks[:, place] = (backbone.subtasks[:, place] + 1).clamp(0, 3)
    assert not torch.equal(changed, backbone.subtasks)
    other_states, other_logits, _ = backbone(first[:, None], task, subtask)
    assert torch.allclose(states, other_states, atol=1e-6)
    assert torch.allclose(logits[:, : place + 1], other_logits[:, : place + 1], atol=1e-6)
    assert not torch.allclose(logits[:, place + 1 :], other_logits[:, place + 1 :])
    text = [word for word in targets[0].tolist() if word >= 0]
    assert text[-1] == 0, "a text ends with <end>"


def test_attention_is_that_of_the_last_word(new_run):
    """Against its definition, by hand, for a backbone of one block."""
    _, windows, args = new_run()
    torch.manual_seed(0)
    student = latbot.Student(windows.domain, args).eval()
    rows = windows.text_rows[:3]
    words = windows.task(rows), windows.subtask_of(rows)
    maps = student.backbone.attention(windows.data.frame(rows)[:, None], *words)
    assert maps.shape == (3, SIZE // 4, SIZE // 4)  # stem 2 and one more block of stride 2
    tokens, hidden, before, targets = student.backbone.sequence(windows.data.frame(rows)[:, None], *words)
    (block,) = student.backbone.blocks.layers
    tokens = block.norm1(tokens)
    query, key, _ = (tokens @ block.self_attn.in_proj_weight.T + block.self_attn.in_proj_bias).chunk(3, 2)
    for row in range(3):
        end = before + int((targets[row] >= 0).sum()) - 1
        weights = []
        for of_head in np.split(np.arange(16), 2):
            scores = key[row, :, of_head] @ query[row, end, of_head] / 8**0.5
            weights.append(scores.masked_fill(hidden[end], -torch.inf).softmax(0))
        expected = torch.stack(weights).mean(0)[: maps[row].numel()]
        assert torch.allclose(maps[row].flatten(), expected, atol=1e-5)


def test_spatial_entropy_counts_places():
    """One place: 0. Two of the same area: log 2; corners touch; of areas 1 and 3: their entropy."""
    one, two, corner, unequal = np.zeros((4, 6, 6))
    one[1:3, 1:3] = 1
    two[0, 0] = two[5, 5] = 1
    corner[0, 0] = corner[1, 1] = 1
    unequal[0, :3] = unequal[4, 4] = 1
    for attention, expected in ((one, 0), (two, np.log(2)), (corner, 0), (unequal, 0.5623351)):
        assert spatial_entropy(attention[None]) == pytest.approx(expected)
    assert spatial_entropy(np.stack([one, two])) == pytest.approx(np.log(2) / 2)


def test_the_teacher_sees_every_frame_and_the_instruction(new_run):
    _, windows, args = new_run()
    teacher = latbot.Teacher(windows, args).eval()
    rows = windows.data.train[:2]
    frames, task = windows.frames(rows), windows.task(rows)
    assert frames.shape == (2, 3, 3, SIZE, SIZE)
    for index, ahead in enumerate((0, 2, 4)):
        assert torch.equal(frames[:, index], windows.data.frame(rows + ahead))
    states, _, _ = teacher.backbone(frames, task)
    for index in range(3):
        other = frames.clone()
        other[:, index] = 255 - other[:, index]
        assert not torch.allclose(teacher.backbone(other, task)[0], states)
    assert not torch.allclose(teacher.backbone(frames, 1 - task)[0], states)


@pytest.mark.parametrize("latents", ["split", "undivided"])
def test_streams_exchange_both_ways(new_run, latents):
    """Actions depend on the scene latent and the target on the motion latent, through the other stream."""
    _, windows, args = new_run("--latents", latents, "--fdm-sees", "z")
    decoder = latbot.Teacher(windows, args).decoder
    first, z = windows.data.frame(windows.data.train[:2]), torch.randn(2, 8, requires_grad=True)
    change, actions = decoder(first, z)
    assert change.shape == (2, 3, SIZE, SIZE) and actions.shape == (2, 4, 4)
    for output in (change, actions):
        (gradient,) = torch.autograd.grad(output.square().sum(), z, retain_graph=True)
        assert (gradient.abs().sum(0) > 0).all()
    assert torch.allclose(decoder(255 - first, z)[0], change), "it sees the latents alone"


def test_actions_may_be_read_from_the_motion_latent_alone(new_run):
    """As T7 assumes; of the first frame and, for the target, of both latents nothing is taken away."""
    _, windows, args = new_run("--actions-see", "motion")
    decoder = latbot.Teacher(windows, args).decoder
    first, z = windows.data.frame(windows.data.train[:2]), torch.randn(2, 8, requires_grad=True)
    change, actions = decoder(first, z)
    (of_change,) = torch.autograd.grad(change.square().sum(), z, retain_graph=True)
    (of_actions,) = torch.autograd.grad(actions.square().sum(), z)
    assert (of_change.abs().sum(0) > 0).all()
    assert (of_actions[:, : args.scene_dim] == 0).all() and (of_actions[:, args.scene_dim :] != 0).all()
    assert not torch.allclose(decoder(255 - first, z)[1], actions)


def test_a_target_vector_is_predicted(new_run):
    _, windows, args = new_run("--target", "embedding", "--encoder", "made_up")
    teacher = latbot.Teacher(windows, args)
    change, _ = teacher.decoder(windows.data.frame(windows.data.train[:2]), torch.randn(2, 8))
    assert change.shape == windows.data.target(windows.data.train[:2]).shape == (2, 6)


# ------------------------------------------------------------ actions


def test_normalisation_and_its_inverse(new_run):
    """Chunks come back as they were; the gripper has the two levels of its task's labelled episodes."""
    _, windows, args = new_run()
    expert = latbot.Expert(latbot.Student(windows.domain, args), windows.domain, args)
    expert.set_scale(windows, torch.randn(20, 8), args)
    rows = windows.labelled[-3:]
    motion, gripper = windows.chunk(rows)
    last = windows.data.last[rows] - 1
    steps = np.minimum(rows[:, None] + np.arange(4), last[:, None])
    actions = windows.data.columns["actions"][steps.reshape(-1)].reshape(3, 4, 4)
    back = (motion + 1) * expert.scale[:-1] + expert.low[:-1]
    assert np.allclose(back.numpy(), actions[..., :-1], atol=1e-6)
    (task,) = set(windows.data.task[rows])
    assert np.array_equal(gripper.numpy(), actions[..., -1] > windows.middle[task])
    for number in range(2):
        mine = windows.labelled[windows.data.task[windows.labelled] == number]
        values = windows.data.columns["actions"][mine][:, -1]
        middle = (values.min() + values.max()) / 2
        expected = [values[values <= middle].mean(), values[values > middle].mean()]
        assert np.allclose(windows.levels[number], expected)
    with torch.no_grad():
        acted = expert.act(torch.randn(40, 8), torch.randn(40, 4, 3), torch.tensor([0, 1] * 20))
    for number in range(2):
        assert set(acted[number::2, :, -1].flatten().tolist()) == set(expert.levels[number].tolist())


def test_flow_matching_recovers_two_modes(new_run):
    """Targets -1 and 1 in equal shares, whatever the condition: the flow gives both, and little between."""
    _, windows, args = new_run("--width", 32, "--euler-steps", 20)
    torch.manual_seed(0)
    expert = latbot.Expert(latbot.Student(windows.domain, args), windows.domain, args)
    optimizer = torch.optim.Adam(expert.flow.parameters(), 3e-3)
    for _ in range(600):
        sign = torch.randint(0, 2, (256, 1, 1)) * 2.0 - 1
        motion, noise, time = sign.expand(-1, 4, 3), torch.randn(256, 4, 3), torch.rand(256, 1)
        noisy = (1 - time[..., None]) * noise + time[..., None] * motion
        velocity = expert.velocity(torch.zeros(256, 8), noisy, time)
        loss = ((velocity - (motion - noise)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        task = torch.zeros(500, dtype=torch.long)
        acted = expert.act(torch.zeros(500, 8), torch.randn(500, 4, 3), task)
        samples = acted[..., :-1] - 1  # scale 1, low 0
    signs = samples.mean((1, 2)).sign()
    assert 0.35 < (signs > 0).float().mean() < 0.65
    assert (samples.abs() - 1).abs().mean() < 0.25, "near the modes"


def test_the_expert_sees_latents_of_the_same_size(new_run):
    """Each latent, with its own scale; or that of motion alone."""
    for sees, dims in (("both", 8), ("motion", 3)):
        _, windows, args = new_run("--expert-sees", sees)
        expert = latbot.Expert(latbot.Student(windows.domain, args), windows.domain, args)
        predicted = torch.randn(500, 8) * torch.tensor([9.0] * 5 + [0.1] * 3) + 4
        expert.set_scale(windows, predicted, args)
        seen = expert.condition(predicted)
        assert seen.shape == (500, dims) and seen.mean(0).abs().max() < 1e-4
        assert seen[:, -3:].std() == pytest.approx(1, abs=0.01) and seen.std() == pytest.approx(1, abs=0.01)
        assert expert.act(seen[:2], torch.randn(2, 4, 3), torch.tensor([0, 1])).shape == (2, 4, 4)


def test_distillation_against_its_definition(new_run):
    """Squared error and KL(predicted || wanted), each the mean of scene's and motion's of any size."""
    _, _, args = new_run()
    predicted, wanted = torch.randn(6, 8), torch.randn(6, 8)
    errors, divergences = [], []
    for part in (slice(0, 5), slice(5, 8)):
        errors.append(((predicted[:, part] - wanted[:, part]) ** 2).mean())
        p, q = (z[:, part].exp() / z[:, part].exp().sum(1, keepdim=True) for z in (predicted, wanted))
        divergences.append((p * (p / q).log()).sum(1).mean())
    found = latbot.distillation(predicted, wanted, args)
    assert float(found[0]) == pytest.approx(float(sum(errors) / 2), rel=1e-5)
    assert float(found[1]) == pytest.approx(float(sum(divergences) / 2), rel=1e-4)


# ------------------------------------------------------------ stages


def test_each_stage_can_learn_a_batch_by_heart(new_run):
    flags = (
        "--teacher-updates 300 --student-updates 300 --expert-updates 300 --max-shift 0 --lr 3e-3 --width 32"
    )
    run, windows, args = new_run(*flags.split(), "--student", "trains", "--width", 32)
    of_task = [rows[:2] for _, rows, _ in windows.data.probes()]
    windows.data.train = np.concatenate(of_task)
    windows.chunk_rows = windows.text_rows = windows.chunk_rows[:3]
    windows.labelled = windows.labelled[:3]
    student = latbot.train_student(run, windows, args, latbot.train_teacher(run, windows, args))
    expert = latbot.train_expert(run, windows, args, student)
    rows, actor = windows.labelled, latbot.ChunkActor(expert, windows.data.tasks, "cpu")
    errors = latbot.first_actions(actor, windows.data, rows).numpy() - windows.data.columns["actions"][rows]
    assert np.abs(errors).max() < 0.3, "the flow ends at the actions that it was trained on"
    for stage, name, factor in [
        ("teacher", "target_loss", 0.1),
        ("teacher", "arm_loss", 0.1),
        ("student", "latent_loss", 0.1),
        ("student", "text_loss", 0.1),
        ("expert_2", "gripper_loss", 0.1),
    ]:
        losses = [row[name] for row in rows_of(run.folder, stage)]
        assert losses[-1] < factor * losses[0], (stage, name, losses[0], losses[-1])


def test_the_student_sees_the_first_frame_alone(new_run):
    """The first logged losses by hand, from the frames of t and no others."""
    run, windows, args = new_run("--student-updates", 1, "--text", "none")
    data, latents = windows.data, torch.randn(len(windows.data.transitions), 8)
    torch.manual_seed(args.seed + 1)
    student = latbot.Student(windows.domain, args)
    rng = np.random.default_rng([args.seed, 2, 0])
    t, _ = rng.choice(data.train, 8), rng.choice(windows.text_rows, 2)
    shifts = torch.from_numpy(rng.integers(0, 2 * args.max_shift + 1, (8, 2)))
    with torch.no_grad():
        predicted = student.latents(random_shift(data.frame(t), shifts, args.max_shift), windows.task(t))
        expected = latbot.distillation(predicted, latents[data.position(t)], args)
    latbot.train_student(run, windows, args, latents)
    (row,) = rows_of(run.folder, "student")
    assert [row["latent_loss"], row["divergence"]] == pytest.approx([float(e) for e in expected], rel=1e-4)


def test_the_action_weight_is_of_the_action_losses(new_run):
    run, windows, args = new_run("--teacher-updates", 1, "--action-weight", 0.25)
    latbot.train_teacher(run, windows, args)
    (row,) = rows_of(run.folder, "teacher")
    expected = row["target_loss"] + 0.25 * (row["arm_loss"] + row["gripper_loss"])
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_actions_and_states_without_a_label_change_nothing(tmp_path):
    (labelled,) = LABEL_ORDERS[0][:1]
    hashes = []
    for name, changes in (("one", False), ("other", True)):

        def other(array: str, episode: int, changes: bool = changes) -> bool:
            return changes and array in ("actions", "states") and episode != labelled

        root = make_data(tmp_path / name / "data", other=other)
        latbot.main(parse(root, tmp_path / name / "run", "--labelled-episodes", 1))
        summary = json.loads((tmp_path / name / "run/summary.json").read_text())
        hashes.append({stage: summary["per_stage"][stage]["sha256"] for stage in summary["per_stage"]})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


def test_the_students_r2_is_of_the_teachers_latents(new_run, monkeypatch):
    """Half of a latent that has a mean: 1 - (half its second moment) / its variance."""
    _, windows, args = new_run("--text", "none")
    data = windows.data
    latents = torch.randn(len(data.transitions), 8) + 1
    held_out = [latents[data.position(rows)] for rows in data.by_task(data.held_out)]
    guesses = iter([part / 2 for of_task in held_out for part in of_task.split(args.batch_size)])
    student = latbot.Student(windows.domain, args)
    monkeypatch.setattr(student, "latents", lambda first, task: next(guesses))
    found = latbot.measure_student(student, windows, args, latents)
    for name, dims in (("scene", slice(0, 5)), ("motion", slice(5, 8))):
        scores = []
        for of_task in held_out:
            z = of_task[:, dims]
            scores.append(1 - float((z / 2).square().sum() / (z - z.mean(0)).square().sum()))
        assert found[f"{name}_said_r2"] == pytest.approx(np.mean(scores), abs=1e-4)


def test_frozen_means_frozen(new_run):
    """Distillation does not move the teacher's latents, nor the expert a frozen student; it does one that
    trains."""
    run, windows, args = new_run()
    latents = latbot.train_teacher(run, windows, args)
    assert latents.shape == (len(windows.data.transitions), 8) and not latents.requires_grad
    before = latents.clone()
    student = latbot.train_student(run, windows, args, latents)
    assert torch.equal(latents, before)
    assert torch.equal(latbot.train_teacher(run, windows, args), before), "the finished stage makes the same"
    before = {name: value.clone() for name, value in student.state_dict().items()}
    latbot.train_expert(run, windows, args, student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    args.student, args.labelled_episodes = "trains", ("1",)
    latbot.train_expert(run, windows, args, student)
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())


ROWS = {
    "": "latbot",
    "--latents undivided --action-weight 0": "undivided",
    "--action-weight 0": "split",
    "--latents undivided": "actions",
    "--latents none": "no-latents",
    "--latents none --text none": "no-latents-text-none",
    "--target embedding --encoder made_up": "latbot-made-up-L0-all",
    "--text all": "latbot-text-all",
    "--expert-sees motion --student trains": "latbot-motion-trains",
    "--text none --fdm-sees z": "latbot-z-text-none",
    "--actions-see motion": "latbot-actions-see-motion",
}


@pytest.mark.parametrize("flags", ROWS)
def test_from_end_to_end(made_up, tmp_path, flags):
    export = () if "--latents none" in flags else ("--export",)
    latbot.main(parse(made_up, tmp_path / "run", *flags.split(), *export))
    assert (tmp_path / "run/latents.parquet").exists() == bool(export)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["variant"].startswith(ROWS[flags].split("-L0")[0]) and summary["script"] == "latbot"
    if "--latents none" not in flags:
        probed = {"undivided": "latent", "actions": "latent"}.get(ROWS[flags], "motion")
        assert np.isfinite(summary[f"{probed}_leak_probe_r2"]) and summary[f"{probed}_said_r2"] < 1
        blind = "--action-weight 0" in flags  # else the teacher has learnt the labelled episodes' actions
        assert (f"{probed}_labelled_probe_nmse" in summary) == blind
        assert not blind or np.isfinite(summary[f"{probed}_labelled_probe_nmse"])
        assert summary["action_probe_nmse"] == summary[f"{probed}_action_probe_nmse"]
    measured = {"text_accuracy", "text_loss", "attention_entropy", "attention_on_robot"} & set(summary)
    assert len(measured) == (0 if "--text none" in flags else 4)
    assert (tmp_path / "run/attention.png").exists() == ("--text none" not in flags)
    policy = latbot.load_policy(tmp_path / "run")
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, SIZE, SIZE, 3), np.uint8)
    keys = [[0, 1, 2, 3], [0, 1, 3, 3]]
    chunk = policy.plan(frames, "push", keys)
    assert chunk.shape == (2, 4, 4) and np.abs(chunk).max() <= 1
    assert np.array_equal(policy.plan(frames, "push", keys), chunk), "the keys decide the noise"
    arm = [policy.plan(frames, task, keys)[..., :-1] for task in ("push", "reach")]
    assert not np.allclose(*arm, atol=1e-4), "the instruction is read"
    assert not np.array_equal(policy.plan(frames, "push", keys[::-1]), chunk)
    assert np.allclose(policy.plan(frames[1:], "push", keys[1:])[0], chunk[1], atol=1e-5)


def test_policy_nmse_is_that_of_a_chunks_first_action(new_run):
    run, windows, args = new_run("--latents", "none", "--student-updates", 20, "--expert-updates", 20)
    latbot.train_expert(run, windows, args, latbot.train_student(run, windows, args, None))
    latbot.summarise(run, windows, args)
    policy, data = latbot.load_policy(run.folder), windows.data

    def act(rows: np.ndarray) -> np.ndarray:
        chunks = []
        for row in rows:
            frame = data.columns["frames"][np.array([row])]
            chunks.append(policy.plan(frame[:, None], data.tasks[data.task[row]], [[int(row)]]))
        return np.concatenate(chunks)[:, 0]

    measured = json.loads((run.folder / "summary.json").read_text())["policy_nmse"]
    assert measured == {"2": pytest.approx(policy_nmse(data, act), rel=1e-4)}


@pytest.mark.parametrize("target", ["pixels", "masked"])
def test_the_teachers_frames_and_target_are_shifted_alike(new_run, target):
    """The first logged loss by hand."""
    run, windows, args = new_run("--teacher-updates", 1, "--action-weight", 0, "--target", target)
    data = windows.data
    torch.manual_seed(args.seed)
    teacher = latbot.Teacher(windows, args)
    rng = np.random.default_rng([args.seed, 1, 0])
    t = rng.choice(data.train, 6)
    shifts = torch.from_numpy(rng.integers(0, 2 * args.max_shift + 1, (8, 2)))[:6]
    shifted = partial(random_shift, shifts=shifts, pad=args.max_shift)
    frames = [shifted(data.frame(t + ahead)) for ahead in (0, 2, 4)]
    change = to_float(frames[2]) - to_float(frames[0])
    with torch.no_grad():
        latents = teacher.latents(torch.stack(frames, 1), windows.task(t))
        error = teacher.decoder(frames[0], latents)[0] - (change - teacher.change_mean) / teacher.change_std
    weight = torch.ones(6, 1, SIZE, SIZE)
    if target == "masked":
        weight = shifted(data.segment(t + 4, "robot"))
    latbot.train_teacher(run, windows, args)
    expected = (weight * error**2).mean() / weight.mean()
    assert rows_of(run.folder, "teacher")[0]["target_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_golden_step(new_run):
    run, windows, args = new_run("--teacher-updates", 2, "--student-updates", 2, "--expert-updates", 2)
    latents = latbot.train_teacher(run, windows, args)
    latbot.train_expert(run, windows, args, latbot.train_student(run, windows, args, latents))
    losses = {stage: [row["loss"] for row in rows_of(run.folder, stage)] for stage in GOLDEN}
    for stage, values in GOLDEN.items():
        assert losses[stage] == pytest.approx(values, abs=1e-4), losses


def test_killed_and_resumed_equals_uninterrupted(made_up, tmp_path):
    flags = [*SMALL.split(), "--student-updates", 250, "--expert-updates", 250, "--data", made_up]
    flags += ["--student", "trains"]
    for stage in ("student", "expert_2"):
        path = tmp_path / f"killed/{stage}.pt"  # the first checkpoint is of update 200
        kill_when(start_script("latbot.py", *flags, "--out", "killed", cwd=tmp_path), path.exists)
        assert torch.load(path, weights_only=True)["update"] == 200
    for name in ("killed", "whole"):
        result = run_script("latbot.py", *flags, "--out", name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")]
    hashes = [{name: stage["sha256"] for name, stage in each["per_stage"].items()} for each in summaries]
    assert hashes[0] == hashes[1] and set(hashes[0]) == {"teacher", "student", "expert_2"}
    assert summaries[0]["policy_hash"] == summaries[1]["policy_hash"] and summaries[0]["policy_hash"]["2"]


def test_latents_of_a_finished_teacher_are_not_made_again(new_run, monkeypatch):
    run, windows, args = new_run("--teacher-updates", 2)
    latents = latbot.train_teacher(run, windows, args)
    monkeypatch.setattr(latbot, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(latbot.train_teacher(run, windows, args), latents)
    (run.folder / "latents.bin").write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="latents.bin does not read"):
        latbot.train_teacher(run, windows, args)


def test_two_ranks_train_like_one(made_up, tmp_path):
    """With the same global batch, texts of several lengths included."""
    flags = [*SMALL.split(), "--data", made_up]
    assert run_script("latbot.py", *flags, "--out", tmp_path / "one", cwd=tmp_path).returncode == 0
    process = torchrun("latbot.py", *flags, "--out", tmp_path / "two", cwd=tmp_path)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    losses = []
    for name in ("one", "two"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        last = {row["stage"]: row for row in rows}
        losses.append([last["teacher"]["loss"], last["student"]["text_loss"], last["expert_2"]["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------ a vision-language model, tiny and random


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny_models.llava(folder)
    return folder


def test_a_vlm_gets_two_words_and_keeps_its_vision(llava):
    torch.manual_seed(0)
    texts = ["open the drawer", "push the puck"], ["move left", "stay"]
    backbone = VLMBackbone(str(llava), 4, *texts).eval()
    frames = torch.randint(0, 256, (2, 2, 3, 56, 56), dtype=torch.uint8)
    task, subtask = torch.tensor([0, 1]), torch.tensor([1, 0])
    with torch.no_grad():
        states, logits, targets = backbone(frames, task, subtask)
        alone, _, _ = backbone(frames[1:], task[1:])
    assert states.shape == (2, 4, backbone.width)
    assert torch.allclose(states[1], alone[0], atol=1e-4), "neither the batch nor the text behind is seen"
    said = [backbone.processor.tokenizer.decode(row[row >= 0]) for row in targets]
    assert [text.split("</s>")[0].strip() for text in said] == ["stay", "move left"]
    assert logits.shape[:2] == targets.shape
    trained = {name for name, value in backbone.named_parameters() if value.requires_grad}
    assert trained and not any("vision" in name for name in trained)
    assert len(set(backbone.marks)) == 2 and min(backbone.marks) > 0


def test_a_vlm_that_sees_later_words_is_refused(tmp_path):
    """Else the queries would read the text that they are to predict."""
    tiny_models.paligemma(tmp_path / "paligemma")
    with pytest.raises(SystemExit, match="see later ones"):
        VLMBackbone(str(tmp_path / "paligemma"), 4, ["open the drawer"], ["stay"])


def test_a_vlm_without_a_chat_template_is_refused(tmp_path):
    tiny_models.blip_2(tmp_path / "blip_2")
    with pytest.raises(SystemExit, match="has no chat template"):
        VLMBackbone(str(tmp_path / "blip_2"), 4, ["open the drawer"], ["stay"])


def test_a_vlm_from_end_to_end(made_up, llava, tmp_path, monkeypatch):
    """Its file is in half precision, as most are; weights here are float32."""
    sizes, forward = set(), VLMBackbone.forward
    monkeypatch.setattr(
        VLMBackbone,
        "forward",
        lambda self, frames, *rest: sizes.add(frames.shape[:2]) or forward(self, frames, *rest),
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.bfloat16)
    shutil.copytree(llava, tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    flags = "--frames 2 --teacher-updates 2 --student-updates 2 --expert-updates 2 --batch-size 4"
    latbot.main(parse(made_up, tmp_path / "run", *flags.split(), "--backbone", tmp_path / "half"))
    assert max(batch for batch, frames in sizes if frames == 2) == 4, "windows, also after training"
    weights = torch.load(tmp_path / "run/expert_2.pt", weights_only=True)["module"]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    chunk = latbot.load_policy(tmp_path / "run").plan(
        np.zeros((1, 1, SIZE, SIZE, 3), np.uint8), "push", [[0]]
    )
    assert chunk.shape == (1, 4, 4)


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--width 18 --heads 4", "--heads"),
        ("--backbone nowhere", "is no folder"),
        ("--labelled-episodes 1 2", "one value"),
        ("--frames 9", "--span"),
        ("--labelled-episodes 9", "from 1 to 4"),
        ("--target embedding --encoder nothing", "names no embeddings"),
        ("--stem 3", "multiple of"),
        ("--span 40 --frames 3", "longer than a gap of 40"),
        ("--latents none --stages teacher", "has no teacher"),
        ("--latents none --export", "has no teacher"),
        ("--latents none --text none --stages student", "nothing to learn"),
        ("--latents undivided --actions-see motion", "--actions-see motion are for --latents split"),
    ],
)
def test_bad_flags_are_refused(made_up, tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words) as error:
        latbot.main(parse(made_up, tmp_path / "run", *flags.split()))
    assert "\n" not in str(error.value)


def test_videos_lack_states_and_may_lack_actions(tmp_path):
    root = make_data(tmp_path / "videos", arrays=["frames", "episode", "step", "actions"])
    result = run_script("latbot.py", *SMALL.split(), "--data", root, "--out", "run", cwd=tmp_path)
    assert "--text none" in refusal(result)
    flags = ("--text", "none", "--out", "run")
    assert run_script("latbot.py", *SMALL.split(), "--data", root, *flags, cwd=tmp_path).returncode == 0
    root = make_data(tmp_path / "silent", arrays=["frames", "episode", "step"])
    result = run_script("latbot.py", *SMALL.split(), "--data", root, *flags, cwd=tmp_path)
    assert "no actions of a hand" in refusal(result)


# ------------------------------------------------------------ what a slip of one line would change


def test_the_scene_comes_first(new_run):
    run, windows, args = new_run("--seed", 3)
    parts = latbot.parts_of(torch.zeros(2, 8), args)
    assert [(name, part.shape[1]) for name, part in parts.items()] == [("scene", 5), ("motion", 3)]


def test_the_seed_chooses_the_labelled_episodes(new_run):
    orders = [new_run("--seed", seed)[1].data.label_order[0].tolist() for seed in range(6)]
    assert orders == LABEL_ORDERS


def test_the_student_is_measured_on_held_out_frames(new_run, monkeypatch):
    _, windows, args = new_run("--text", "all")
    student, data, seen, frame = latbot.Student(windows.domain, args), windows.data, [], windows.data.frame
    monkeypatch.setattr(data, "frame", lambda rows: seen.append(rows) or frame(rows))
    found = latbot.measure_student(student, windows, args, torch.randn(len(data.transitions), 8))
    words = windows.named(data.held_out)
    assert np.array_equal(np.concatenate(seen), [*data.held_out, *words]) and "text_loss" in found
    assert np.array_equal(windows.named(data.train), data.train), "all of their sub-tasks are learnt"


def test_a_policy_of_two_tasks_is_told_which(new_run):
    run, windows, args = new_run("--expert-sees", "motion")
    expert = latbot.Expert(latbot.Student(windows.domain, args), windows.domain, args)
    expert.set_scale(windows, torch.randn(20, 8), args)
    actor = latbot.ChunkActor(expert, windows.data.tasks, "cpu")
    frames = np.zeros((1, 1, SIZE, SIZE, 3), np.uint8)
    for number, task in enumerate(windows.data.tasks):
        gripper = actor.plan(frames, task, [[0]])[..., -1]
        assert set(gripper.flatten().tolist()) <= set(expert.levels[number].tolist())


def test_a_vlms_logits_do_not_see_the_word_that_they_predict(llava):
    torch.manual_seed(0)
    backbone = VLMBackbone(str(llava), 4, ["go"], ["move left", "move down"]).eval()
    frames, task = torch.zeros(2, 1, 3, 56, 56, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        _, logits, targets = backbone(frames, task, torch.tensor([0, 1]))
    first = int((targets[0] != targets[1]).nonzero()[0])  # of "left" and "down"
    assert torch.allclose(logits[0, first], logits[1, first], atol=1e-5)
    assert not torch.allclose(logits[0, first + 1], logits[1, first + 1], atol=1e-5)


def test_even_attention_gives_the_robot_its_share(new_run, monkeypatch):
    _, windows, args = new_run("--text", "all")
    backbone = latbot.Student(windows.domain, args).backbone
    even = lambda frames, *words: torch.full((len(frames), 4, 4), 1 / 16)  # noqa: E731
    monkeypatch.setattr(backbone, "attention", even)
    found = latbot.attended(backbone, windows, Path("/dev/null"))
    assert found["attention_on_robot"] == pytest.approx(1, abs=1e-4)
