"""univla.py: quantiser, gradients, what the codes hold on a toy, and the plumbing on made-up data."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from conftest import ROOT, kill_when, refusal, run_script, start_script, torchrun
from made_up import LABEL_ORDERS, SIZE, TASKS, make_data
from torch import nn

import univla
from common import codebook, runs
from common import tokens as tokens_module
from common.codebook import Codebook, LatentNorm, perplexity, shares
from common.tokens import DINO, Pixels, Tokens, text_states, word_numbers

SMALL = "--codes 2 --codebook 4 --code-dim 6 --width 16 --heads 2 --blocks 1 1 --lam-batch 8 --batch-size 8"
SMALL += " --lam-updates 4 --bc-updates 4 --decoder-updates 4 --widths 4 8 --stem 2 --labelled-episodes 1 2"
SMALL += " --frame-gap 2 --device cpu --dtype float32"


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("made_up"))


@pytest.fixture(autouse=True)
def log_every_update(monkeypatch):
    monkeypatch.setattr(runs, "LOG_EVERY", 1)


def parse(data: Path, out: Path, *flags: object) -> univla.Args:
    return univla.parse_args([*SMALL.split(), "--data", str(data), "--out", str(out), *map(str, flags)])


@pytest.fixture
def new_run(made_up, tmp_path):
    """new_run(*flags) -> Run, Tokens, Args, in a folder of its own; let go at the end."""
    opened = []

    def make(*flags: object, data: Path = made_up):
        args = parse(data, tmp_path / f"run{len(opened)}", *flags)
        run, tokens = univla.open_run(args)
        opened.append(run)
        return run, tokens, args

    yield make
    for run in opened:
        run.close()


def rows_of(folder: Path, stage: str) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


# ------------------------------------------------------------ the quantiser


def book_of(entries: list[list[float]]) -> Codebook:
    book = Codebook(len(entries), len(entries[0]))
    book.entries.data = torch.tensor(entries)
    return book


def test_quantiser_against_a_case_by_hand():
    """z = (1, 0) and (0, 4): the nearest of (0, 0), (0, 3), (9, 9) are the first two."""
    book = book_of([[0.0, 0.0], [0.0, 3.0], [9.0, 9.0]])
    z = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]], requires_grad=True)
    entries, codebook_loss, commitment_loss = book(z)
    codes = book.nearest(z)
    assert codes.tolist() == [[0, 1]] and entries.tolist() == [[[0, 0], [0, 3]]]
    assert codebook_loss.item() == commitment_loss.item() == pytest.approx((1 + 0 + 0 + 1) / 4)
    share = shares(torch.tensor([[0, 1], [2, 1]]), 3)
    assert share.tolist() == [[0.5, 0, 0.5], [0, 1, 0]], "of each code"
    assert perplexity(share).tolist() == pytest.approx([2, 1])

    (straight,) = torch.autograd.grad(entries.sum(), z, retain_graph=True)
    assert (straight == 1).all(), "the gradient passes the quantiser unchanged"
    (of_z,) = torch.autograd.grad(commitment_loss, z, retain_graph=True)
    assert of_z.tolist() == [[[0.5, 0], [0, 0.5]]], "commitment draws z to its entry"
    (of_entries,) = torch.autograd.grad(codebook_loss, book.entries)
    assert of_entries.tolist() == [[-0.5, 0], [0, -0.5], [0, 0]], "the codebook loss draws the entry to z"


def test_latents_are_moved_to_those_of_a_codebook():
    """(0, 0) and (2, 4) are 1 and 2 from their mean (1, 2), std sqrt(2.5); the book's are about (5, 5)."""
    root = 2.5**0.5
    norm = LatentNorm(torch.tensor([[[5 - root, 5 - root]], [[5 + root, 5 + root]]]))
    z = torch.tensor([[[0.0, 0.0]], [[2.0, 4.0]]], requires_grad=True)
    moved = norm(z)
    assert moved.flatten().tolist() == pytest.approx([4, 3, 6, 7], abs=1e-4)
    assert norm.mean.flatten().tolist() == pytest.approx([0.1, 0.2])
    assert norm.std.item() == pytest.approx(0.9 + 0.1 * root, abs=1e-4)
    (gradient,) = torch.autograd.grad(moved[0, 0, 0], z)
    assert gradient[1, 0].abs().sum() > 0, "the batch's moments have a gradient"
    alone = norm.eval()(z[:1])
    assert torch.equal(alone, ((z[:1] - norm.mean) / norm.std * norm.to_std + norm.to_mean)), "running ones"
    same = torch.ones(3, 1, 2, requires_grad=True)  # a code that does not vary
    moved = LatentNorm(torch.ones(4, 1, 2))(same)
    (gradient,) = torch.autograd.grad(moved.square().sum(), same)
    assert moved.isfinite().all() and gradient.isfinite().all()


def test_entries_that_are_never_chosen_start_again(monkeypatch):
    monkeypatch.setattr(codebook, "RESTART", 3)
    book = book_of([[0.0, 0.0], [50.0, 50.0]])
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert (book.idle >= 3).all(), "a new book starts with outputs of the first batch"
    book.idle.zero_()
    for update in range(3):
        assert book.entries.tolist() == [[0, 0], [50, 50]], update
        book.restart(z, shares(book.nearest(z), 2))
    assert book.entries[0].tolist() == [0, 0] and book.entries[1].tolist() in z[0].tolist()
    assert book.idle.tolist() == [0, 0]


# ------------------------------------------------------------ the model


def lam_of(tokens: Tokens, args: univla.Args, *stage_1: univla.LAM) -> univla.LAM:
    torch.manual_seed(0)
    return univla.LAM(tokens, args, *stage_1).eval()


def inputs(lam: univla.LAM, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    return (*lam.observe(rows), lam.embed_instruction(rows))


def test_the_encoder_is_causal_in_time(new_run):
    """What o_t's tokens become does not depend on o_{t+k}; the queries depend on everything."""
    _, tokens, args = new_run()
    lam = lam_of(tokens, args)
    now, after, change, instruction = inputs(lam, tokens.data.train[:3])
    seen = []
    lam.encoder.blocks.register_forward_hook(lambda module, given, states: seen.append(states))
    first = lam.latents(now, after, change, instruction)["ti"]
    words_changed = instruction + torch.randn_like(instruction)
    others = [(now, after + 1, change, instruction), (now + 1, after, change, instruction)]
    others += [(now, after, change, words_changed), (now, after, change + 1, instruction)]
    changed = [lam.latents(*other)["ti"] for other in others]
    assert all(not torch.allclose(first, other) for other in changed)
    words, patches = instruction.shape[1], now.shape[1]
    assert torch.allclose(seen[0][:, : words + patches], seen[1][:, : words + patches])
    assert not torch.allclose(seen[0][:, words + patches :], seen[1][:, words + patches :])
    assert torch.allclose(seen[0][:, :words], seen[2][:, :words])


def test_instruction_is_of_the_rows_task(new_run):
    _, tokens, args = new_run()
    data = tokens.data
    rows = np.array([np.flatnonzero(data.task == task)[0] for task in (1, 0, 1)])
    text = tokens.text(rows)
    assert text.shape == (3, 6) and torch.equal(text[0], text[2]) and not torch.equal(text[0], text[1])
    assert data.tasks == TASKS and (text[1] == 0).sum() == 3, "`reach the goal`, and no word behind"
    _, silent, no_text = new_run("--text", "none")
    assert lam_of(silent, no_text).embed_instruction(rows).shape == (3, 0, 16)


def test_patches_are_the_picture(new_run):
    _, tokens, _ = new_run()
    frame = tokens.data.frame(tokens.data.train[:1]).float() / 255 - 0.5
    patches = tokens.patches(tokens.data.train[:1])
    side = SIZE // 8
    assert patches.shape == (1, 64, 3 * side**2)
    expected = frame[0, :, 3 * side : 4 * side, 5 * side : 6 * side].flatten()
    assert torch.allclose(patches[0, 3 * 8 + 5], expected)
    large = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    squares = Pixels(96)(large)[0, 3 * 8 + 5].view(3, 4, 4)
    expected = large[0, :, 36:48, 60:72].float().view(3, 4, 3, 4, 3).mean((2, 4)) / 255 - 0.5
    assert torch.allclose(squares, expected, atol=1e-5), "mean colours of 4 x 4 squares"


def test_gradients(new_run):
    """They reach the encoder through the quantiser, never the frozen codebook, and in stage 1 the words."""
    _, tokens, args = new_run()
    stage_1 = lam_of(tokens, args)
    lam = lam_of(tokens, args, stage_1)
    assert torch.equal(lam.books["ti"].entries, stage_1.books["ti"].entries)
    assert torch.equal(lam.queries["ti"], stage_1.queries["ti"]) and lam.instruction is None
    for model in (stage_1, lam):
        now, after, change, instruction = inputs(model, tokens.data.train[:4])
        entries, _, _ = model.quantise(model.latents(now, after, change, instruction))
        model.decoder(now, entries, instruction).square().mean().backward()
        assert model.encoder.project.weight.grad.abs().sum() > 0
        assert all(query.grad.abs().sum() > 0 for query in model.queries.values())
        assert all(book.entries.grad is None for book in model.books.values()), "straight through"
    assert stage_1.instruction.project.weight.grad.abs().sum() > 0
    assert not lam.books["ti"].entries.requires_grad and lam.books["tc"].entries.requires_grad


def test_each_head_reads_the_queries_of_its_set(new_run, monkeypatch):
    """Those of stage 1 are for the codes of its codebook."""
    _, tokens, args = new_run()
    lam = lam_of(tokens, args, lam_of(tokens, args))
    seen = inputs(lam, tokens.data.train[:3])
    encoder = lambda now, after, change, queries, instruction: queries.expand(len(now), -1, -1)  # noqa: E731
    monkeypatch.setattr(lam.encoder, "forward", encoder)
    latents = lam.latents(*seen)
    assert torch.allclose(latents["tc"][0], lam.to_latents["tc"](lam.queries["tc"]))
    of_ti = lam.to_latents["ti"](lam.queries["ti"])
    assert torch.allclose(latents["ti"], lam.norm(of_ti.expand(3, -1, -1)), atol=1e-4)


def test_the_decoder_tells_codes_apart(new_run):
    """Codes in another order, or of the other set, are another prediction."""
    _, tokens, args = new_run()
    lam = lam_of(tokens, args, lam_of(tokens, args))
    now, _, _, instruction = inputs(lam, tokens.data.train[:3])
    codes = {name: torch.randn(3, 2, 6) for name in ("ti", "tc")}
    first = lam.decoder(now, codes, instruction)
    turned = codes | {"tc": codes["tc"].flip(1)}
    swapped = dict(zip(codes, reversed(codes.values())))
    for other in (turned, swapped):
        assert not torch.allclose(lam.decoder(now, other, instruction), first, atol=1e-3)


def test_gain_is_what_the_codes_are_worth(new_run):
    """The loss with the codes of another transition: of a decoder that is blind to them nothing is lost."""
    _, tokens, args = new_run()
    lam = lam_of(tokens, args)
    (_, _, rows), _ = tokens.data.probes()
    latents, expected = {"ti": torch.randn(len(rows), 2, 6)}, []
    lam.decoder.out.weight.data *= 30  # of an untrained one, whose predictions hardly differ
    entries = lam.books["ti"].entries[lam.books["ti"].nearest(latents["ti"])]
    others = np.random.default_rng(0).permutation(len(rows))
    now, _, change, instruction = inputs(lam, rows)
    for codes in (entries, entries[others]):
        error = lam.decoder(now, {"ti": codes}, instruction) - change
        expected.append(error.square().mean().item())
    gain = univla.gains(lam, rows, latents)["ti_gain"]
    assert gain == pytest.approx(expected[1] / expected[0] - 1, abs=1e-5) and abs(gain) > 1e-4
    nn.init.zeros_(lam.decoder.project_codes["ti"].weight)
    assert univla.gains(lam, rows, latents)["ti_gain"] == pytest.approx(0, abs=1e-6)


def test_policy_targets_are_centred(new_run):
    _, tokens, args = new_run("--cloned", "ti")
    lam = lam_of(tokens, args)
    targets = univla.policy_targets(lam, tokens.data, args)
    assert targets.shape == (len(tokens.data.train), 12) and targets.mean(0).abs().max() < 1e-4
    assert float(targets.square().mean()) == pytest.approx(1)


@pytest.mark.parametrize("sees", ["frame", "z"])
def test_what_the_decoder_sees(new_run, sees):
    _, tokens, args = new_run("--fdm-sees", sees)
    lam = lam_of(tokens, args)
    now, after, change, instruction = inputs(lam, tokens.data.train[:3])
    codes = lam.latents(now, after, change, instruction)
    same = torch.allclose(lam.decoder(now, codes, instruction), lam.decoder(now + 1, codes, instruction))
    assert same == (sees == "z")


# ------------------------------------------------------------ the stages


def test_frozen_means_frozen(new_run):
    """Stage 2 leaves the codebook of stage 1 as it was, and moves its own."""
    run, tokens, args = new_run("--lam-updates", 12)
    stage_1 = univla.train_lam(run, tokens, args)
    before = stage_1.books["ti"].entries.clone()
    torch.manual_seed(args.seed + 3)
    fresh = univla.LAM(tokens, args, stage_1)
    lam = univla.train_lam(run, tokens, args, stage_1)
    assert torch.equal(lam.books["ti"].entries, before)
    assert not torch.equal(lam.books["tc"].entries, fresh.books["tc"].entries)
    assert not torch.equal(lam.queries["ti"], fresh.queries["ti"]), "the queries of stage 1 train on"


def test_one_batch_can_be_learnt_by_heart(new_run, monkeypatch):
    monkeypatch.setattr(tokens_module, "GRID", 4)
    run, tokens, args = new_run(
        *"--lam-updates 300 --lam-lr 3e-3 --codebook 16 --width 32 --lam-batch 16".split()
    )
    of_task = [rows[:2] for _, rows, _ in tokens.data.probes()]
    tokens.data.train = np.concatenate(of_task)
    univla.train_lam(run, tokens, args, univla.train_lam(run, tokens, args))
    for stage in ("ti", "tc"):
        losses = [row["fdm_loss"] for row in rows_of(run.folder, stage)]
        assert losses[-1] < 0.1 * losses[0], (stage, losses[0], losses[-1])


def draw_toy(root: Path) -> Path:
    """Two commands, "up" and "down": from an even step to the next the agent's patches (above) get brighter
    or darker accordingly, those of a distractor (below) by chance."""
    make_data(root, length=12, episodes=24)
    rng = np.random.default_rng(0)
    meta = json.loads((root / "meta.json").read_text())
    for shard in meta["shards"]:
        folder = root / shard["shard"]
        step = np.load(folder / "step.npy")
        frames = np.zeros((len(step), SIZE, SIZE, 3), np.uint8)
        actions = np.zeros((len(step), 2), np.float32)
        for row in range(len(step)):
            if step[row] % 2 == 0:
                agent, distractor = rng.integers(60, 196, 2)
                actions[row] = {"reach": 1, "push": -1}[shard["task"]], rng.choice([-1, 1])
            else:
                agent, distractor = (agent, distractor) + 40 * actions[row - 1].astype(int)
            frames[row, 2:6, 2:14] = agent
            frames[row, 8:14, 2:14] = distractor
        np.save(folder / "frames.npy", frames)
        np.save(folder / "actions.npy", actions)
    meta["instructions"] = {"reach": "up", "push": "down"}
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def accuracy(codes: torch.Tensor, truth: np.ndarray) -> float:
    """Of reading truth, -1 or 1, off codes (N,): what most of a code's first half are, on the second half."""
    codes, half = codes.numpy(), len(truth) // 2
    votes = np.bincount(codes[:half], truth[:half], minlength=codes.max() + 1)
    return float((np.sign(votes[codes[half:]]) == truth[half:]).mean())


def test_stage_1_leaves_to_the_instruction_what_it_says(new_run, tmp_path, monkeypatch):
    """On a toy one bit holds the distractor, and not the command, which the instruction says; without it one
    bit does not do. The two of stage 2 hold both."""
    monkeypatch.setattr(tokens_module, "GRID", 4)  # patches a side: a quarter of the time
    root = draw_toy(tmp_path / "toy")
    found, losses = {}, {}
    for text in ("words", "none"):
        flags = "--codes 1 --codebook 2 --width 32 --lam-updates 500 --lam-batch 32 --lam-lr 3e-3"
        run, tokens, args = new_run(
            *flags.split(), "--frame-gap", 1, "--text", text, "--labelled-episodes", 1, data=root
        )
        tokens.data.train = tokens.data.train[tokens.data.columns["step"][tokens.data.train] % 2 == 0]
        lam = univla.train_lam(run, tokens, args)
        losses[text] = rows_of(run.folder, "ti")[-1]["fdm_loss"]
        rows = np.random.default_rng(0).permutation(tokens.data.train)
        codes = lam.books["ti"].nearest(univla.encode(lam, rows)["ti"])[:, 0]
        actions = tokens.data.columns["actions"][rows]
        found[text] = [accuracy(codes, actions[:, dimension]) for dimension in (0, 1)]
        if text == "words":
            lam = univla.train_lam(run, tokens, args, lam)
            losses["stage 2"] = rows_of(run.folder, "tc")[-1]["fdm_loss"]
            latents = univla.encode(lam, rows)
            alive = {
                name: perplexity(shares(book.nearest(latents[name]), 2)) for name, book in lam.books.items()
            }
    command, distractor = found["words"]
    assert distractor > 0.95 and command < 0.7 and losses["words"] < 0.05, (found, losses)
    assert losses["none"] > 0.2 and min(found["none"]) < 0.9, "one bit can not tell both"
    assert losses["stage 2"] < 0.1, "two can"
    assert min(alive.values()) > 1.5, "the frozen codebook is used as well"


@pytest.mark.parametrize(
    "flags",
    ["", "--cloned ti", "--clone-as code", "--cloned ti --clone-as code", "--text none --fdm-sees z"],
)
def test_from_end_to_end(made_up, tmp_path, flags):
    args = parse(made_up, tmp_path / "run", *flags.split(), "--export")
    univla.main(args)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    names = {
        "": "",
        "--cloned ti": "-ti",
        "--clone-as code": "-code",
        "--cloned ti --clone-as code": "-ti-code",
        "--text none --fdm-sees z": "-z-no-language",
    }
    assert summary["variant"] == "univla" + names[flags] and summary["script"] == "univla"
    cloned = "ti" if "ti" in flags.split() else "tc"
    assert summary["stages"] == ["ti", *["tc"] * (cloned == "tc"), "bc", "decoder"]
    for probe in univla.PROBES:
        assert summary[probe] == summary[f"{cloned}_{probe}"]
        assert np.isfinite(summary[f"stage_1_ti_quantised_{probe}"])
    assert 1 <= summary["ti_perplexity"] <= 4
    for kind in ("latent", "code"):
        probed = summary[f"labelled_probe_nmse_{kind}"]
        assert probed["1"] is None and np.isfinite(probed["2"])
    frames = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    actions = {budget: univla.load_policy(tmp_path / "run", budget)(frames) for budget in ("1", "2")}
    assert actions["1"].shape == (3, 4) and not np.array_equal(actions["1"], actions["2"])
    assert (tmp_path / "run/latents.parquet").exists()
    for stages in ([], ["--stages", "ti"]):  # finished already: the summary keeps what it has
        univla.main(parse(made_up, tmp_path / "run", *flags.split(), *stages))
        assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    with pytest.raises(SystemExit, match="other arguments"):
        univla.main(parse(made_up, tmp_path / "run", *flags.split(), "--codes", 3))


def test_a_collapsed_codebook_is_said(new_run, capsys):
    run, tokens, args = new_run("--cloned", "ti")
    lam = univla.train_lam(run, tokens, args)
    univla.summarise(run, tokens.data, args, lam)
    said = "has collapsed" in capsys.readouterr().out
    assert said == (run.results("ti")["ti_perplexity"] < 1.5)
    lam.books["ti"].entries.data[:] = 100 + torch.arange(4)[:, None]  # one is the nearest of all latents
    assert univla.measure(lam, args)["ti_perplexity"] == pytest.approx(1)
    run.training["ti"].results["ti_perplexity"] = 1.0
    univla.summarise(run, tokens.data, args, lam)
    assert capsys.readouterr().out.count("the codebook has collapsed: ti_perplexity 1.00") == 1


GOLDEN = {"ti": [1.403763, 1.440849], "tc": [1.403749, 1.561379]}


def test_golden_step(new_run):
    run, tokens, args = new_run("--lam-updates", 2)
    univla.train_lam(run, tokens, args, univla.train_lam(run, tokens, args))
    losses = {stage: [row["loss"] for row in rows_of(run.folder, stage)] for stage in GOLDEN}
    for stage, values in GOLDEN.items():
        assert losses[stage] == pytest.approx(values, abs=1e-4), losses


def test_killed_and_resumed_equals_uninterrupted(made_up, tmp_path):
    # with so many entries some start again after the first checkpoint, of update 200, and before 240
    flags = [*SMALL.split(), "--lam-updates", 300, "--codebook", 64, "--data", made_up]
    path = tmp_path / "killed/tc.pt"
    kill_when(start_script("univla.py", *flags, "--out", "killed", cwd=tmp_path), path.exists)
    assert torch.load(path, weights_only=True)["update"] == 200
    for name in ("killed", "whole"):
        result = run_script("univla.py", *flags, "--out", name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole")]
    hashes = [{name: stage["sha256"] for name, stage in each["per_stage"].items()} for each in summaries]
    assert hashes[0] == hashes[1] and set(hashes[0]) == {"ti", "tc", "bc", "decoder_1", "decoder_2"}
    assert summaries[0]["tc_action_probe_nmse"] == summaries[1]["tc_action_probe_nmse"]


BOTH_STAGES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, univla
args = univla.parse_args(sys.argv[1:])
run, tokens = univla.open_run(args)
first = univla.train_lam(run, tokens, args)
second = univla.train_lam(run, tokens, args, first)
for stage, lam in (("ti", first), ("tc", second)):
    torch.save(lam.state_dict(), f"{{stage}}{{univla.RANK}}.pt")
run.close()
"""


def test_two_ranks_stay_one_model(made_up, tmp_path):
    """Weights, codebooks with their restarts, and running means; the first update is that of one rank."""
    program = tmp_path / "both_stages.py"
    program.write_text(BOTH_STAGES)
    for updates in (1, 30):  # an entry may start again after 20
        flags = [*SMALL.split(), "--lam-updates", updates, "--data", made_up, "--out", f"two{updates}"]
        process = torchrun(program, *flags, cwd=tmp_path)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        for stage in ("ti", "tc"):
            mine, other = (torch.load(tmp_path / f"{stage}{rank}.pt", weights_only=True) for rank in (0, 1))
            assert all(torch.equal(mine[name], other[name]) for name in mine), (updates, stage)
    result = run_script("univla.py", *flags, "--lam-updates", 1, "--out", "one1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [rows_of(tmp_path / name, "ti")[-1]["loss"] for name in ("one1", "two1")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ------------------------------------------------------------ pretrained parts, tiny and random


@pytest.mark.parametrize("registers", [0, 3])
def test_dino_gives_its_patch_tokens(tmp_path, registers):
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**size, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**size))
    model.save_pretrained(tmp_path / "dino")
    dino = DINO(str(tmp_path / "dino"), torch.device("cpu"), size=30)
    frames = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    tokens = dino(frames)
    assert tokens.shape == (2, 4, 16), "2 x 2 patches of 14 px in 28 px"
    pixels = frames / 255
    pixels = (pixels - torch.tensor(DINO_MEAN)[:, None, None]) / torch.tensor(DINO_STD)[:, None, None]
    with torch.no_grad():
        states = model.eval()(pixel_values=pixels).last_hidden_state
    assert torch.allclose(tokens, states[:, 1 + registers :], atol=1e-5)
    assert not any(parameter.requires_grad for parameter in dino.model.parameters())


DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny_t5(folder: Path) -> tuple[object, transformers.T5Model]:
    tokenizer = tiny_models.fast_tokenizer("<pad>", "</s>", pad_token="<pad>", eos_token="</s>")
    tokenizer.padding_side = "right"
    size = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(tokenizer) + 10)
    model = transformers.T5Model(transformers.T5Config(**size)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, model


def test_a_text_encoder_gives_its_states(tmp_path):
    tokenizer, model = tiny_t5(tmp_path / "t5")
    texts = ["open the drawer", "push the puck to the goal"]
    states = text_states(str(tmp_path / "t5"), texts)
    assert states.shape[::2] == (2, 16)
    for text, found in zip(texts, states):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            alone = model.encoder(input_ids=ids).last_hidden_state[0]
        assert torch.allclose(found[: len(alone)], alone, atol=1e-5) and (found[len(alone) :] == 0).all()


def test_what_encodes_no_text_is_refused_in_one_line(tmp_path):
    tiny_models.clip(tmp_path / "clip")
    with pytest.raises(SystemExit, match="--text .*clip does not load") as error:
        text_states(str(tmp_path / "clip"), ["open the drawer"])
    assert "\n" not in str(error.value)


def test_instructions_may_be_empty():
    numbers, words = word_numbers(["", ""])
    assert words == 1 and nn.Embedding(words, 4)(numbers).shape == (2, 0, 4)


def test_pretrained_parts_from_end_to_end(made_up, tmp_path):
    tiny_models.dinov2(tmp_path / "dino")
    tiny_t5(tmp_path / "t5")
    flags = ("--features", tmp_path / "dino", "--text", tmp_path / "t5")
    univla.main(parse(made_up, tmp_path / "run", *flags))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["variant"] == "univla-dino-t5" and np.isfinite(summary["tc_action_probe_nmse"])
    weights = torch.load(tmp_path / "run/ti.pt", weights_only=True)["module"]
    assert weights["instruction.project.weight"].shape == (16, 16)
    assert not any("model" in name for name in weights), "frozen weights are not in the checkpoint"
    assert univla.load_policy(tmp_path / "run", "1")(np.zeros((2, SIZE, SIZE, 3), np.uint8)).shape == (2, 4)


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--width 18 --heads 4", "--heads"),
        ("--features nowhere", "is no folder"),
        ("--text nowhere", "is no folder"),
        ("--labelled-episodes 9", "from 1 to 4"),
        ("--codebook 1", "at least 2"),
        ("--blocks 2 0", "--blocks must be at least 1"),
        ("--stages ti --export", "--cloned ti"),
        ("--tasks fly", "has no task"),
        ("--frame-gap 40", "longer than a gap of 40"),
    ],
)
def test_bad_flags_are_refused(made_up, tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words) as error:
        univla.open_run(parse(made_up, tmp_path / "run", *flags.split()))
    assert "\n" not in str(error.value)


def test_videos_without_actions(tmp_path):
    root = make_data(tmp_path / "videos", arrays=["frames", "episode", "step"])
    result = run_script("univla.py", *SMALL.split(), "--data", root, "--out", "run", cwd=tmp_path)
    assert "needs actions" in refusal(result)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["stages"] == ["ti", "tc", "bc"] and summary["action_probe_nmse"] is None


def test_no_module_is_left_out_of_the_checkpoint(new_run):
    """The instruction, both codebooks and their queries are trained and stored."""
    _, tokens, args = new_run()
    names = set(dict(lam_of(tokens, args).named_parameters()))
    assert {"books.ti.entries", "queries.ti", "instruction.project.weight"} <= names


# ------------------------------------------------------------ what a slip of one line would change


def test_flags_reach_data_policy_and_decoder(new_run, made_up, tmp_path):
    orders = [new_run("--seed", seed)[1].data.label_order[0].tolist() for seed in range(6)]
    assert orders == LABEL_ORDERS
    flags = (
        "--seed 3 --lr 0.5 --decoder-lr 0.25 --bc-updates 7 --decoder-updates 9 --res-blocks 2 --batch-size 6"
    )
    args = parse(made_up, tmp_path / "run", *flags.split())
    passed = univla.policy_args(args)
    for name in ("seed", "lr", "decoder_lr", "bc_updates", "decoder_updates", "res_blocks", "widths", "stem"):
        assert getattr(passed, name) == getattr(args, name), name
    assert passed.batch_size == 6 and passed.weight_decay == univla.WEIGHT_DECAY


def test_the_summary_has_the_codes_of_the_last_stage(new_run):
    run, tokens, args = new_run()
    lam = univla.train_lam(run, tokens, args, univla.train_lam(run, tokens, args))
    univla.summarise(run, tokens.data, args, lam)
    summary = json.loads((run.folder / "summary.json").read_text())
    for name, value in run.results("ti").items():
        assert summary[f"stage_1_{name}"] == value and summary[name] == run.results("tc")[name] != value


def test_perplexity_is_of_held_out_codes(new_run):
    _, tokens, args = new_run()
    lam = lam_of(tokens, args)
    latents = [univla.encode(lam, held_out)["ti"] for _, _, held_out in tokens.data.probes()]
    lam.books["ti"].entries.data = torch.cat(latents).flatten(0, 1)[::7][:4].clone()
    codes = [lam.books["ti"].nearest(z) for z in latents]
    expected = np.mean([perplexity(shares(each, 4)).mean() for each in codes])
    assert univla.measure(lam, args)["ti_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_warm_up_is_a_fifth_and_dead_entries_start_again_up_to_four_fifths(new_run, monkeypatch):
    run, tokens, args = new_run("--lam-updates", 10)
    calls, quantise = [], univla.LAM.quantise
    monkeypatch.setattr(Codebook, "restart", lambda *_: calls.append("restart"))
    monkeypatch.setattr(univla.LAM, "quantise", lambda *given: calls.append("quantise") or quantise(*given))
    monkeypatch.setattr(univla, "measure", lambda *_: {})
    univla.train_lam(run, tokens, args)
    assert calls == ["restart"] * 2 + ["quantise", "restart"] * 6 + ["quantise"] * 2
