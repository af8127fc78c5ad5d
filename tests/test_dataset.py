"""The data set as tensors, and the probes, on made-up data."""

import itertools

import numpy as np
import pytest
import torch
from made_up import ARRAYS, EPISODES, GAP, LENGTH, SIZE, TASKS, make_data

from common import dataset
from common.dataset import Column, Dataset
from common.probes import LeakProbe, Probes, Ridge, action_probe, background_change, mean_over_tasks, r2_score
from common.shards import held_out_episodes


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("made_up"))


def open_data(root, **changes) -> Dataset:
    return Dataset(str(root), **{"frame_gap": GAP, "frame_stack": 2} | changes)


def stored_in(frames: torch.Tensor) -> np.ndarray:
    """(task, episode, step), from the first pixel of the newest frame of a stack: int (B, 3)."""
    return frames[:, -3:, 0, 0].numpy().astype(int)


# ---------------------------------------------------------------------------------------- rows


def test_transitions_stay_within_an_episode_and_splits_apart(made_up):
    data, used = open_data(made_up), []
    for rows, episodes in ((data.train, range(EPISODES - 1)), (data.held_out, [EPISODES - 1])):
        now, after = (stored_in(data.observe(r)) for r in (rows, rows + GAP))
        assert np.array_equal(after - now, np.tile([0, 0, GAP], (len(rows), 1))), (
            "same episode, GAP steps later"
        )
        assert set(now[:, 1]) == set(episodes)
        used += map(tuple, now)
    transitions = len(TASKS) * sum(LENGTH + episode - GAP for episode in range(EPISODES))
    assert len(used) == len(set(used)) == transitions, "every transition once"


def test_fewer_episodes_to_train_on_leave_the_held_out_ones(made_up):
    whole, part = open_data(made_up), open_data(made_up, train_episodes=2)
    assert np.array_equal(part.held_out, whole.held_out)
    assert set(stored_in(part.observe(part.train))[:, 1]) == {0, 1}
    assert set(part.labelled("all")) <= set(whole.labelled("all")) and len(part.labelled("2")) > 0
    with pytest.raises(SystemExit, match="--train-episodes 5 are more than the 4 of"):
        open_data(made_up, train_episodes=EPISODES)


def test_an_observation_never_reaches_over_its_episodes_start(made_up):
    data = open_data(made_up, frame_stack=3)
    rows = np.arange(len(data.columns["frames"]))
    observation = data.observe(rows)
    assert observation.shape == (len(rows), 9, SIZE, SIZE) and observation.dtype == torch.uint8
    task, episode, step = stored_in(observation).T
    for back in range(3):  # frames back steps ago, oldest first in the stack
        expected = np.stack([task, episode, np.maximum(step - back, 0)], axis=1)
        assert np.array_equal(observation[:, 6 - 3 * back : 9 - 3 * back, 0, 0].numpy(), expected)


def test_label_budgets_are_nested_and_of_the_right_size(made_up):
    data, sets = open_data(made_up), {}
    for budget in ("1", "2", "3", "all"):
        rows = data.labelled(budget)
        sets[budget] = set(rows)
        chosen = {tuple(pixel[:2]) for pixel in stored_in(data.observe(rows))}
        assert len(chosen) == len(TASKS) * (EPISODES - 1 if budget == "all" else int(budget)), "of each task"
    assert sets["1"] < sets["2"] < sets["3"] < sets["all"]
    frames = sum(LENGTH + episode - 1 for episode in range(EPISODES - 1))
    assert len(sets["all"]) == len(TASKS) * frames, "every frame but an episode's last"
    assert len({tuple(open_data(made_up, seed=seed).labelled("1")) for seed in range(6)}) > 1, (
        "the seed chooses"
    )


def test_tasks_of_different_numbers_of_episodes_are_each_split(tmp_path):
    """As imported videos have them: the last fifth of each task is held out, budgets are a task's own."""
    root = make_data(tmp_path / "data", episodes=8)
    data = open_data(root)
    keep = [
        shard
        for shard in data.meta["shards"]
        if shard["shard"] not in ("push/shard_00003", "push/shard_00002")
    ]
    data.meta["shards"], data.shards = keep, keep
    data.open_columns("")
    data.split(0.25, 0, 0)
    assert data.n_train == [6, 3] and data.n_held_out == [2, 1]
    held_out = {tuple(pixel[:2]) for pixel in stored_in(data.observe(data.held_out))}
    assert held_out == {(0, 6), (0, 7), (1, 3)}
    labelled = {tuple(pixel[:2]) for pixel in stored_in(data.observe(data.labelled("3")))}
    assert [sum(task == t for task, _ in labelled) for t in (0, 1)] == [3, 3]
    with pytest.raises(SystemExit, match="1 to 3"):
        data.labelled("4")


@pytest.mark.parametrize("missing, target", [("clean", "clean"), ("segments", "masked")])
def test_targets_of_the_simulator_are_refused_without_one(tmp_path, missing, target):
    root = make_data(tmp_path / "data", arrays=[name for name in ARRAYS if name != missing])
    with pytest.raises(SystemExit, match=f"has no {missing}: --target {target} is for data of the simulator"):
        open_data(root, target=target)


def test_metaworlds_own_task_names_are_taken(made_up):
    assert open_data(made_up, tasks=("push-v3",)).tasks == ("push",)


def test_statistics_are_those_of_the_training_split(made_up):
    data = open_data(made_up, target="embedding", encoder="made_up")
    statistics = data.statistics()
    now, after = (data.target(data.train + ahead) for ahead in (0, GAP))
    for name, values in (("", now), ("change_", after - now)):
        assert torch.allclose(statistics[f"{name}mean"], values.mean(0), atol=1e-5)
        assert torch.allclose(statistics[f"{name}std"], values.std(0), atol=1e-5)
    pictures = open_data(made_up, target="clean")
    assert torch.allclose(
        pictures.statistics()["std"].flatten(), pictures.target(pictures.train).std((0, 2, 3)), atol=1e-4
    )


def test_a_column_gives_the_rows_asked_for(tmp_path):
    arrays = [
        np.random.default_rng(s).integers(0, 255, (n, 2, 3), np.uint8) for s, n in enumerate((70, 1, 65))
    ]
    for s, array in enumerate(arrays):
        np.save(tmp_path / f"{s}.npy", array)
    column = Column([tmp_path / f"{s}.npy" for s in range(3)])
    whole = np.concatenate(arrays)
    many = np.random.default_rng(3).integers(0, 135, 700)
    for rows in np.arange(136), np.array([5, 5, 6, 70, 69, 71, 135, 0]), many:
        assert np.array_equal(column[rows], whole[rows])
    with pytest.raises(IndexError):
        column[np.array([136])]


# ---------------------------------------------------------------------------------------- probes


def test_ridge_by_hand_and_in_closed_form():
    x, y = np.array([[3.0], [5.0]]), np.array([[0.0], [4.0]])
    # standardised x: -1, 1; centred y: -2, 2; weight 4 / (2 + 2 penalty)
    predicted = Ridge(x, y, penalty=1.0)(np.array([[3.0], [4.0], [7.0]]))
    assert predicted == pytest.approx(np.array([[1.0], [2.0], [5.0]]))
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (40, 5)), rng.normal(size=(40, 2))
    z = (x - x.mean(0)) / x.std(0)
    left = np.concatenate([z, np.sqrt(0.1 * 40) * np.eye(5)])
    right = np.concatenate([y - y.mean(0), np.zeros((5, 2))])
    expected = z @ np.linalg.lstsq(left, right, rcond=None)[0] + y.mean(0)
    assert np.allclose(Ridge(x, y, 0.1)(x), expected, atol=1e-6)


def test_r2_by_hand():
    y = np.array([[0.0], [2.0]])
    assert [r2_score(y, prediction) for prediction in (y, y * 0 + 1, y * 0)] == [1, 0, -1]
    assert np.isnan(r2_score(y * 0, y))


@pytest.fixture(scope="module")
def long_data(tmp_path_factory) -> Dataset:
    """Made-up data with enough transitions to fit probes on."""
    return open_data(make_data(tmp_path_factory.mktemp("long"), length=60, episodes=10))


def measure(data: Dataset, latent) -> dict:
    """The probes of latents given as a function of rows."""
    tasks = data.probes()
    return mean_over_tasks(
        [probes.measure(*(latent(r).astype(float) for r in rows)) for probes, *rows in tasks]
    )


def test_probes_of_true_actions(long_data):
    """Over a gap of several steps: of their mean, of which the first action alone tells a part."""
    actions = long_data.columns["actions"]
    one = measure(long_data, lambda rows: actions[rows])
    assert one["action_probe_nmse"] == pytest.approx(1 - 1 / GAP, abs=0.1)
    result = measure(long_data, lambda rows: (actions[rows] + actions[rows + 1]) / GAP)
    assert result["action_probe_nmse"] < 0.01 and result["action_probe_mse"] < 0.01
    assert all(r2 > 0.99 for r2 in result["action_probe_r2"])
    assert abs(result["leak_probe_r2"]) < 0.1 and result["state_probe_r2"] < 0.1


def test_an_action_dimension_that_does_not_vary_is_left_out():
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(100, 3))
    actions[:, 1] = 0.5
    result = action_probe(actions, actions, actions, actions)
    assert result["action_probe_r2"][1] is None and result["action_probe_nmse"] < 0.01
    nothing = action_probe(actions, 0 * actions, actions, 0 * actions)
    assert nothing["action_probe_nmse"] is None and nothing["action_probe_r2"] == [None] * 3


def test_probes_of_the_backgrounds_change(long_data):
    def change(rows):
        return long_data.background(rows)[1]

    def both(rows):
        return np.concatenate([long_data.mean_action(rows), change(rows)], axis=1)

    result = measure(long_data, change)
    assert result["leak_probe_r2"] > 0.8 and result["action_probe_nmse"] > 0.9
    result = measure(long_data, both)
    assert result["leak_probe_r2"] > 0.8 and result["action_probe_nmse"] < 0.3


def test_the_leak_probe_takes_the_present_frame_out_of_either_side(long_data):
    """z = o_t predicts half of the change (random frames return to the mean) and leaks nothing."""
    assert measure(long_data, lambda rows: long_data.background(rows)[0])["leak_probe_r2"] < 0.1
    hidden = measure(long_data, lambda rows: np.tensordot([5, 1], long_data.background(rows), 1))
    assert hidden["leak_probe_r2"] > 0.7, "z = 4 o_t + o_{t+1} hides its leak"


def test_probe_of_the_labelled_episodes_alone(long_data):
    """Each left out once: latents that hold the action are found, those that tell episodes apart are not."""
    actions = long_data.columns["actions"]

    def mean_action(rows):
        return torch.from_numpy((actions[rows] + actions[rows + 1]) / GAP)

    found = long_data.probe_labelled(mean_action, ("1", "3"))
    assert found["3"] < 0.01
    assert found["1"] is None, "none is left to fit on"
    assert long_data.probe_labelled(lambda rows: mean_action(rows)[:, :, None], ("3",))["3"] < 0.01
    episodes = torch.eye(10)
    assert long_data.probe_labelled(lambda rows: episodes[long_data.episode[rows]], ("3",))["3"] > 0.95


def test_probes_of_the_change_of_state(long_data):
    states = long_data.columns["states"]
    change = measure(long_data, lambda rows: (states[rows + GAP] - states[rows])[:, :18])
    assert change["state_probe_r2"] > 0.95
    noise = measure(long_data, lambda rows: np.random.default_rng(rows).normal(size=(len(rows), 5)))
    assert noise["state_probe_r2"] < 0.1


def test_probes_are_fitted_on_training_rows_and_measured_on_held_out_ones(long_data):
    for task, (_, train, held_out) in enumerate(long_data.probes()):
        for rows, split in ((train, long_data.train), (held_out, long_data.held_out)):
            assert set(rows) == set(split[long_data.task[split] == task])


def test_probes_do_not_read_the_task_off_the_latents(long_data, monkeypatch):
    """Actions that differ from task to task, and latents that hold the task alone."""
    mean_action = Dataset.mean_action
    monkeypatch.setattr(
        Dataset, "mean_action", lambda *args: mean_action(*args) + 9 * args[0].task[args[1], None]
    )
    assert measure(long_data, lambda rows: np.eye(2)[long_data.task[rows]])["action_probe_nmse"] > 0.95


def test_what_a_data_set_lacks_is_not_probed(tmp_path):
    full = ["frames", "episode", "step", "actions", "states"]
    for arrays in (full, full[:4], full[:3]):
        data = open_data(make_data(tmp_path / str(len(arrays)), arrays=arrays))
        result = measure(data, lambda rows: np.random.default_rng(rows).normal(size=(len(rows), 3)))
        assert result["leak_probe_r2"] is None and "no leak probe" in data.describe()
        assert (result["state_probe_r2"] is None) == ("states" not in arrays)
        assert (result["action_probe_nmse"] is None) == ("actions" not in arrays)
        assert data.action_dim == (4 if "actions" in arrays else None)


def test_a_probe_equals_its_definition_on_random_arrays():
    rng = np.random.default_rng(0)
    z_train, z_test, y_train, y_test = (rng.normal(size=(n, 3)) for n in (80, 40, 80, 40))
    predicted = Ridge(z_train, y_train)(z_test)
    measured = Probes(states=[y_train, y_test]).measure(z_train, z_test)
    assert measured["state_probe_r2"] == r2_score(y_test, predicted)
    nmse = ((predicted - y_test) ** 2).mean(0) / y_test.var(0)
    assert action_probe(z_train, y_train, z_test, y_test)["action_probe_nmse"] == pytest.approx(nmse.mean())
    now_train, now_test = rng.normal(size=(80, 2)), rng.normal(size=(40, 2))
    rest = [y - Ridge(now_train, y_train, 1e-2)(now) for y, now in ((y_train, now_train), (y_test, now_test))]
    latent = [
        z - Ridge(now_train, z_train, 1e-2)(now) for z, now in ((z_train, now_train), (z_test, now_test))
    ]
    expected = r2_score(rest[1], Ridge(latent[0], rest[0])(latent[1]))
    assert LeakProbe(now_train, y_train, now_test, y_test)(z_train, z_test) == pytest.approx(expected)


def test_latents_are_exported_with_their_keys(made_up, tmp_path):
    import pyarrow.parquet

    data = open_data(made_up)
    rows = data.transitions
    latents = torch.arange(3 * len(rows), dtype=torch.float32).view(-1, 3)
    data.export_latents(latents, tmp_path / "latents.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "latents.parquet").to_pydict()
    stored = [(TASKS[task], episode, step) for task, episode, step in stored_in(data.observe(rows))]
    assert list(zip(table["task"], table["episode_index"], table["frame_index"])) == stored
    assert table["latent_action"] == latents.tolist()
    assert len(set(itertools.chain(stored))) == len(rows)


# ------------------------------------------------------------ what a slip of one line would change


def test_rows_of_statistics_and_probes_are_drawn_from_all_episodes(made_up, monkeypatch):
    monkeypatch.setattr(dataset, "SAMPLE", 30)
    monkeypatch.setattr(dataset, "change_statistics", lambda values, rows, gap: rows)
    data = open_data(made_up)
    rows = data.statistics()
    assert len(rows) == 30 and set(rows) < set(data.train) and set(data.task[rows]) == {0, 1}
    assert set(data.episode[rows]) == set(range(EPISODES - 1))


def test_thinned_rows_are_spread_evenly():
    rows = dataset.thinned(np.arange(95), 10)
    assert 10 <= len(rows) < 20 and rows[-1] >= 85 and len(set(np.diff(rows))) == 1
    assert np.array_equal(dataset.thinned(np.arange(7), 10), np.arange(7))


def test_a_policys_actions_are_clamped_before_they_are_measured(made_up):
    data = open_data(made_up)
    far = data.policy_nmse(lambda rows: torch.full((len(rows), 4), 9.0))
    assert far == data.policy_nmse(lambda rows: torch.ones(len(rows), 4))


def test_what_hardly_varies_is_not_blown_up():
    moments = dataset.Moments()
    moments.add(torch.stack([torch.tensor([-1.0, 1.0]), torch.tensor([3.0, 3.0])], 1))
    _, std = moments.mean_std()
    assert std.tolist() == pytest.approx([2**0.5, 0.1 * 2**0.5 / 2], rel=1e-3)


def test_background_is_what_both_frames_show(tmp_path):
    """Segments of which every second frame pair (GAP = 2) shows the background: no pixel in both."""
    root = make_data(tmp_path / "data")
    for path in root.glob("*/shard_*/segments.npy"):
        segments, step = np.load(path), np.load(path.with_name("step.npy"))
        segments[:] = np.where(step % (2 * GAP) < GAP, 0, 2)[:, None, None]
        np.save(path, segments)
    data = open_data(root)
    assert np.abs(data.background(data.train)[1]).max() == 0


def test_a_squares_change_is_the_mean_over_its_background():
    """Squares of 2 x 2 pixels: of one pixel of background nothing counts, of two their own change."""
    now, background = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    after = torch.full((1, 3, 16, 16), 9.0)
    background[..., 0, 0] = background[..., 0, 2:4] = 1  # the first square, and the second
    after[..., 0, :4] = 1.0
    _, change = background_change(now, after, background)
    assert change.reshape(3, 8, 8)[:, 0, :3].tolist() == [[0, 1, 0]] * 3


def test_an_action_dimension_that_does_not_vary_in_training_is_left_out():
    rng = np.random.default_rng(0)
    z, actions = rng.normal(size=(2, 100, 3))
    trained = actions * [1, 0, 1]
    assert action_probe(z, trained, z, actions)["action_probe_r2"][1] is None


def test_what_one_task_lacks_has_no_mean():
    found = [{"leak": 0.4, "r2": [1.0, None]}, {"leak": None, "r2": [0.0, 0.5]}]
    assert mean_over_tasks(found) == {"leak": None, "r2": [0.5, None]}


def test_without_distractors_there_is_no_leak(tmp_path):
    root = make_data(tmp_path / "data")
    (root / "meta.json").write_text((root / "meta.json").read_text().replace('"generated"', '"none"'))
    data = open_data(root)
    assert all(probes.leak is None and probes.actions for probes, _, _ in data.probes())


def test_held_out_episodes_are_rounded():
    assert [held_out_episodes(n, 0.2) for n in (2, 5, 7, 8, 12, 13)] == [1, 1, 1, 2, 2, 3]
    assert held_out_episodes(100, 0.29) == 29 and held_out_episodes(2, 0.9) == 1


def test_rows_of_probes_are_drawn_from_all_episodes(made_up, monkeypatch):
    monkeypatch.setattr(dataset, "SAMPLE", 20)
    data = open_data(made_up)
    for _, train, held_out in data.probes():
        assert len(train) == 20 and set(data.episode[train]) == set(range(EPISODES - 1))
        assert set(held_out) <= set(data.held_out) and (np.diff(train) > 0).all()
