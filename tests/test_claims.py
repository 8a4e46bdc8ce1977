"""claims.py: its rules by hand, and the whole on a toy encoder of 12 blocks."""

import json

import numpy as np
import pytest
from conftest import make_data, make_model, refused

import train
from experiments import claims
from experiments.claims import Comparison, Outcome
from lib.significance import holm, intervals
from model import POOLINGS

RECIPE = claims.Recipe(12, [6, 8, 11], "max", [9, 11, 12], "2", 7, 5)


PLAIN = ["wf-epoch-auto", "wf-lowest", "mc-bert-mix"]  # controls of one run
DRAWS = [f"{name}-{i}" for name in ("wf-random", "random-layers") for i in (1, 2, 3)]


def run(script, model, data, out, *more):
    flags = ("--model", model, "--data", data, "--out", out)
    return script("experiments.claims", *flags, *more)


def read_lines(path):
    return path.read_text().splitlines()


def accuracy(folder, epoch, data, language, split="test"):
    """Of the logits that a run kept, with the classes of rows spread evenly, read by hand."""
    labels = read_lines(data / "labels.txt")
    logits = np.load(folder / f"predictions/{epoch}/{split}.{language}.npz")["logits"]
    rows = read_lines(data / f"{split}.{language}.tsv")[1:]
    assert len(logits) == {"train": 20, "test": 7}[split]
    right = []
    for i, best in enumerate(logits.argmax(1)):
        right.append(rows[i * len(rows) // len(logits)].endswith(f"\t{labels[best]}"))
    return np.mean(right)


def test_all_is_trained_and_compared_and_a_second_call_trains_nothing(
    tmp_path, script, monkeypatch
):
    model, out, data = make_model(tmp_path / "model", blocks=6), tmp_path / "out", tmp_path / "data"
    make_data(data, train=24, dev=3, test=7)
    flags = "--seeds 1 --epochs 1 --freeze-epoch 0 --hidden 7 --lr 1e-2 "
    flags += "--max-length 32 --layers 2 3 5 --freeze-layers 4 5 6 --max-train-rows 20 --controls"
    flags = (model, data, out, *flags.split())
    asked, fit = [], train.main
    monkeypatch.setattr(train, "main", lambda command: asked.append(command) or fit(command))

    # a call can have a share of the runs, and writes no table
    assert run(script, *flags, "--share", "2/3")[0] == 0
    shared, asked[:] = list(asked), []
    assert not (out / "claims.json").exists()
    status, _, error = run(script, *flags)
    assert status == 0, error
    assert shared == asked[1::3]

    # every system and control is trained, with the flags that its name promises
    arguments = {}
    for path in (out / "runs").iterdir():
        name = path.name.removesuffix("-seed0")
        arguments[name] = json.loads((path / "run.json").read_text())["arguments"]
    recipe = RECIPE._replace(freeze_epoch="0", epochs=1)
    assert {*arguments} == {*claims.systems(recipe), *PLAIN, *DRAWS}
    for name, layers in ("last-layer", [6]), ("middle-layer", [4]), ("upper-layers", range(2, 7)):
        assert arguments[name]["layers"] == [*layers]
    long = arguments["mc-bert-long"]
    assert (long["seed"], long["epochs"], long["schedule"]) == (0, 2, "constant")
    assert arguments["mc-bert-mix"]["combine"] == "mix"
    assert arguments["mc-bert-deep"]["hidden"] == 7

    # what is reached and compared is what the logits say
    written, text = json.loads((out / "claims.json").read_text()), (out / "claims.md").read_text()
    folder = out / "runs/mc-bert-long-seed0"
    half, last = (
        np.mean([accuracy(folder, epoch, data, language) for language in ("de", "zh")])
        for epoch in (1, 2)
    )
    reached = {system["name"]: system for system in written["systems"]}
    assert written["conclusions"][0]["others"]["by_seed"] == pytest.approx([half - last])
    assert reached["mc-bert-long"]["others"] == pytest.approx(last)
    in_train = accuracy(folder, 2, data, "en", "train")
    assert reached["mc-bert-long"]["train"] == pytest.approx(in_train)
    mean = accuracy(folder, "mean", data, "en")
    assert reached["mc-bert-long@mean"]["source"] == pytest.approx(mean)
    conclusions, _, after = text.partition("## Accuracies")
    assert "8: a deeper" in conclusions and f"{100 * last:.1f}" in after
    assert "- wf-epoch-auto: seed 0 never, not counted" in text
    for draw, name in zip(written["draws"], DRAWS, strict=True):
        assert draw["layers"] == (arguments[name]["freeze_layers"] or arguments[name]["layers"])
        assert draw["above_middle"] == len({*draw["layers"]} & {4, 5, 6})
        assert draw["run"] == name and name in text

    # a second call gives train.py the same commands, so that it finds its runs complete; what is
    # deleted is not needed for the same rows
    first, asked[:] = list(asked), []
    monkeypatch.setattr(train, "main", asked.append)
    assert run(script, *flags, "--drop-models")[0] == 0 and asked == first
    assert not [*out.rglob("*.safetensors"), *out.rglob("state.pt")]
    assert run(script, *flags, "mc-bert-mix", "wf-random")[0] == 0
    less = json.loads((out / "claims.json").read_text())
    assert less["conclusions"] == written["conclusions"]
    named = [row["a"] for row in less["controls"][len(claims.CONTROLS) :]]
    assert named == ["mc-bert-mix", "wf-random", "wf-random"]
    for more, message in (
        (["mix"], f"--controls mix: they are {PLAIN[0]} wf-lowest wf-random"),
        (["--max-rows", 3], "baseline-seed0 did not keep epoch 1, but none"),
    ):
        refused(run(script, *flags, *more), message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seed=3", "--seed: each system"),
        ("--share 3/2", "expected 1/N to N/N, got 3/2"),
        ("--freeze-epoch 5", "--freeze-epoch 5: expected 0 to 4 (of --epochs), or auto"),
        ("--train-language fr", "train.fr.tsv does not exist"),
        ("--layers 6 8 11", "--layers 6: the model has layers 0 (embeddings) to 5"),
    ],
)
def test_bad_flags_are_said_before_anything_is_trained(
    flags, message, script, model_folder, data_folder, tmp_path
):
    given = ("--layers", 2, "--freeze-layers", 1, *flags.split())
    refused(run(script, model_folder, data_folder, tmp_path / "out", *given), message)
    assert not (tmp_path / "out").exists()


def test_another_language_is_needed_and_rows_that_are_translations(model_folder, tmp_path, script):
    data = make_data(tmp_path / "data", train=5, dev=3, test=7, languages=("en", "de"))
    path = tmp_path / "data/test.de.tsv"
    path.write_text("\n".join(read_lines(path)[:-1]) + "\n")
    call = model_folder, data, tmp_path / "out"
    refused(run(script, *call), "the test rows of en de are no translations of each other")
    path.unlink()
    refused(run(script, *call), "in en and in another language, it is there in: en")


def test_a_stop_stops_the_whole_and_what_is_not_finished_is_not_compared(
    model_folder, data_folder, tmp_path, script, monkeypatch
):
    flags = (model_folder, data_folder, tmp_path, "--layers", 2, "--freeze-layers", 1)
    calls, statuses = [], [0, 130]
    monkeypatch.setattr(train, "main", lambda flags: calls.append(flags) or statuses[-1])
    assert run(script, *flags)[0] == 130 and len(calls) == 1
    statuses.pop()
    monkeypatch.setattr(claims, "read_run", lambda folder: ({"complete": False}, []))
    refused(run(script, *flags), "baseline-seed0 is not finished")


def test_the_controls_draw_other_layers_for_each_seed():
    drawn, pooled = {}, set()
    for seed in range(3):
        for name, control in claims.controls(RECIPE, seed).items():
            # beside the paper's freezing, and beside none
            assert control.against == ["mc-bert-wf", "mc-bert"][not name.startswith("wf-") :]
            for flags in control.runs.values():
                drawn.setdefault(name, set()).add(tuple(flags))
                if name == "random-layers":
                    pooled.update(flags[1:4])
    once = dict.fromkeys(["wf-epoch-1", "wf-epoch-3", *PLAIN], 1)
    counts = {name: len(flags) for name, flags in drawn.items()}
    assert counts == once | {"wf-random": 8, "random-layers": 9}  # two of nine alike
    assert (min(pooled), max(pooled)) == (1, 12)


def test_when_layers_froze():
    rows = [(1, []), (1, []), (2, []), (2.5, []), (3, [9]), (4, [9])]
    rows = [{"epoch": epoch, "frozen_layers": frozen} for epoch, frozen in rows]
    assert claims.frozen_after(rows) == 2.5
    assert claims.frozen_after(rows[:4]) is None and claims.frozen_after(rows[4:]) == 0


def some_run(system, name, seed, rows, frozen_after=None, freeze_layers=()):
    """A run that is right on that many of 10 rows in two languages, and never in the first."""
    right = np.zeros((10, 3))
    right[:rows, 1:] = 1
    when = "auto" if freeze_layers else None
    arguments = {"seed": seed, "freeze_layers": freeze_layers, "layers": [6], "freeze_epoch": when}
    return claims.Run(system, name, arguments, frozen_after, {"last": Outcome(right, rows / 10)})


def test_a_seed_that_never_froze_does_not_count_and_draws_count_as_their_mean():
    runs = [some_run("mc-bert", "mc-bert", seed, 5) for seed in (0, 1, 2)]
    runs += [some_run("auto", "auto", seed, 9, 2, [9]) for seed in (0, 2)]
    runs += [some_run("auto", "auto", 1, 1, None, [9])]
    runs += [some_run("random", f"random-{i}", 0, 2 * i) for i in (1, 2, 3)]
    outcomes, groups = claims.by_system(runs), np.arange(10)
    seeds, source, others = claims.compare(outcomes["auto"], outcomes["mc-bert"], groups, 0)
    assert seeds == [0, 2] and source.difference == 0
    assert others.difference == pytest.approx(0.4)
    (row,) = claims.judge([Comparison(None, "", "random", "auto")], outcomes, groups, 0)
    assert row["verdict"] == "one seed" and row["others"]["difference"] == pytest.approx(-0.5)
    froze, draws = claims.what_happened(runs, 12, 0)
    said = claims.freezing_lines(froze)
    assert said == "- auto: seed 0 after epoch 2; seed 2 after epoch 2; seed 1 never, not counted"
    assert [draw["others"] for draw in draws] == pytest.approx([0.2, 0.4, 0.6])
    outcomes["auto"].clear()
    (row,) = claims.judge([Comparison(6, "", "auto", "mc-bert")], outcomes, groups, 0)
    assert "| no seed |" in claims.comparison_table([row], "en")
    seeds = [system["seeds"] for system in claims.accuracies(outcomes, 0)]
    assert seeds == [[0, 1, 2], [], [0]]


def test_holm_is_over_the_family_and_a_control_claims_nothing():
    """40 rows that differ by 4 in the same way in three seeds: p is small alone, not among many."""
    right = np.zeros((40, 2))
    right[:6] = 1
    better = {seed: Outcome(right, 0) for seed in range(3)}
    same = {seed: Outcome(np.zeros((40, 2)), 0) for seed in range(3)}
    outcomes, groups = {"a": better, "b": same}, np.arange(40)
    family = [Comparison(1, "", "a", "b"), Comparison(8, "", "b", "a", "no gain")]
    alone, none = claims.judge(family, outcomes, groups, 0)
    assert (alone["verdict"], none["verdict"]) == ("supported", "supported")
    # of "no gain" it is the difference to the margin that is tested
    shifted = np.stack([-right[:, :1] - claims.MARGIN] * 3)  # (S, N, 1)
    p = [alone["others"]["p"], intervals(shifted, groups)[0].p]
    assert [alone["p_holm"], none["p_holm"]] == pytest.approx(holm(p).tolist())
    among = claims.judge(family[:1] * 60, outcomes, groups, 0)
    assert {row["verdict"] for row in among} == {"undecided"}
    controls = [Comparison(None, "", "a", "b"), Comparison(None, "", "b", "a")]
    rows = claims.judge(controls, outcomes, groups, 0)
    assert [row["verdict"] for row in rows] == ["better", "worse"]


def test_what_phase_one_says_is_of_each_combination_at_its_best_rate(tmp_path):
    """Joint dev prefers rate 0.1 for max of 5 and 0.01 for all else; by it 5+6 is the best
    combination and 5 the best layer, though on test 6 is best."""
    lines = ["pooling,layers,hidden,lr,seed,dev_en,dev_de,test_en,test_de,test_zh"]
    first, second = list(POOLINGS)[:2]
    for pooling, layers, lr, dev, test in (
        (first, "5", 0.1, 0.91, 0.5),
        (first, "5", 0.01, 0.8, 0.99),
        (first, "6", 0.01, 0.9, 0.7),
        (first, "6", 0.1, 0.8, 0.99),
        (first, "5+6", 0.01, 0.92, 0.6),
        (second, "6", 0.01, 0.9, 0.2),
    ):
        for seed in (0, 1):
            scores = f"0,{dev},1,{test},{test + 0.1 * seed - 0.05}"
            lines.append(f"{pooling},{layers},0,{lr},{seed},{scores}")
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "best.json").write_text('{"train_language": "en", "select": "joint"}')
    said = claims.phase_one(tmp_path, "test")
    assert f"{first} 60.0, {second} 20.0" in said and "trained on en" in said
    assert f"the single layer chosen: {first} of 5 at lr 0.1, 50.0" in said
    assert f"the combination chosen: {first} of 5+6 at lr 0.01, 60.0" in said
    (tmp_path / "results.csv").write_text(
        "pooling,layers,hidden,lr,seed,dev_de,test_en\nmax,5,0,0.1,0,0.5,0.5\n"
    )
    with pytest.raises(claims.UserError, match="has no test scores in another language than en"):
        claims.phase_one(tmp_path, "test")
