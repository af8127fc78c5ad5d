"""common/statistics.py against hand values, scipy and a naive loop."""

import numpy as np
import pytest
import scipy.stats

from common.statistics import (
    aggregate,
    checked,
    compare,
    iqm,
    iqm_difference,
    mean,
    mean_difference,
    mean_ratio,
    replicates,
    stratified_bootstrap_ci,
    win_rate,
)

COIN = [[0.0], [1.0]]  # replicates of the mean: 0, 1/2, 1 with probability 1/4, 1/2, 1/4


def test_iqm_by_hand_and_against_scipy():
    assert iqm([[0, 0, 1, 1]]) == 0.5
    assert iqm([[0, 2, 3, 100]]) == 2.5  # the outlier is cut
    assert iqm([[1.0], [2.0], [6.0]]) == 3.0  # a quarter of three entries, rounded down, is none
    assert iqm([[9, 1, 2, 3, 4, 5, 6, 100]]) == 4.5  # 3 4 5 6
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (3, 1), (2, 3), (3, 10), (5, 7), (4, 13)]:
        many = rng.random((6, *shape))
        expected = [scipy.stats.trim_mean(scores, 0.25, axis=None) for scores in many]
        assert iqm(many[0]) == pytest.approx(expected[0], abs=1e-14)
        assert np.allclose(iqm(many), expected, atol=1e-14)
        assert np.allclose(mean(many), [scores.mean() for scores in many], atol=1e-14)


def test_ci_by_hand():
    assert stratified_bootstrap_ci([[0.3, 0.3], [0.3, 0.3]]) == pytest.approx((0.3, 0.3))
    assert stratified_bootstrap_ci(COIN, statistic=mean) == (0.0, 1.0)
    assert stratified_bootstrap_ci(COIN, statistic=mean, level=0.4) == (0.5, 0.5)
    assert stratified_bootstrap_ci(COIN, statistic=mean, level=0.52) == (0.0, 1.0)


def test_ci_resamples_within_each_task():
    """Two runs, one bad and one good at every task: within tasks the mean is Binomial(20, 1/2) / 20."""
    scores = [[0.0] * 10, [1.0] * 10]
    expected = scipy.stats.binom.ppf([0.025, 0.975], 20, 0.5) / 20
    assert stratified_bootstrap_ci(scores, statistic=mean) == pytest.approx(expected)


def test_pooled_runs_are_resampled_whole():
    """One model for all tasks: the same two runs are then 0, 1/2 or 1 as a whole."""
    scores = np.array([[0.0] * 10, [1.0] * 10])
    assert stratified_bootstrap_ci(scores, statistic=mean, pooled=[True]) == (0.0, 1.0)
    (drawn,) = replicates(scores + np.arange(10), 500, [0], pooled=True)
    rows = drawn - np.arange(10)
    assert (rows == rows[:, :, :1]).all() and rows.min() == 0 and rows.max() == 1
    easy = [[0.0] * 10, [0.0] * 10]
    assert stratified_bootstrap_ci(scores, easy, statistic=mean_difference, pooled=[True, False]) == (
        0.0,
        1.0,
    )
    apart = stratified_bootstrap_ci(scores, easy, statistic=mean_difference, pooled=[False, True])
    assert apart == pytest.approx(scipy.stats.binom.ppf([0.025, 0.975], 20, 0.5) / 20)


def test_ci_keeps_tasks_apart():
    """Tasks of different difficulty without spread between runs leave nothing uncertain."""
    assert stratified_bootstrap_ci([[0.0, 0.5, 1.0]] * 3, statistic=mean) == pytest.approx((0.5, 0.5))


def trimmed(scores: np.ndarray) -> float:
    return scipy.stats.trim_mean(scores, 0.25, axis=None)


@pytest.mark.parametrize(("statistic", "naive"), [(iqm, trimmed), (mean, np.mean)])
def test_ci_against_a_naive_loop(statistic, naive):
    scores = np.random.default_rng(1).random((4, 6))
    rng, values = np.random.default_rng(2), []
    for _ in range(4000):
        columns = [scores[rng.choice(4, 4), task] for task in range(6)]
        values.append(naive(np.stack(columns, axis=1)))
    expected = np.quantile(values, [0.025, 0.975])
    assert np.allclose(stratified_bootstrap_ci(scores, statistic=statistic), expected, atol=0.015)


@pytest.mark.parametrize(
    ("difference", "naive"), [(iqm_difference, trimmed), (mean_difference, np.mean), (win_rate, None)]
)
def test_comparison_ci_against_a_naive_loop(difference, naive):
    """Two methods of different numbers of runs, each resampled by itself."""
    rng = np.random.default_rng(3)
    x, y = rng.random((4, 5)) + 0.2, rng.random((3, 5))
    values = []
    for _ in range(4000):
        drawn_x = np.stack([x[rng.choice(4, 4), task] for task in range(5)], axis=1)
        drawn_y = np.stack([y[rng.choice(3, 3), task] for task in range(5)], axis=1)
        if naive is None:
            pairs = [
                (a > b).mean()
                for task in range(5)
                for a, b in [np.meshgrid(drawn_x[:, task], drawn_y[:, task])]
            ]
            values.append(np.mean(pairs))
        else:
            values.append(naive(drawn_x) - naive(drawn_y))
    expected = np.quantile(values, [0.025, 0.975])
    assert np.allclose(stratified_bootstrap_ci(x, y, statistic=difference), expected, atol=0.02)


def test_two_methods_are_resampled_independently():
    """Of a method against itself the difference is uncertain: it is not the same draw twice."""
    low, high = stratified_bootstrap_ci(COIN, COIN, statistic=mean_difference)
    assert (low, high) == (-1.0, 1.0)


def test_ci_follows_its_seed_level_and_chunks():
    scores = np.random.default_rng(3).random((3, 10))
    again = stratified_bootstrap_ci(scores, seed=1)
    assert again == stratified_bootstrap_ci(scores, seed=1) != stratified_bootstrap_ci(scores, seed=2)
    low, high = stratified_bootstrap_ci(scores, level=0.95)
    inner_low, inner_high = stratified_bootstrap_ci(scores, level=0.5)
    assert low < inner_low < iqm(scores) < inner_high < high
    assert [len(drawn) for drawn in replicates(scores, 2001, [0], False)] == [1000, 1000, 1]


@pytest.mark.parametrize("statistic", [iqm, mean])
def test_ci_covers_the_truth(statistic):
    """Success rates of 20 fair episodes: the truth is 1/2. Five runs make the interval a little narrow."""
    rng = np.random.default_rng(4)
    intervals = []
    for _ in range(100):
        scores = rng.binomial(20, 0.5, (5, 10)) / 20
        intervals.append(stratified_bootstrap_ci(scores, reps=1000, statistic=statistic))
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert 0.85 <= covered <= 0.99, covered
    assert np.mean([high - low for low, high in intervals]) < 0.1


@pytest.mark.parametrize("runs, apart, pooled", [(2, 0.8, 0.5), (3, 0.85, 0.75)])
def test_few_runs_make_the_interval_too_narrow(runs, apart, pooled):
    """What the report says of so few runs, six tasks."""
    rng = np.random.default_rng(0)
    for one_model, expected in ((False, apart), (True, pooled)):
        covered = 0
        for _ in range(300):
            spread = rng.normal(size=(runs, 1 if one_model else 6))  # of runs: around a truth of 0
            scores = spread + np.zeros((runs, 6))
            low, high = stratified_bootstrap_ci(scores, statistic=mean, pooled=[one_model], reps=500)
            covered += low <= 0 <= high
        assert covered / 300 == pytest.approx(expected, abs=0.07)


def test_a_ratio_has_an_interval_up_to_infinity():
    assert mean_ratio([[0.5, 0.7]], [[0.1, 0.3]]) == pytest.approx(3.0)
    assert mean_ratio([[0.5]], [[0.0]]) == np.inf and mean_ratio([[0.0]], [[0.0]]) == 1
    half = [[0.5], [0.5]]  # over COIN's means: 0.5 of 1, of 1/2 and of 0
    assert stratified_bootstrap_ci(half, COIN, statistic=mean_ratio) == (0.5, np.inf)
    assert stratified_bootstrap_ci(half, COIN, statistic=mean_ratio, level=0.4) == (1.0, 1.0)


def test_one_run_gives_no_ci():
    assert stratified_bootstrap_ci([[0.1, 0.9, 0.4]]) is None
    assert stratified_bootstrap_ci([[0.1]], [[0.2], [0.3]], statistic=win_rate) is None
    assert stratified_bootstrap_ci([[0.2], [0.3]], [[0.1]], statistic=iqm_difference) is None


BAD_SCORES = [
    ([[1, 2], [3]], "ragged"),
    ({"reach": [1, 2]}, "ragged"),
    ([0.1, 0.2], "runs, tasks"),
    (0.5, "runs, tasks"),
    (np.zeros((2, 2, 2)), "runs, tasks"),
    ([[0.1, np.nan], [0.2, 0.3]], "NaN"),
    ([[None, 0.1]], "NaN"),
    (np.zeros((0, 3)), "empty"),
    ([], "empty"),
    ([["a", "b"]], "numbers"),
]


@pytest.mark.parametrize(("scores", "reason"), BAD_SCORES)
def test_bad_scores_are_refused(scores, reason):
    with pytest.raises(ValueError, match=reason) as first:
        stratified_bootstrap_ci(scores)
    with pytest.raises(ValueError, match=reason) as second:
        stratified_bootstrap_ci([[0.0, 0.0]], scores, statistic=win_rate)
    assert "\n" not in str(first.value) + str(second.value)


def test_swapped_axes_are_refused():
    tasks = ["reach", "push", "door-open"]
    scores = np.random.default_rng(5).random((2, 3))
    assert (checked(scores, tasks) == scores).all()
    with pytest.raises(ValueError, match="swap"):
        checked(scores.T, tasks)
    with pytest.raises(ValueError, match="same tasks"):
        win_rate(scores, scores.T)
    with pytest.raises(ValueError, match="NaN"):  # which a sort would move to the end, and the cut hide
        iqm([[0.1, 0.2, 0.3, np.nan]])


def test_win_rate():
    assert win_rate([[1], [2]], [[0], [2]]) == 0.625  # won, lost, won, tied
    assert win_rate([[1, 0], [1, 0]], [[0, 0], [0, 1]]) == 0.625  # 1 and 1/4 by task
    rng = np.random.default_rng(6)
    x, y = rng.integers(5, size=(4, 3)), rng.integers(5, size=(6, 3))
    expected = np.mean([scipy.stats.mannwhitneyu(x[:, t], y[:, t]).statistic / 24 for t in range(3)])
    assert win_rate(x, y) == pytest.approx(expected)
    assert win_rate(x, y) + win_rate(y, x) == pytest.approx(1)
    half = [[0.5], [0.5]]
    assert stratified_bootstrap_ci(COIN, half, statistic=win_rate) == (0.0, 1.0)
    assert stratified_bootstrap_ci(COIN, half, statistic=win_rate, level=0.4) == (0.5, 0.5)


# ---------------------------------------------------------------------------------------- tables


def rows_of(method: str, scores: list[list[float]], labelled: str = "2", tasks: str = "ab") -> list[dict]:
    rows = []
    for seed, of_tasks in enumerate(scores):
        for task, score in zip(tasks, of_tasks):
            rows.append(
                {"method": method, "labelled": labelled, "task": task, "seed": seed, "success": score}
            )
    return rows


def test_table_has_the_matrix_of_common_seeds():
    rows = rows_of("lapo", [[0.1, 0.2], [0.3, 0.4], [0.5]], "16") + rows_of("lapo", [[0.9, 0.7]], "2")
    rows += rows_of("split", [[0.1]], tasks="a")
    rows += [row | {"seed": 1} for row in rows_of("split", [[0.1]], tasks="b")]
    rows += rows_of("bc-all", [[None, 0.5], [0.7, 0.5]], "all")
    table = aggregate(rows, "success", [{"variant": "lapo", "tasks": ["a"]}])
    order = [(entry["labelled"], entry["method"]) for entry in table]
    assert order == [("2", "lapo"), ("2", "split"), ("16", "lapo"), ("all", "bc-all")]
    assert table[2]["matrix"].tolist() == [[0.1, 0.2], [0.3, 0.4]] and table[2]["dropped"] == [2]
    assert (table[2]["iqm"], table[2]["mean"]) == (pytest.approx(0.25), pytest.approx(0.25))
    assert table[2]["iqm_ci"] == stratified_bootstrap_ci(table[2]["matrix"]) and not table[2]["pooled"]
    assert table[1]["seeds"] == [] and table[1]["dropped"] == [0, 1] and table[1]["iqm"] is None
    assert table[3]["seeds"] == [1] and table[3]["iqm_ci"] is None, "what was not measured is no zero"


def test_table_of_pooled_runs_resamples_whole_runs():
    rows = rows_of("lapo", [[0.0] * 8, [1.0] * 8], tasks="abcdefgh")
    (apart,) = aggregate(rows, "success", [{"variant": "lapo", "tasks": [task]} for task in "abcdefgh"])
    (pooled,) = aggregate(rows, "success", [{"variant": "lapo", "tasks": list("abcdefgh")}])
    assert pooled["pooled"] and pooled["mean_ci"] == (0.0, 1.0)
    assert apart["mean_ci"][0] > 0.1 and apart["mean_ci"][1] < 0.9


def test_comparison_with_the_baselines():
    lapo, oracle, few = [[0.2, 0.0], [0.4, 0.2]], [[0.8, 0.6], [1.0, 0.6]], [[0.0, 0.0], [0.0, 0.0]]
    rows = rows_of("lapo", lapo) + rows_of("lapo-oracle", oracle) + rows_of("bc-few", few)
    rows += rows_of("bc-all", [[1.0, 1.0]], "all") + rows_of("other-tasks", [[1.0]], tasks="a")
    rows += rows_of("lapo-frame", few)
    rows += [row | {"seed": row["seed"] + 1} for row in rows_of("later", [[0.5, 0.7], [1.0, 1.0]])]
    found = {(row["method"], row["base"]): row for row in compare(aggregate(rows, "success", []))}
    of_oracle = {("lapo-oracle", base) for base in ("lapo", "lapo-frame", "bc-few")}
    of_others = {("other-tasks", base) for base in ("lapo", "lapo-frame", "bc-few")}
    of_others |= {("later", base) for base in ("lapo", "lapo-frame", "bc-few")}
    of_lapo = {("lapo", "lapo-frame"), ("lapo", "bc-few"), ("lapo-frame", "bc-few")}
    assert set(found) == of_oracle | of_others | of_lapo
    assert found["lapo-oracle", "lapo"]["tasks"] == ["a", "b"]
    row = found["other-tasks", "lapo"]
    assert row["tasks"] == ["a"] and row["seeds"] == [0], "what both have"
    assert row["mean_difference"] == pytest.approx(1 - 0.2) and row["mean_difference_ci"] is None
    row = found["later", "lapo"]
    assert row["seeds"] == [1] and row["mean_difference"] == pytest.approx(0.6 - 0.3)
    row = found["lapo-oracle", "lapo"]
    assert row["iqm_ratio"] == pytest.approx(0.7 / 0.2) and row["iqm_difference"] == pytest.approx(0.5)
    assert row["mean_ratio"] == pytest.approx(0.75 / 0.2) and row["mean_difference"] == pytest.approx(0.55)
    assert row["iqm_difference_ci"] == stratified_bootstrap_ci(oracle, lapo, statistic=iqm_difference)
    assert row["mean_difference_ci"] == stratified_bootstrap_ci(oracle, lapo, statistic=mean_difference)
    assert row["mean_ratio_ci"] == stratified_bootstrap_ci(oracle, lapo, statistic=mean_ratio)
    assert row["win_rate"] == 1.0 and row["labelled"] == "2"
    assert found["lapo", "bc-few"]["mean_ratio"] == np.inf
    assert found["lapo", "bc-few"]["mean_difference"] == pytest.approx(0.2)


# ------------------------------------------------------------ what a slip of one line would change


def test_a_comparison_resamples_each_method_in_its_own_way():
    rows = rows_of("lapo", [[0.0] * 8, [0.4] * 8], tasks="abcdefgh")
    rows += rows_of("lapo-oracle", [[0.5] * 8, [1.0] * 8], tasks="abcdefgh")
    runs = [{"variant": "lapo", "tasks": list("abcdefgh")}]  # one model for all
    (row,) = compare(aggregate(rows, "success", runs))
    x, y = np.repeat([[0.5], [1.0]], 8, 1), np.repeat([[0.0], [0.4]], 8, 1)
    expected = stratified_bootstrap_ci(x, y, statistic=mean_difference, pooled=(False, True))
    assert row["mean_difference_ci"] == expected
