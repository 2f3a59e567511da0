"""Validation losses: equal for every setting of training, known where the answer is known, and apart by what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data import views
from mmgen.data.loader import Corpus
from mmgen.data.views import AFTER, BEFORE, GRID, KINDS, PLAIN, STRUCTURE, TEXT, Views, validation_corpus
from mmgen.evaluate.report import held_out_losses
from mmgen.model import MMGenModel
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train import validate
from mmgen.train.loop import train
from mmgen.train.ranks import Ranks
from mmgen.train.validate import fixed_losses, validation
from tests.conftest import awake, pairs, picture, png, tiny, write_tar

MEANS = ("image_fixed_t", *TEXT)
OBJECTIVES = {
    "transfusion": {},
    **{order: {"kind": "mar", "mar": {"order": order}} for order in ("masked", "raster", "random")},
}


def documents(count: int = 3) -> dict[str, bytes]:
    """Captioned pictures, plain text, and documents with text before, between and after pictures."""
    rng = np.random.default_rng(1)
    members = pairs(3 * count, seed=2)
    for i in range(count):
        members[f"plain{i}.json"] = json.dumps({"caption": f"words alone {i}" + "!" * i}).encode()
        members[f"mixed{i}.0.png"] = png(picture(rng, (4, 4)))
        members[f"mixed{i}.1.png"] = png(picture(rng, (6, 4)))
        listed = [{"text": "ab", "learn": False}, "cde", {"image": "0.png"}, "fg" * (i + 1), {"image": "1.png"}, "h"]
        members[f"mixed{i}.json"] = json.dumps(listed).encode()
    return members


def run_on_documents(tmp_path: Path) -> Config:
    """Settings of a tiny run on `documents`."""
    shard = str(write_tar(tmp_path / "mixed.tar", documents()))
    return tiny(tmp_path, data={"train": [shard], "val": [shard]}, train={"batch_rows": 16})


@pytest.fixture
def mixed(tmp_path: Path) -> Config:
    return run_on_documents(tmp_path)


def corpus_of(config: Config) -> Corpus:
    return validation_corpus(config, Tokenizer.of(config))


def flat(model: MMGenModel, config: Config, ranks: Ranks | None = None) -> dict[str, float]:
    return fixed_losses(model, corpus_of(config), ranks or Ranks()).flat("")


# What must not matter.

SETTINGS: dict[str, dict] = {
    "seed": {"run": {"seed": 11}},
    "noisy": {"objective": {"transfusion": {"context": "noisy"}}},
    "clean_copy": {"objective": {"transfusion": {"context": "clean_copy"}}, "data": {"row_length": 64}},
    "forms": {"data": {"image_first": 0.9, "caption_drop": 0.8}},
    "times": {"objective": {"time": {"distribution": "logit_normal", "mu": 1.0, "stratified": False}}},
    "batch": {"train": {"batch_rows": 7, "micro_rows": 3}, "data": {"workers": 2, "window": 5, "block": 2}},
}


def check_settings(config: Config) -> None:
    """Equal weights have equal losses under every setting of training."""
    model, _ = awake(config, torch.float32)
    found = flat(model, config)
    for name, changes in SETTINGS.items():
        other = flat(model, override(config, changes))
        assert other.keys() == found.keys(), name
        assert other == pytest.approx(found, rel=1e-6), name


class Together(Ranks):
    """One of several ranks in threads of this process, which exchange real messages."""

    scores: int | None = None
    """The rank whose chunks are scored, if it is not this one."""

    def __init__(self, rank: int, world: int, board: list, barrier: threading.Barrier) -> None:
        super().__init__(rank if self.scores is None else self.scores, world)
        self.slot, self.board, self.barrier = rank, board, barrier

    def _reduced(self, values, how) -> list[float]:
        self.board[self.slot] = list(values)
        self.barrier.wait(60)
        everyone = torch.tensor(self.board, dtype=torch.float64)
        self.barrier.wait(60)
        return (everyone.amax(0) if "MAX" in str(how) else everyone.sum(0)).tolist()


def on_ranks(world: int, function: Callable[[Ranks], dict]) -> list[dict]:
    """The results of a function on each rank."""
    board, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def work(rank: int) -> None:
        try:
            results[rank] = function(Together(rank, world, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return results


def check_worlds(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of ranks gives the losses of one rank, and all ranks take part in the same number of passes."""
    monkeypatch.setattr(validate, "CHUNK", 4)  # the last chunk is a part of one
    model, _ = awake(config, torch.float32)
    passes: list[int] = []
    whole = flat(model, config)
    add = validate.add_losses

    def counted(*arguments) -> None:
        passes.append(threading.get_ident())
        add(*arguments)

    monkeypatch.setattr(validate, "add_losses", counted)
    for world in (2, 3):
        passes.clear()
        for other in on_ranks(world, lambda ranks: flat(model, config, ranks)):
            assert other.keys() == whole.keys()
            assert other == pytest.approx(whole, rel=1e-6)
        assert len({passes.count(rank) for rank in set(passes)}) == 1


EXPECTED = {
    # 9 captioned pictures, each caption before and after its picture; 3 plain texts; 3 mixed documents.
    BEFORE: 9 * len("picture 0") + 3 * len("cde"),
    AFTER: 9 * len("picture 0") + len("fg") * (1 + 2 + 3) + 3 * len("h"),
    PLAIN: 3 * len("words alone 0") + 0 + 1 + 2,
    # BOI and size of each picture (two sizes are declared), and EOS of each document.
    STRUCTURE: 9 * 2 * 3 + 3 * 1 + 3 * 5,
}


def counts_of(config: Config) -> tuple[Tensor, int]:
    """Number of scored items of each kind, and of all text targets of the views in which text is scored."""
    corpus = corpus_of(config)
    made = Views(corpus, corpus.patcher)
    n = len(corpus.samples)
    counts, targets = torch.zeros(KINDS, dtype=torch.long), 0
    for batch in made.batches(range(n), 4):
        cell = batch.cell_BS.flatten()
        text = cell[batch.raw.label_at_L + 1]
        at = torch.cat([text, cell[batch.raw.at_I[batch.raw.loss_at_J]]])
        counts += torch.bincount(at[at < n * KINDS] % KINDS, minlength=KINDS)
        # A view has learned patches or scored text, so its text targets count if it has no learned patches.
        row = len(batch.raw.ids_BS[0])
        document = batch.raw.document_BS.flatten() + 1000 * (torch.arange(len(cell)) // row)
        drawn = document[batch.raw.at_I[batch.raw.loss_at_J]]
        targets += int((~torch.isin(document[batch.raw.label_at_L], drawn)).sum())
    return counts, targets


def check_kinds(config: Config) -> None:
    """Kinds of text are those of their names, and together they are all text targets."""
    counts, targets = counts_of(config)
    assert dict(enumerate(counts[: len(TEXT)].tolist())) == EXPECTED
    assert int(counts[: len(TEXT)].sum()) == targets
    sizes = [6 if i % 3 == 0 else 4 for i in range(9)] + 3 * [4, 6]
    assert counts[len(TEXT) :].tolist() == [sum(sizes)] * len(GRID)


def test_no_setting_of_training_changes_the_losses(mixed: Config) -> None:
    check_settings(mixed)


def test_no_setting_of_training_changes_the_losses_of_mar(mixed: Config) -> None:
    check_settings(override(mixed, {"objective": OBJECTIVES["masked"]}))


def test_losses_drawn_as_in_training_do_depend_on_the_policy(mixed: Config) -> None:
    """So the comparison above can fail; the seed of the run does not change them either."""
    config = override(mixed, {"objective": {"transfusion": {"context": "noisy"}}})
    model, tokenizer = awake(config, torch.float32)
    found = validation(model, corpus_of(config), Ranks())
    assert found == validation(model, corpus_of(override(config, {"run": {"seed": 11}})), Ranks())
    other = validation(
        model, corpus_of(override(mixed, {"objective": {"transfusion": {"context": "capped"}}})), Ranks()
    )
    assert abs(found["val_loss/text"] - other["val_loss/text"]) > 1e-4
    # With the seed of validation as `run.seed`, they are those of earlier versions.
    earlier = Corpus(config.data.val, tokenizer, override(config, {"run": {"seed": views.SEED}}))
    assert found == validation(model, earlier, Ranks())


def test_every_number_of_ranks_gives_the_same_losses(mixed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    check_worlds(mixed, monkeypatch)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kinds_of_text_add_up_to_all_text_targets(mixed: Config, objective: str) -> None:
    config = override(mixed, {"objective": OBJECTIVES[objective]})
    if objective != "masked":
        check_kinds(config)
        return
    counts, _ = counts_of(config)  # some patches are not hidden, the same ones at every time
    assert dict(enumerate(counts[: len(TEXT)].tolist())) == EXPECTED
    assert len(set(counts[len(TEXT) :].tolist())) == 1


@pytest.mark.slow
def test_two_processes_of_stage_3_record_the_losses_of_one(mixed: Config) -> None:
    """Each forward pass gathers weights from both ranks, and their chunks have different numbers of batches."""
    recorded = []
    for world, stage in ((1, 0), (2, 3)):
        run = mixed.run.dir.parent / f"world-{world}"
        config = override(
            mixed, {"run": {"dir": str(run)}, "train": {"steps": 2, "batch_rows": 4, "zero_stage": stage}}
        )
        run.mkdir()
        file = run / "settings.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "mmgen.cli"]
        words = [sys.executable, *start, "train", "--config", str(file)]
        done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        recorded.append(next(line for line in lines if "val_loss/text" in line))
    assert recorded[1] == pytest.approx(recorded[0], rel=1e-5)


# Faults: each check fails when the code is broken in this way.


def _seeded(patch: pytest.MonkeyPatch) -> None:
    """The noise follows `run.seed`."""
    made = corpus_of

    def corpus(config: Config) -> Corpus:
        patch.setattr(views, "SEED", config.run.seed)
        return made(config)

    patch.setitem(globals(), "corpus_of", corpus)


def _training_context(patch: pytest.MonkeyPatch) -> None:
    """Images before text are noised by the policy of training."""

    def blocks(self, segment):
        if not isinstance(segment, views.DecodedImage):
            return segment
        site = views.ImageSite(segment.grid, False, True, 0.3, 7)
        drawn = self.layout.blocks(site, np.random.default_rng(0))[-1]
        return views.ImageSegment(segment.x_NP, segment.grid, [replace(drawn, loss=False)], segment.learn)

    patch.setattr(Views, "_clean", blocks)


def _swapped(patch: pytest.MonkeyPatch) -> None:
    """Text before and after an image is exchanged."""
    patch.setattr(views, "BEFORE", AFTER)
    patch.setattr(views, "AFTER", BEFORE)


def _last_batch_dropped(patch: pytest.MonkeyPatch) -> None:
    batches = Views.batches
    patch.setattr(Views, "batches", lambda self, samples, rows: batches(self, samples, rows)[:-1])


def _counted_twice(patch: pytest.MonkeyPatch) -> None:
    """Every rank scores the chunks of rank 0."""
    patch.setattr(Together, "scores", 0)


def _no_filler(patch: pytest.MonkeyPatch) -> None:
    """A rank with fewer batches does not take part in the forward passes of the others."""
    patch.setattr(Together, "maxima", lambda self, values: list(values))
    patch.setattr(Views, "empty", lambda self, rows: None)


FAULTS = {
    "seeded": (_seeded, check_settings),
    "training_context": (_training_context, check_settings),
    "swapped": (_swapped, check_kinds),
    "last_batch_dropped": (_last_batch_dropped, check_kinds),
    "counted_twice": (_counted_twice, check_worlds),
    "no_filler": (_no_filler, check_worlds),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_find_a_fault(mixed: Config, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    break_it, check = FAULTS[fault]
    break_it(monkeypatch)
    arguments = (mixed, monkeypatch) if check is check_worlds else (mixed,)
    with pytest.raises(AssertionError):
        check(*arguments)


# Sources.


def test_named_sources_have_losses_of_their_own(mixed: Config, tmp_path: Path) -> None:
    one = str(write_tar(tmp_path / "one.tar", pairs(5, seed=5)))
    shards = [{"name": "pairs", "shards": [one]}, {"name": "all-kinds", "shards": mixed.data.val}]
    both = override(mixed, {"data": {"val": shards}})
    model, _ = awake(mixed, torch.float32)
    found = flat(model, both)
    pairs_alone, mixed_alone = flat(model, override(mixed, {"data": {"val": [one]}})), flat(model, mixed)
    for name in MEANS:
        for alone, source in ((pairs_alone, "pairs"), (mixed_alone, "all-kinds")):
            for end in ("", "_low", "_high"):
                key = f"{name}/{source}{end}"
                assert (name + end in alone) == (key in found)
                assert name == "text_plain" or found[key] == pytest.approx(alone[name + end], rel=1e-6)
    # The whole is the mean of the sources, weighted with their numbers of terms; see EXPECTED.
    terms = {"text_after_image": (45, EXPECTED[AFTER]), "text_structure": (30, EXPECTED[STRUCTURE])}
    terms["image_fixed_t"] = (8 * (6 + 4 + 4 + 6 + 4), 8 * (3 * (6 + 4 + 4) + 3 * 10))
    for name, (a, b) in terms.items():
        weighted = (a * found[f"{name}/pairs"] + b * found[f"{name}/all-kinds"]) / (a + b)
        assert found[name] == pytest.approx(weighted, rel=1e-6)
    assert not [name for name in found if "_t0." in name and "/" in name]


def test_a_run_records_the_losses_of_its_sources(config: Config, capsys: pytest.CaptureFixture) -> None:
    named = override(
        config, {"data": {"val": [{"name": "toys", "shards": config.data.val}]}, "train": {"val_every": 3}}
    )
    train(named)
    lines = [json.loads(line) for line in (named.run.dir / "metrics.jsonl").read_text().splitlines()]
    recorded = [line for line in lines if "val_loss/text" in line]
    assert [line["step"] for line in recorded] == [3, 6]
    for line in recorded:
        for name in ("image_fixed_t", "image_fixed_t0.0625", "text_after_image", "text_after_image/toys"):
            low, mean, high = (line[f"val_loss/{name}{end}"] for end in ("_low", "", "_high"))
            assert low < mean < high
        assert line["val_loss/image_fixed_t/toys"] == line["val_loss/image_fixed_t"]
    assert "loss/text_after_image" in capsys.readouterr().err
    assert recorded[0]["val_loss/text_after_image"] != recorded[1]["val_loss/text_after_image"]


def test_the_report_has_the_losses_of_the_log(config: Config) -> None:
    model, _ = awake(config, torch.float32)
    report = held_out_losses(model, corpus_of(config)).flat()
    assert {"val_loss_text", "val_loss_image", "val_loss_image_by_place"} <= report.keys()
    logged = fixed_losses(model, corpus_of(config), Ranks()).flat("val_loss/")
    assert {
        name.replace("val_loss_", "val_loss/", 1): value for name, value in report.items()
    }.items() >= logged.items()


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (
            [{"name": "a", "shards": ["x.tar"]}, {"name": "a", "shards": ["y.tar"]}],
            "several sources named a: give each",
        ),
        (
            [{"name": "a", "shards": ["x.tar"], "weight": 2.0}],
            "data.val has a source with a weight.*leave the weight out",
        ),
        ([{"name": "a/b", "shards": ["x.tar"]}], "data.val"),
    ],
)
def test_a_wrong_source_is_explained(val: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(Config(), {"data": {"val": val}})
