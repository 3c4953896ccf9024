"""The study's parts: data, model, measurements, one cell, the grid, records, worker processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.placement import Placement, PostNorm, PreNorm, Residual, placements
from normkit.study import clock, data, grid, measure, models, processes, records, run, train
from normkit.study.data import Corpus
from normkit.study.models import Transformer
from normkit.theory import post_skip_weight

ONE_OF_EACH = [("none", None), *((norm, place) for norm in ("batch", "layer", "rms") for place in ("pre", "post"))]
WITH_A_NORM = ["batch", "layer", "rms"]

TEXT = b"".join(b"line %d of a text that is easy to learn, " % (number % 7) for number in range(400))
CORPUS = Corpus("a test", TEXT[:12_000], TEXT[12_000:], 1, 1)
CELL = grid.Cell(
    norm="layer",
    placement="post",
    depth=2,
    seed=0,
    lr=3e-3,
    steps=3,
    warmup=1,
    width=16,
    heads=2,
    batch=4,
    seq=8,
    init="xavier",
    data=CORPUS.digest,
)
SETTINGS = grid.Settings(
    norms=("none", "layer"),
    placements=("pre", "post"),
    depths=(1, 2),
    seeds=(0, 1),
    steps=3,
    lr=3e-3,
    warmup=1,
    width=16,
    heads=2,
    batch=4,
    seq=8,
    init="xavier",
    jobs=1,
    threads=1,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transformer(norm: str, place: str | None, *, depth: int = 2, init: str = "xavier", seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    placement = None if place is None else placements(place, 1)[0]
    return Transformer(depth=depth, width=16, heads=2, seq=8, norm=norm, placement=placement, init=init)


def some_batch() -> data.Batch:
    return next(data.batches(TEXT, 4, 8, seed=3))


# ------------------------------------------------------------------------------------------------ data


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 200 small files, some of which are no sources to learn from."""
    root = tmp_path / "lib"
    for number in range(200):
        file = root / f"package{number % 5}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"<file %d>" % number * 20)
    for skipped in (
        "test/a.py",
        "json/tests/a.py",
        "site-packages/a.py",
        "encodings/a.py",
        "_sysconfigdata_x.py",
        "a.c",
    ):
        file = root / skipped
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"<skipped>" * 20)
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(root))
    return root


def test_no_file_is_both_trained_on_and_held_out(library):
    corpus = data.standard_library()
    marks = [b"<file %d>" % number * 20 for number in range(200)]
    assert all((mark in corpus.train) != (mark in corpus.held_out) for mark in marks)
    assert (corpus.files_train, corpus.files_held_out) == (
        sum(mark in corpus.train for mark in marks),
        sum(mark in corpus.held_out for mark in marks),
    )
    assert 5 <= corpus.files_held_out <= 40, "about a tenth"


def test_tests_foreign_packages_and_generated_tables_are_not_read(library):
    corpus = data.standard_library()
    assert b"<skipped>" not in corpus.train + corpus.held_out


def test_the_split_is_the_same_every_time_and_keeps_to_the_limit(library):
    assert data.standard_library() == data.standard_library()
    small = data.standard_library(limit_bytes=5_000)
    assert 5_000 <= len(small.train) + len(small.held_out) < 5_000 + 220
    assert small.digest != data.standard_library().digest


def test_a_file_that_is_added_moves_no_other_file_across_the_split(library):
    before = data.standard_library()
    (library / "one_more.py").write_bytes(b"<new>" * 20)
    after = data.standard_library()
    assert after.train.replace(b"<new>", b"") == before.train
    assert after.held_out.replace(b"<new>", b"") == before.held_out


def test_a_python_without_sources_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        data.standard_library()
    assert str(error.value) == (
        "text: expected the Python standard library's sources, found 0 of its .py files; "
        "give a file of your own with --text FILE"
    )


def test_the_real_standard_library_has_megabytes_of_both_parts():
    corpus = data.standard_library()
    assert len(corpus.train) > 2_000_000
    assert len(corpus.held_out) > 100_000


def test_a_single_file_holds_out_its_last_tenth(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(200)))
    corpus = data.text_file(file)
    assert (corpus.train, corpus.held_out) == (bytes(range(180)), bytes(range(180, 200)))
    assert corpus.name == "book.txt", "a name, never a path"


def test_texts_that_cannot_be_used_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError) as missing:  # noqa: PT011 the messages are compared below
        data.text_file(tmp_path / "nothing.txt")
    assert str(missing.value) == f"text: expected a file, found nothing at {tmp_path / 'nothing.txt'}"
    with pytest.raises(ValueError) as folder:  # noqa: PT011
        data.text_file(tmp_path)
    assert str(folder.value) == f"text: expected a readable file, {tmp_path} cannot be read: Is a directory"
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    with pytest.raises(ValueError) as short:  # noqa: PT011
        data.check_length(data.text_file(tmp_path / "short.txt"), seq=64)
    assert str(short.value) == (
        "text: expected at least 65 bytes (one sequence and its next byte) to train on and to hold out, "
        "got 90 and 10 from short.txt; use more text or a smaller seq"
    )


def test_the_shortest_text_that_is_accepted_gives_batches():
    corpus = Corpus("short", bytes(range(9)), bytes(range(9)), 1, 1)
    data.check_length(corpus, seq=8)
    inputs, targets = next(data.batches(corpus.train, 2, 8, seed=0))
    assert torch.equal(inputs, torch.arange(8).expand(2, 8))
    assert torch.equal(targets, torch.arange(1, 9).expand(2, 8))
    assert len(data.spaced_batches(corpus.held_out, 2, 8, 3)) == 3


def test_batches_follow_the_seed_and_targets_are_the_next_bytes():
    (inputs, targets), (again, _), (other, _) = (next(data.batches(TEXT, 4, 8, seed)) for seed in (5, 5, 6))
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, other)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert all(bytes(row.tolist()) in TEXT for row in inputs)


def test_validation_windows_reach_from_the_first_byte_to_the_last():
    scored = data.spaced_batches(bytes(range(200)), 3, 4, 5)
    starts = sorted(int(row[0]) for inputs, _ in scored for row in inputs)
    assert len(starts) == 15
    assert (starts[0], starts[-1]) == (0, 195)
    assert all(int(inputs[-1, 0]) - int(inputs[0, 0]) > 100 for inputs, _ in scored), "each batch is spread"
    assert max(int(row[-1]) for _, targets in scored for row in targets) == 199


def test_guess_loss_is_the_cross_entropy_of_byte_frequencies_counted_once_more():
    scored = [(torch.tensor([[0]]), torch.tensor([[ord("a"), ord("b"), ord("z")]]))]
    frequencies = [4 / 260, 2 / 260, 1 / 260]  # "aaab": each of the 256 bytes counts one more than it occurs
    assert data.guess_loss(b"aaab", scored) == pytest.approx(-sum(map(math.log, frequencies)) / 3)


# ----------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("norm", "place"), ONE_OF_EACH)
def test_a_later_byte_does_not_change_earlier_predictions_in_eval(norm, place):
    model = transformer(norm, place).eval()
    ids, _ = some_batch()
    changed = ids.clone()
    changed[:, 5] += 1
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_with_batch_norm_in_training_a_later_byte_does_change_earlier_predictions():
    model = transformer("batch", "pre").train()
    ids, _ = some_batch()
    changed = ids.clone()
    changed[:, 5] += 1
    assert not torch.equal(model(ids)[:, :5], model(changed)[:, :5])


def test_layers_start_different_from_each_other_and_equal_across_norms():
    model = transformer("layer", "pre", depth=3)
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for first, one in enumerate(matrices):
        assert not any(one.shape == two.shape and torch.equal(one, two) for two in matrices[first + 1 :])
    for norm, place in ONE_OF_EACH:
        others = [m.weight for m in transformer(norm, place, depth=3).modules() if isinstance(m, nn.Linear)]
        assert all(torch.equal(one, two) for one, two in zip(matrices, others, strict=True)), (norm, place)


def test_batch_norm_in_the_model_reduces_over_batch_and_time_and_runs_in_eval():
    norm = models.NORMS["batch"](6)
    x = torch.randn(4, 5, 6) * 3 + 1
    var, mean = torch.var_mean(x, dim=(0, 1), correction=0)
    torch.testing.assert_close(norm(x), (x - mean) / torch.sqrt(var + models.EPS))
    running_var = 0.9 + 0.1 * var * 20 / 19
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, running_var)
    torch.testing.assert_close(norm.eval()(x), (x - 0.1 * mean) / torch.sqrt(running_var + models.EPS))


def test_every_norm_of_a_model_has_the_same_eps_and_is_normkits():
    for norm, place in ONE_OF_EACH[1:]:
        norms = [module for module in transformer(norm, place).modules() if hasattr(module, "eps")]
        assert {module.eps for module in norms} == {models.EPS}
        assert all(isinstance(module, normkit.LayerNorm | normkit.RMSNorm | normkit.BatchNorm1d) for module in norms)
        assert len(norms) == (5 if place == "pre" else 4), "one a sublayer, and a final one after PreNorm's stack"


def test_the_names_of_norms_and_inits_are_those_of_the_flags():
    assert tuple(models.NORMS) == grid.NORMS
    assert tuple(models.INITS) == grid.INITS


def test_xavier_takes_q_k_and_v_as_three_square_matrices():
    torch.manual_seed(0)
    bound = math.sqrt(6 / (64 + 64))
    model = Transformer(depth=1, width=64, heads=4, seq=8, norm="none", placement=None)
    for matrix in model.stack.sublayers[0].sublayer.qkv.weight.chunk(3):
        assert 0.99 * bound < matrix.abs().max().item() <= bound


def test_xavier_starts_the_stream_at_variance_one_and_gpt2_its_weights_at_two_hundredths():
    torch.manual_seed(0)
    model = Transformer(depth=1, width=64, heads=4, seq=64, norm="none", placement=None)
    assert model.embed(torch.randint(256, (64, 64))).var().item() == pytest.approx(1.0, rel=0.1)
    model = Transformer(depth=1, width=64, heads=4, seq=64, norm="none", placement=None, init="gpt2")
    assert all(p.std().item() == pytest.approx(0.02, rel=0.1) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": "weight"}, "Transformer: norm must be one of none, batch, layer, rms, group, dyt, got 'weight'"),
        ({"init": "he"}, "Transformer: init must be one of xavier, torch, gpt2, got 'he'"),
        ({"heads": 3}, "Transformer: width must be a multiple of heads=3, got 16"),
        ({"placement": None}, "Transformer: norm 'layer' needs a placement, got None"),
        ({"norm": "none"}, "Transformer: norm 'none' has no placement, got 'pre'"),
    ],
)
def test_a_transformer_that_cannot_be_built_is_refused_in_one_sentence(wrong, message):
    right = {"depth": 1, "width": 16, "heads": 2, "seq": 8, "norm": "layer", "placement": PreNorm}
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        Transformer(**(right | wrong))
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------- measure


class Fixed(nn.Module):
    """A sublayer whose output is given."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out


def uncorrelated(norm: str, v: float, shape: tuple[int, int, int] = (4, 8, 16)) -> tuple[Tensor, Tensor]:
    """skip and branch without correlation and with Var(branch) = v Var(skip), exactly, on the axes of the norm."""
    features = shape[-1] if norm != "batch" else shape[0] * shape[1]
    rows = shape[0] * shape[1] if norm != "batch" else shape[-1]
    x, f = torch.randn(2, rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if norm != "rms":
        x, f = x - x.mean(-1, keepdim=True), f - f.mean(-1, keepdim=True)
    f = f - x * (f * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    f = f * (v * x.square().sum(-1, keepdim=True) / f.square().sum(-1, keepdim=True)).sqrt()
    if norm == "batch":
        x, f = x.T, f.T
    return x.reshape(shape), f.reshape(shape)


def residual(norm: str, branch: Tensor, placement: Placement = PostNorm, width: int = 16) -> Residual:
    return Residual(Fixed(branch), placement, lambda: models.NORMS[norm](width).double())


@pytest.mark.parametrize("v", [0.01, 1.0, 9.0])
@pytest.mark.parametrize("norm", WITH_A_NORM)
def test_the_skip_weight_of_uncorrelated_branches_is_the_theorys(norm, v):
    x, branch = uncorrelated(norm, v)
    weight, with_gain = measure.skip_weights(residual(norm, branch), x, branch, normalized=False)
    expected = torch.full((16,) if norm == "batch" else (4, 8), post_skip_weight(v), dtype=torch.float64)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)  # eps is all that is between them
    torch.testing.assert_close(with_gain, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", WITH_A_NORM)
def test_a_skip_scale_counts_as_part_of_the_skip(norm):
    x, branch = uncorrelated(norm, 4.0)
    doubled = replace(PostNorm, skip_scale=2.0)
    weight, _ = measure.skip_weights(residual(norm, branch, doubled), x, branch, normalized=False)
    torch.testing.assert_close(weight, torch.full_like(weight, post_skip_weight(1.0)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("placement", [PreNorm, replace(PreNorm, skip_scale=0.5), Placement("sandwich", True, True)])
def test_the_skip_weight_is_the_skip_scale_where_no_norm_follows_the_add(placement):
    x, branch = uncorrelated("layer", 1.0)
    weights = measure.skip_weights(residual("layer", branch, placement), x, branch, normalized=False)
    assert [weight.item() for weight in weights] == [placement.skip_scale] * 2


@pytest.mark.parametrize("norm", WITH_A_NORM)
def test_gains_that_the_next_norm_cancels_do_not_pile_up(norm):
    model = transformer(norm, "post", depth=3)
    for module in model.modules():
        if isinstance(module, models.Attention):
            nn.init.zeros_(module.out.weight)
        if isinstance(module, models.FeedForward):
            nn.init.zeros_(module.down.weight)
        if hasattr(module, "eps"):
            nn.init.constant_(module.weight, 3.0)
    found = measure.stream(model, some_batch()[0])
    assert found.skip_weight == pytest.approx([1.0] * 6, rel=1e-4), "the branches are zero"
    assert found.identity_weight == pytest.approx([1.0] * 6, rel=1e-4)
    assert found.skip_weight_with_gain == pytest.approx([3.0, *[1.0] * 5], rel=1e-4)
    assert found.identity_weight_with_gain == pytest.approx([3.0] * 6, rel=1e-4), "not 3, 9, 27, ..."
    assert found.residual_rms == pytest.approx([3.0] * 6, rel=1e-4)


def test_the_gain_of_batch_norm_is_kept_by_feature():
    x, branch = uncorrelated("batch", 1.0)
    sublayer = residual("batch", branch)
    gamma = torch.linspace(-2, 2, 16, dtype=torch.float64)
    sublayer.norm_output.weight.data.copy_(gamma)
    _, with_gain = measure.skip_weights(sublayer, x, branch, normalized=False)
    torch.testing.assert_close(with_gain, gamma.abs() * post_skip_weight(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", WITH_A_NORM)
def test_the_identity_weight_is_multiplied_token_by_token_and_then_averaged(norm):
    model = transformer(norm, "post", depth=2)
    with torch.no_grad():
        product, by_hand = 1.0, []
        for sublayer, x, branch, _ in measure.walk(model.stack, model.embed(some_batch()[0])):
            product = product * measure.skip_weights(sublayer, x, branch, normalized=False)[0]
            by_hand.append(product.mean().item())
    found = measure.stream(model, some_batch()[0])
    assert found.identity_weight == pytest.approx(by_hand, rel=1e-12)
    assert found.identity_weight[-1] != pytest.approx(math.prod(found.skip_weight), rel=1e-6)


@pytest.mark.parametrize("norm", WITH_A_NORM)
def test_the_uncorrelated_identity_weight_knows_the_measured_variances_and_no_correlation(norm):
    x, branch = uncorrelated(norm, 3.0)
    alone = measure.uncorrelated_skip_weight(residual(norm, branch), x, branch)
    torch.testing.assert_close(alone, torch.full_like(alone, post_skip_weight(3.0)), rtol=1e-4, atol=0)
    against = -0.5 * x  # v = 1/4, and it cancels half of the skip
    weight, _ = measure.skip_weights(residual(norm, against), x, against, normalized=False)
    alone = measure.uncorrelated_skip_weight(residual(norm, against), x, against)
    torch.testing.assert_close(weight, torch.full_like(weight, 2.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(alone, torch.full_like(alone, post_skip_weight(0.25)), rtol=1e-4, atol=0)
    found = measure.stream(transformer(norm, "post", depth=2), some_batch()[0])
    assert len(found.uncorrelated_identity_weight) == 4
    assert 0.0 < found.uncorrelated_identity_weight[-1] < 1.0
    assert measure.stream(transformer(norm, "pre", depth=2), some_batch()[0]).uncorrelated_identity_weight == [1.0] * 4


@pytest.mark.parametrize(("norm", "place"), ONE_OF_EACH)
def test_the_walk_down_the_stack_ends_where_the_model_does(norm, place):
    model = transformer(norm, place).train()
    ids, _ = some_batch()
    *_, (_, _, _, out) = measure.walk(model.stack, model.embed(ids))
    out = out if model.stack.final_norm is None else model.stack.final_norm(out)
    torch.testing.assert_close(model.head(out), model(ids))


def test_a_feed_forward_of_relu_and_xavier_weighs_the_skip_with_point_87():
    torch.manual_seed(0)
    model = Transformer(depth=1, width=256, heads=4, seq=8, norm="layer", placement=PostNorm)
    x = torch.randn(8, 8, 256)
    feed_forward = model.stack.sublayers[1]
    weight, _ = measure.skip_weights(feed_forward, x, feed_forward.branch(x).detach(), normalized=False)
    assert weight.mean().item() == pytest.approx(1 / math.sqrt(1.32), abs=0.01)


@pytest.mark.parametrize(("norm", "place"), ONE_OF_EACH)
def test_gradient_norms_are_those_of_backward(norm, place):
    model, batch = transformer(norm, place).train(), some_batch()
    found = measure.gradient_norms(model, batch)
    model.loss(*batch).backward()
    blocks = model.block_parameters()
    expected = [torch.cat([parameter.grad.flatten() for parameter in block]).norm().item() for block in blocks]
    assert found == pytest.approx(expected, rel=1e-5)
    head = {id(p) for p in [*model.token.parameters(), *model.position.parameters(), *model.head.parameters()]}
    final = set() if model.stack.final_norm is None else {id(p) for p in model.stack.final_norm.parameters()}
    assert {id(p) for block in blocks for p in block} == {id(p) for p in model.parameters()} - head - final


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_found(training):
    model, batch = transformer("batch", "post").train(training), some_batch()
    model.stack.sublayers[1].eval()  # a mode of its own must survive, too
    model.loss(*batch).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    measure.gradient_norms(model, batch)
    measure.stream(model, batch[0])
    train.validation_loss(model, [batch], batch_statistics=True)
    train.validation_loss(model, [batch])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_measurement_that_raises_leaves_the_model_as_found_too():
    model = transformer("batch", "post").eval()
    before = model.stack.sublayers[0].norm_output.running_mean.clone()

    class Broken(Exception):
        pass

    def measure_and_break() -> None:
        with measure.untouched(model):
            model.train()
            model(some_batch()[0])
            torch.rand(1)
            raise Broken

    random_state = torch.get_rng_state()
    with pytest.raises(Broken):
        measure_and_break()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.stack.sublayers[0].norm_output.running_mean, before)
    assert torch.equal(torch.get_rng_state(), random_state)


# ------------------------------------------------------------------------------------------------ train


def numbers(record: records.Record) -> str:
    """What of a record must repeat: all but the times. As JSON, in which NaN equals itself."""
    return json.dumps({k: v for k, v in records.finite(record).items() if k not in ("seconds", "seconds_per_step")})


@pytest.mark.parametrize(("norm", "place"), [("layer", "post"), ("batch", "pre")])
def test_the_same_cell_gives_the_same_numbers(norm, place):
    cell = replace(CELL, norm=norm, placement=place)
    first = train.run_cell(cell, CORPUS)
    torch.rand(5)  # whatever torch's random state is
    assert numbers(train.run_cell(cell, CORPUS)) == numbers(first)
    assert numbers(train.run_cell(replace(cell, seed=1), CORPUS)) != numbers(first)


def test_the_seed_chooses_the_batches_and_the_weights():
    first, second = (train.training(train.build(CELL), replace(CELL, seed=seed), CORPUS) for seed in (0, 1))
    assert next(first)[1] != next(second)[1], "the same weights on other batches"
    assert not torch.equal(train.build(CELL).head.weight, train.build(replace(CELL, seed=1)).head.weight)


def test_running_a_cell_leaves_torchs_random_state_alone():
    before = torch.get_rng_state()
    train.run_cell(CELL, CORPUS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_record_has_every_field_of_the_schema():
    record = train.run_cell(
        replace(CELL, norm="batch", placement="pre", lr=1e-2, steps=60), CORPUS, seconds_per_step=0.5
    )
    documented = (
        "key task norm placement depth seed lr steps warmup width heads batch seq init status reason val_loss "
        "val_loss_batch_statistics guess_loss train_loss seconds seconds_per_step parameters grad_norm_by_layer "
        "residual_rms_by_sublayer skip_weight_by_sublayer skip_weight_with_gain_by_sublayer "
        "identity_weight_by_sublayer identity_weight_with_gain_by_sublayer uncorrelated_identity_weight_by_sublayer "
        "versions"
    )
    assert set(documented.split()) <= set(record)
    assert (record["status"], record["reason"], record["seconds_per_step"]) == ("ok", None, 0.5)
    assert record["val_loss"] < record["guess_loss"], "the text is easy"
    assert record["val_loss_batch_statistics"] != record["val_loss"]
    assert [step for step, _ in record["train_loss"]] == list(range(1, 61))
    for name in records.MEASURED:
        length = 2 if name == "grad_norm_by_layer" else 4
        assert [len(record[name][moment]) for moment in ("init", "end")] == [length, length]
    assert set(record["versions"]) == {"normkit", "torch", "numpy", "python"}


@pytest.mark.filterwarnings("error")
def test_a_loss_that_is_no_number_is_a_result_with_a_sentence():
    record = records.finite(train.run_cell(replace(CELL, norm="none", placement=None, lr=1e30, steps=9), CORPUS))
    assert record["status"] == "diverged"
    assert record["reason"].startswith("The training loss became ")
    assert record["reason"].endswith(" of 9.")
    assert record["train_loss"][-1][1] is None
    assert record["val_loss"] is None
    assert record["grad_norm_by_layer"]["init"] is not None
    assert record["grad_norm_by_layer"]["end"] is None
    json.dumps(record, allow_nan=False)


def test_a_loss_above_guessing_is_a_result_with_a_sentence():
    record = train.run_cell(replace(CELL, lr=3.0, steps=5), CORPUS)
    assert record["status"] == "diverged"
    assert record["val_loss"] > record["guess_loss"]
    assert record["reason"] == (
        f"The loss on held-out text, {record['val_loss']:.3f}, is above guessing by byte frequency, "
        f"{record['guess_loss']:.3f}."
    )
    assert record["grad_norm_by_layer"]["end"] is not None


def test_the_learning_rate_rises_to_its_value_and_stays():
    assert [train.learning_rate(step, 0.5, 4) for step in (1, 2, 4, 5, 100)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    assert train.learning_rate(1, 0.5, 0) == 0.5


def test_long_runs_keep_at_most_500_losses_with_the_first_and_the_last():
    for steps in (1, 2, 500, 501, 1234):
        kept = [step for step in range(1, steps + 1) if train._kept(step, steps)]
        assert {kept[0], kept[-1]} == {1, steps}
        assert len(kept) <= 502


def test_the_timing_pass_times_every_cell_in_turns():
    rounds: list[tuple[int, int]] = []
    cells = [CELL, replace(CELL, norm="none", placement=None, steps=5)]
    seconds = train.time_steps(cells, CORPUS, lambda done, total: rounds.append((done, total)))
    assert len(seconds) == 2
    assert all(0 < one < 10 for one in seconds)
    assert rounds == [(1, 3), (2, 3), (3, 3)], "no more rounds than the shortest cell has steps"


# ------------------------------------------------------------------------------------------------- grid


def test_norm_none_runs_once_per_depth_and_seed_and_everything_else_in_both_placements():
    cells = grid.expand(SETTINGS, "data")
    assert len(cells) == len(set(cells)) == 2 * 2 * (1 + 2)
    assert {cell.placement for cell in cells if cell.norm == "none"} == {None}
    assert {cell.placement for cell in cells if cell.norm == "layer"} == {"pre", "post"}
    assert grid.expand(replace(SETTINGS, norms=("none", "layer", "none"), seeds=(0, 1, 0)), "data") == cells


def test_a_key_changes_with_every_setting_the_text_and_the_version(monkeypatch):
    changes = {
        "norm": "rms", "placement": "pre", "depth": 3, "seed": 1, "lr": 1e-3, "steps": 4, "warmup": 2, "width": 32,
        "heads": 4, "batch": 8, "seq": 16, "init": "gpt2", "data": "other", "task": "other",
    }  # fmt: skip
    keys = {replace(CELL, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {CELL.key}) == len(changes) + 1
    assert set(changes) == set(CELL.__dataclass_fields__), "a new setting belongs into this test"
    assert replace(CELL).key == CELL.key
    before = CELL.key
    monkeypatch.setattr(grid, "__version__", "another")
    assert CELL.key != before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norms": ("layer", "weight")}, "norms: expected one of none, batch, layer, rms, group, dyt, got 'weight'"),
        ({"norms": ()}, "norms: expected one or more of none, batch, layer, rms, group, dyt, got none"),
        (
            {"placements": ("mid",)},
            "placements: expected one of pre, post, sandwich, reordered, deepnorm, keel, mix, layernorm-scaling, "
            "layerscale, rezero, got 'mid'",
        ),
        ({"init": "he"}, "init: expected one of xavier, torch, gpt2, got 'he'"),
        ({"depths": (2, 0)}, "depths: expected a whole number of at least 1, got 0"),
        ({"seeds": (-1,)}, "seeds: expected a whole number of at least 0, got -1"),
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"warmup": -1}, "warmup: expected a whole number of at least 0, got -1"),
        ({"lr": math.nan}, "lr: expected a positive number, got nan"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"heads": 3}, "heads: expected a divisor of width 16, got 3"),
        (
            {"norms": ("batch",), "batch": 1, "seq": 1},
            "batch: expected 2 or more bytes (batch x seq) for norm batch's variance, got 1",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence_that_names_them(wrong, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        replace(SETTINGS, **wrong)
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------- records


def record_of(key: str, status: str = "ok", **more: object) -> records.Record:
    return {"key": key, "status": status, **more}


def lines_of(path: Path) -> list[records.Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_on_disk_when_add_returns_and_come_back(tmp_path):
    with records.RecordStore(tmp_path / "new" / "folder") as store:
        for number in range(3):
            store.add(record_of(f"k{number}", loss=[math.nan, math.inf, 1.5]))
            assert len(lines_of(store.path)) == number + 1
        assert [path.name for path in store.folder.iterdir()] == ["records.jsonl"], "no temporary file stays"
    with records.RecordStore(tmp_path / "new" / "folder") as again:
        assert again.get(["k2", "missing", "k0"]) == [
            record_of("k2", loss=[None, None, 1.5]),
            record_of("k0", loss=[None, None, 1.5]),
        ]


def test_a_write_that_fails_leaves_the_records_before_it(tmp_path, monkeypatch):
    with records.RecordStore(tmp_path) as store:
        store.add(record_of("a"))

        def no_space(*paths: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(records.os, "replace", no_space)
            with pytest.raises(OSError, match="No space left"):
                store.add(record_of("b"))
        assert lines_of(store.path) == [record_of("a")]
        assert store.done("b") is None
        assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_an_interrupt_between_the_file_and_the_memory_leaves_both_alike(tmp_path, monkeypatch):
    replace_for_real = os.replace

    def interrupted(*paths: str) -> None:
        replace_for_real(*paths)
        raise KeyboardInterrupt

    with records.RecordStore(tmp_path) as store:
        store.add(record_of("a"))
        monkeypatch.setattr(records.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.add(record_of("b"))
        assert lines_of(store.path) == store.get(["a", "b"]) == [record_of("a"), record_of("b")]


def test_torn_and_foreign_lines_are_kept_aside_with_a_warning(tmp_path):
    torn = '{"key": "b", "status": "o'
    (tmp_path / "records.jsonl").write_text(
        json.dumps(record_of("a")) + "\n" + '{"foreign": 1}\n\n[1, 2]\n' + json.dumps(record_of("c")) + "\n" + torn
    )
    message = (
        f"3 of the lines in {tmp_path / 'records.jsonl'} are no records of a study; they are kept in unreadable.jsonl"
    )
    for _ in range(2):  # until a record is added the lines are still there; aside they stand once
        with pytest.warns(UserWarning, match=re.escape(message) + "$"):
            store = records.RecordStore(tmp_path)
        with store:
            assert [record["key"] for record in store.get(["a", "b", "c"])] == ["a", "c"]
        assert (tmp_path / "unreadable.jsonl").read_text().splitlines() == ['{"foreign": 1}', "[1, 2]", torn]
    with pytest.warns(UserWarning, match=re.escape(message)):
        store = records.RecordStore(tmp_path)
    with store:
        store.add(record_of("b"))
    assert [record["key"] for record in lines_of(tmp_path / "records.jsonl")] == ["a", "c", "b"]
    with records.RecordStore(tmp_path):
        pass  # and no warning any more: warnings are errors here


def test_a_failed_cell_is_not_done_and_its_next_record_replaces_it(tmp_path):
    with records.RecordStore(tmp_path) as store:
        store.add(record_of("a", "failed"))
        store.add(record_of("b", "diverged"))
        assert store.done("a") is None
        assert store.done("b") is not None, "a divergence is a result"
        store.add(record_of("a", "ok"))
        assert [(one["key"], one["status"]) for one in lines_of(store.path)] == [("a", "ok"), ("b", "diverged")]


def test_fresh_moves_the_old_study_aside_and_deletes_nothing(tmp_path):
    for number in range(3):
        with records.RecordStore(tmp_path, fresh=True) as store:
            assert len(store) == 0
            store.add(record_of(f"study {number}"))
            records.write_study(tmp_path, {"study": number})
    assert lines_of(tmp_path / "records.jsonl") == [record_of("study 2")]
    for number in (0, 1):
        aside = tmp_path / f"earlier-{number + 1}"
        assert lines_of(aside / "records.jsonl") == [record_of(f"study {number}")]
        assert records.read_study(aside) == {"study": number}


def test_two_studies_cannot_write_to_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    with records.RecordStore(tmp_path):
        with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
            records.RecordStore(tmp_path, fresh=True)
        assert str(error.value) == (
            f"out: expected a folder that no study uses, another one is running in {tmp_path}; wait or name another"
        )
    records.RecordStore(tmp_path).__exit__(None, None, None)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        records.RecordStore(tmp_path / "file")
    assert str(error.value) == (f"out: expected a folder to write to, {tmp_path / 'file'} cannot be one: File exists")


# -------------------------------------------------------------------------------------------------- run


class Killer(run.Watcher):
    """Kills the worker of the first cell that starts, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def planned(self, cells: list[grid.Cell], seconds_per_step: dict[grid.Cell, float | None]) -> None:
        self.told.append(f"planned {[cell.depth for cell in cells]}")
        assert all(seconds is not None and seconds > 0 for seconds in seconds_per_step.values())

    def started(self, cell: grid.Cell) -> None:
        if not any(one.startswith("started") for one in self.told):
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        self.told.append(f"started {cell.depth}")

    def finished(self, cell: grid.Cell, record: records.Record) -> None:
        self.told.append(f"{record['status']} {cell.depth}")


def test_a_worker_that_is_killed_fails_its_cell_and_the_study_goes_on(tmp_path):
    cells = [replace(CELL, depth=depth) for depth in (1, 3, 2)]
    with records.RecordStore(tmp_path) as store:
        store.add(train.run_cell(cells[2], CORPUS))
        killer = Killer()
        with processes.Processes() as here:
            run.run_cells(here, cells, CORPUS, store, jobs=1, threads=1, watcher=killer)
        assert killer.told == ["planned [3, 1]", "started 3", "failed 3", "started 1", killer.told[-1]]
        (failed,) = store.get([cells[1].key])
        assert failed["reason"] == ("The worker process was killed by SIGKILL; too little memory is the usual cause.")
        assert failed["guess_loss"] == store.get([cells[0].key])[0]["guess_loss"]
        assert store.get([cells[0].key])[0]["seconds_per_step"] > 0
    assert not multiprocessing.active_children()


def test_a_cell_that_raises_fails_with_its_sentence_and_runs_again_next_time(tmp_path):
    broken = replace(CELL, width=15)  # two heads cannot share it
    with records.RecordStore(tmp_path) as store:
        with processes.Processes() as here:
            run.run_cells(here, [broken, CELL], CORPUS, store, jobs=2, threads=1, watcher=run.Watcher())
        (failed, good) = store.get([broken.key, CELL.key])
        assert failed["status"] == "failed"
        assert failed["reason"] == "ValueError: Transformer: width must be a multiple of heads=2, got 15"
        assert good["status"] in ("ok", "diverged")
        assert numbers(good) == numbers(train.run_cell(CELL, CORPUS)), "a process of its own changes nothing"
        assert (store.done(broken.key), store.done(CELL.key)) == (None, good)
    assert not multiprocessing.active_children()


def test_a_study_with_nothing_left_to_do_starts_no_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_Worker", None)
    with records.RecordStore(tmp_path) as store, processes.Processes() as here:
        store.add(train.run_cell(CELL, CORPUS))
        run.run_cells(here, [CELL], CORPUS, store, jobs=1, threads=1, watcher=run.Watcher())


# -------------------------------------------------------------------------------------------------- processes


def tells_and_adds(first, second, tell):
    tell("adding")
    return first + second


def ends(code):
    os._exit(code)


def waits(seconds):
    time.sleep(seconds)
    return os.getpid()


def test_calls_run_in_processes_of_their_own_and_tell_while_they_run():
    told: list[tuple[int, str]] = []
    with processes.Processes() as here:
        big = here.put(40)
        calls = [(big, number) for number in range(3)]
        found = dict(
            here.results(tells_and_adds, calls, jobs=2, threads=1, told=lambda index, what: told.append((index, what)))
        )
        assert found == {0: 40, 1: 41, 2: 42}
        assert sorted(told) == [(0, "adding"), (1, "adding"), (2, "adding")]
        assert len(multiprocessing.active_children()) == 2, "they wait for the next calls"
        pids = {pid for _, pid in here.results(waits, [(0.1,)] * 4, jobs=2, threads=1)}
        assert pids == {child.pid for child in multiprocessing.active_children()}
    assert not multiprocessing.active_children()


def test_a_process_that_dies_and_a_call_that_raises_fail_alone():
    with processes.Processes() as here:
        ((_, died),) = here.results(ends, [(3,)], jobs=1, threads=1)
        assert died == processes.Failed("The worker process ended by itself with exit code 3.")
        found = dict(here.results(waits, [(0.0,), ("long",), (0.0,)], jobs=2, threads=1))
        assert isinstance(found[1], processes.Failed)
        assert found[1].reason.startswith("TypeError: ")
        assert not isinstance(found[0], processes.Failed)
        assert not isinstance(found[2], processes.Failed)


def test_leaving_the_loop_ends_the_calls_that_run():
    with processes.Processes() as here:
        results = here.results(waits, [(0.0,), (600.0,)], jobs=2, threads=1)
        assert next(results)[0] == 0
        results.close()
        assert len(multiprocessing.active_children()) == 1, "the idle one waits on"
    assert not multiprocessing.active_children()


def test_no_more_calls_run_at_a_time_than_asked_for():
    order: list[str] = []
    with processes.Processes() as here:
        list(here.results(waits, [(0.0,)] * 2, jobs=2, threads=1))
        calls, started = [(0.0,)] * 4, lambda at: order.append(f"start {at}")
        for index, _ in here.results(waits, calls, jobs=1, threads=1, started=started):
            order.append(f"end {index}")
    assert order == [word for number in range(4) for word in (f"start {number}", f"end {number}")]


def test_the_time_left_weighs_steps_by_their_cost_and_follows_the_rate_that_is_seen():
    shallow, deep = replace(CELL, depth=1, steps=100), replace(CELL, depth=8, steps=100)
    now = 0.0
    left = clock.TimeLeft([deep, shallow], {shallow: 0.1, deep: 0.8}, jobs=2, now=lambda: now)
    assert str(left) == "45 s", "90 s of work, two at a time"
    now = 40.0
    left.at(deep, 25)
    left.at(shallow, 100)
    assert str(left) == "80 s", "30 of 90 s of work took 40 s"
    long = replace(CELL, depth=12, steps=5000)
    assert str(clock.TimeLeft([long], {long: None}, jobs=1)) == "10 min", "a guess where nothing could be measured"
    assert str(clock.TimeLeft([long], {long: 10.0}, jobs=1)) == "13.9 h"
