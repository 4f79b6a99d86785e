"""The method by its settings (Tables 4, 5, 6, 10 to 14), and what it is fed: pictures, schedule, tokens."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from test_pipeline import call, make_pictures

import ar
import semtok
import train

STEPS = ("--steps", 2, "--batch-size", 8, "--workers", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of pictures, a run's folder with the stand-ins and stage 1 of two steps, and the pictures as read."""
    folder = make_pictures(tmp_path_factory.mktemp("method") / "data", 10)
    out = folder.with_name("run")
    result = call("train.py", "--stage", "1", "--data", folder, "--out", out, *STEPS)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, out, train.Pictures(str(folder), "train", 0, 32)


def make_job(world, stage, *settings, out=None):
    """What a stage gets, by the command line's own way."""
    arguments = ["--stage", stage, "--data", world[0], "--out", out or world[1], *STEPS]
    args = train.parse_arguments([*map(str, arguments), *(["--set", *settings] if settings else [])])
    return train.Job(args, torch.device("cpu"), world[2], world[2])


def make_stage(world, stage, *settings):
    torch.manual_seed(0)
    return train.STAGES[stage](make_job(world, stage, *settings))


def one_step(stage, pictures):
    """Losses of one forward pass, the same for the same weights, and their gradients by parameter."""
    labels = torch.tensor(pictures.labels[:8])
    out = stage(*stage.prepare(pictures.memory[:8], labels, torch.Generator().manual_seed(1), 0))
    out["loss"].backward()
    return out, {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def copy_run(world, target, *names):
    """A new run's folder with some of the old one's results."""
    target.mkdir()
    for name in names:
        os.symlink(world[1] / name, target / name)
    return target


# ------------------------------------------------------------------------------------ Tables 4, 6, 10, 11, 12


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("term, heads", [("distill", ["w_x.weight"]), ("contrast", ["w_z.weight", "log_t"])])
def test_terms_of_the_alignment_can_be_left_out(world, stage, term, heads):
    whole, gradients = one_step(make_stage(world, stage), world[2])
    without, left = one_step(make_stage(world, stage, f"{term}=0"), world[2])
    assert whole.keys() == without.keys()
    assert {name for name in whole if not torch.equal(whole[name], without[name])} == {"loss"}
    missing = train.RECIPES["tiny"][stage].lambda_s * whole[f"{term}_loss"].item()
    assert (whole["loss"] - without["loss"]).item() == pytest.approx(missing, abs=1e-5)
    for name in heads:  # what learns from the term alone
        assert gradients[f"semtok.{name}"].any() and not left[f"semtok.{name}"].any()


def test_quantizer(world):
    bsq, lfq = (make_stage(world, "1", f"quantizer={kind}") for kind in ("bsq", "lfq"))
    assert replace(lfq.semtok.config, quantizer="bsq") == bsq.semtok.config == make_stage(world, "1").semtok.config
    for (name, a), b in zip(bsq.state_dict().items(), lfq.state_dict().values()):
        assert torch.equal(a, b * 24**0.5 if "token_embedder.weight" in name else b), name
    z = torch.randn(2, 16, 24)
    (on_sphere, _), (corner, u) = bsq.semtok.quantizer(z), lfq.semtok.quantizer(z)
    assert torch.equal(corner, z.sign()) and torch.equal(u, z)
    assert torch.allclose(on_sphere, z.sign() / 24**0.5)
    sizes = [stage.job.ar_config(stage.semtok.config) for stage in (lfq, bsq)]
    assert sizes[0] == replace(sizes[1], spherical=False)


@pytest.mark.parametrize("choice, terms", [
    ("lpips", {"lpips"}), ("resnet", {"resnet"}), ("both", {"lpips", "resnet"}),
])
def test_perceptual_terms_and_their_files(world, choice, terms, tmp_path, monkeypatch):
    stage = make_stage(world, "2", f"perceptual={choice}")
    assert stage.frozen.keys() == terms | {"siglip"}
    (out, _), (whole, _) = one_step(stage, world[2]), one_step(make_stage(world, "2"), world[2])
    dropped = {f"{name}_loss" for name in {"lpips", "resnet"} - terms}
    assert whole.keys() - out.keys() == dropped and out.keys() <= whole.keys()
    assert all(torch.equal(out[name], whole[name]) for name in out if name != "loss")
    missing = sum(train.RECIPES["tiny"]["2"].lambda_p * whole[name].item() for name in dropped)
    assert (whole["loss"] - out["loss"]).item() == pytest.approx(missing, abs=1e-5)
    monkeypatch.chdir(tmp_path)  # where there is no folder weights
    args = train.parse_arguments(["--stage", "2", "--preset", "paper", "--set", f"perceptual={choice}"])
    asked = " ".join(train.Job(args, torch.device("cpu")).missing("2"))
    needed = terms | {"siglip"} | ({"vgg"} if "lpips" in terms else set())
    assert {name for name, (file, _, _) in train.WEIGHTS.items() if os.path.join("weights", file) in asked} == needed


def test_stage_2_from_scratch(world, tmp_path):
    out = copy_run(world, tmp_path / "run", "standins")
    settings = ("--set", "init=scratch", "bits=12")
    result = call("train.py", "--stage", "2", "--data", world[0], "--out", out, *STEPS, *settings)
    assert result.returncode == 0 and not (out / "stage1.safetensors").exists(), result.stderr[-2000:]
    assert semtok.load_semtok(str(out / "stage2.safetensors"))[0].config.bits == 12
    # it begins where stage 1 would, but for the mask tokens, which stage 1 does not use
    scratch, first = make_stage(world, "2", "init=scratch").semtok, make_stage(world, "1").semtok
    differ = {n for n, p in first.state_dict().items() if not torch.equal(p, scratch.state_dict()[n])}
    assert differ == {"decoder.mask_tokens"}


def test_freeze_encoder(world, tmp_path):
    first = semtok.load_semtok(str(world[1] / "stage1.safetensors"))[0].state_dict()
    moved = []
    for frozen in (0, 1):
        out = copy_run(world, tmp_path / f"run{frozen}", "standins", "stage1.safetensors")
        settings = ("--set", f"freeze_encoder={frozen}")
        result = call("train.py", "--stage", "2", "--data", world[0], "--out", out, *STEPS, *settings)
        assert result.returncode == 0, result.stderr[-2000:]
        last = semtok.load_semtok(str(out / "stage2.safetensors"))[0].state_dict()
        moved.append({name.split(".")[0] for name in first if not torch.equal(first[name], last[name])})
    assert "decoder" in moved[1] and moved[0] - moved[1] == {"encoder"} and not moved[1] - moved[0]


def test_the_temperature_is_clamped_in_place_and_keeps_its_gradient(world):
    stage = make_stage(world, "1")
    with torch.no_grad():
        stage.semtok.log_t.fill_(10.0)
    _, gradients = one_step(stage, world[2])
    assert stage.semtok.log_t.item() == pytest.approx(math.log(100)) and gradients["semtok.log_t"].any()


def test_weights_of_layers_decay_alone(world):
    stage = make_stage(world, "2")
    names = {id(p): name for name, p in stage.named_parameters() if p.requires_grad}
    for recipe in (stage.recipe, replace(stage.recipe, weight_decay=0.0)):
        groups = train.make_optimizer(stage, recipe).param_groups
        found = {names[id(p)]: (g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert found.keys() == set(names.values())
        assert found["semtok.w_x.weight"] == (recipe.lr, recipe.weight_decay)
        for name in ("w_x.bias", "log_t", "encoder.mask_tokens", "encoder.norm_out.weight"):
            assert found[f"semtok.{name}"] == (recipe.lr, 0)
        assert found["discriminator.mix.weight"] == (recipe.discriminator_lr, recipe.weight_decay)
        assert found["discriminator.norms.0.weight"] == (recipe.discriminator_lr, 0)


# ------------------------------------------------------------------------------------------- Tables 5, 13, 14


def test_group_bits_size_the_head_alone():
    bitwise, joint = ar.AR_PRESETS["L"], replace(ar.AR_PRESETS["L"], group_bits=9)
    with torch.device("meta"):
        shapes = [{n: p.shape for n, p in ar.MaskedAR(c).named_parameters()} for c in (bitwise, joint)]
    assert {n for n in shapes[0] if shapes[0][n] != shapes[1][n]} == {"head.weight", "head.bias"}
    assert shapes[0]["head.weight"] == (36, 1024) and shapes[1]["head.weight"] == (2 * 2**9, 1024)


@pytest.mark.parametrize("group_bits", [1, 3, 12])
def test_untrained_heads_of_any_grouping_lose_one_bit_a_bit(group_bits):
    model = ar.MaskedAR(replace(ar.AR_PRESETS["tiny"], group_bits=group_bits))
    labels, masked = torch.zeros(4, dtype=torch.long), torch.ones(4, 16, dtype=torch.bool)
    out = model.loss(torch.rand(4, 16, 24) > 0.5, labels, masked, torch.tensor(16.0))
    assert out["nll"].item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("bits, allowed", [(18, {1, 2, 3, 6, 9}), (24, {1, 2, 3, 4, 6, 8, 12}), (7, {1, 7})])
def test_group_bits_divide_the_bits_into_softmaxes_that_fit(bits, allowed):
    for group_bits in set(range(bits + 2)) - allowed:
        with pytest.raises(ValueError, match=f"group_bits {group_bits}"):
            replace(ar.AR_PRESETS["tiny"], bits=bits, group_bits=group_bits)
    assert all(replace(ar.AR_PRESETS["tiny"], bits=bits, group_bits=g).group_bits == g for g in allowed)


def test_micro_batches_average_to_the_whole():
    torch.manual_seed(0)
    model, bits = ar.MaskedAR(ar.AR_PRESETS["tiny"]), torch.rand(8, 16, 24) > 0.5
    torch.nn.init.normal_(model.head.weight, std=0.3)
    rng = torch.Generator().manual_seed(0)
    rows, shared = model.prepare(bits, torch.arange(8), rng, least_masked=0.0)
    whole = model.loss(**rows, **shared)
    parts = [model.loss(**{n: t.chunk(4)[i] for n, t in rows.items()}, **shared) for i in range(4)]
    for name, value in whole.items():
        assert sum(part[name].item() for part in parts) / 4 == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("causal", [0, 1])
def test_causal_makes_the_token_stream_sequential_and_nothing_else(world, causal):
    model, plain = (make_stage(world, "1", f"causal={value}").semtok for value in (causal, 0))
    assert replace(model.config, causal=False) == plain.config
    assert model.state_dict().keys() == plain.state_dict().keys()
    encoder, latents, on_tokens, on_patches = model.encoder, torch.randn(1, 8, 8, 8), [], []
    with torch.no_grad():
        x, z = encoder(latents)
        for token in encoder.mask_tokens:
            kept = token.clone()
            token += torch.randn_like(kept)  # a constant would be lost in the first norm
            moved = encoder(latents)
            token.copy_(kept)
            on_patches.append((moved[0] - x).abs().amax() > 1e-6)
            on_tokens.append((moved[1] - z)[0].abs().amax(1) > 1e-6)
        latents[:, :, :1] += 1
        assert ((encoder(latents)[1] - z).abs().amax(2) > 1e-6).all()  # every token sees the picture
    on_tokens, square = torch.stack(on_tokens), torch.ones(16, 16, dtype=torch.bool)
    assert torch.equal(on_tokens, square.triu() if causal else square)  # token j moves what is not before it
    assert torch.stack(on_patches).any().item() is not bool(causal)  # nor do the patches pass it on


def next_token_model():
    torch.manual_seed(3)
    sizes = {"depth": 2, "width": 64, "heads": 1, "tokens": 7, "bits": 6, "classes": 3, "group_bits": 2}
    model = ar.MaskedAR(ar.ARConfig(**sizes, causal=True))
    for layer in (model.head, model.modulation[1], model.final_modulation[1]):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model.eval()


def test_next_token_loss_is_the_likelihood_of_the_sequence():
    model, bits, labels = next_token_model(), torch.rand(2, 7, 6) > 0.5, torch.tensor([0, 2])
    total, everything = 0.0, torch.ones(2, 7, dtype=torch.bool)
    for length in range(1, 8):  # each token from the class and its prefix alone
        logits = model(bits[:, :length], labels, everything[:, :length])[:, -1]
        values = (bits[:, length - 1].unflatten(-1, (3, 2)) * torch.tensor([1, 2])).sum(-1)
        total -= logits.log_softmax(-1).gather(-1, values[..., None]).sum().item()
    out = model.loss(bits, labels, everything, torch.tensor(7.0), smoothing=0.0)
    assert out["nll"].item() == pytest.approx(total / (2 * 7 * 6), rel=1e-5)
    assert model.draw_masks(2, 0.7, torch.Generator()).all()


def test_next_token_sampling_goes_from_left_to_right():
    model, labels = next_token_model(), torch.tensor([0, 2])
    for n, (bits, masked) in enumerate(model.generate_steps(labels, cfg=3.0, top_p=1e-6)):
        assert torch.equal(masked, (torch.arange(7) > n).expand(2, -1))
    both = [model(bits, each, masked) for each in (labels, torch.full_like(labels, 3))]
    scale = 1 + 2.0 * (torch.arange(7) + 1) / 7  # linear in the share predicted
    logits = both[1] + scale[:, None, None] * (both[0] - both[1])
    greedy = ar.index_to_bits(logits.argmax(-1), 2).flatten(-2)
    assert n == 6 and torch.equal(bits, greedy)  # it is what one pass over the finished sequence says
    assert torch.equal(model.generate(labels, cfg=3.0, top_p=1e-6, order="raster"), bits)
    for options in ({"steps": 3}, {"order": "confidence"}):
        with pytest.raises(ValueError, match="7 steps"):
            model.generate(labels, **options)


# --------------------------------------------------------------------------------------------------- pictures


def read_back(picture, path, **options):
    picture.save(path, **options)
    return semtok.read_picture(str(path)).permute(1, 2, 0).numpy()


def test_pictures_of_every_mode(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (20, 30), dtype=np.uint8), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(read_back(Image.fromarray(grey), tmp_path / "l.png"), np.stack([grey] * 3, -1))
    palette = Image.fromarray(colour // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_back(palette, tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    share, alpha = grey[..., None] / 255, np.concatenate([colour, grey[..., None]], -1)
    shown = read_back(Image.fromarray(alpha), tmp_path / "rgba.png")  # transparency is laid on white
    assert np.abs(shown - (colour * share + 255 * (1 - share))).max() <= 1
    hole = Image.fromarray(colour[..., 0] // 2).convert("P")  # one colour of a palette is see-through
    assert (read_back(hole, tmp_path / "hole.png", transparency=7)[np.asarray(hole) == 7] == 255).all()


@pytest.mark.parametrize("kind, brightest", [("png", 65535), ("png", 200), ("tif", 65535), ("tif", 200)])
def test_sixteen_bits_become_eight_however_dark(tmp_path, kind, brightest):
    values = np.linspace(0, brightest, 600).astype(np.uint16).reshape(20, 30)
    shown = read_back(Image.fromarray(values), tmp_path / f"deep.{kind}")
    assert np.array_equal(shown[..., 0], (values / 257).round().astype(np.uint8))


@pytest.mark.parametrize("orientation, undo", [
    (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (5, lambda p: p.transpose(1, 0, 2)),
    (6, lambda p: np.rot90(p, -1)), (8, lambda p: np.rot90(p)),
])
def test_exif_rotation(tmp_path, orientation, undo):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_back(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif), undo(pixels))


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (128, 192), (20, 50)])
def test_shorter_side_by_boxes_then_bicubic_then_the_centre(tmp_path, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = pixels.astype(float)
    while min(want.shape[:2]) >= 64:
        want = want.reshape(want.shape[0] // 2, 2, want.shape[1] // 2, 2, 3).mean((1, 3)).round()
    sides = [round(side * 32 / min(want.shape[:2])) for side in want.shape[:2]]
    shown = np.asarray(Image.fromarray(want.astype(np.uint8)).resize(sides[::-1], Image.Resampling.BICUBIC), int)
    top, left = (sides[0] - 32) // 2, (sides[1] - 32) // 2
    found = semtok.read_picture(str(tmp_path / "a.png"), 32).permute(1, 2, 0).numpy()
    assert found.shape == (32, 32, 3) and np.abs(found - shown[top : top + 32, left : left + 32]).max() <= 2


# ------------------------------------------------------------------------------------------- schedule, tokens


def test_ranks_share_every_epoch_and_resume_in_its_middle(monkeypatch):
    def seen(first, rank, world, flip=True):
        monkeypatch.setattr(train, "ranks", lambda: (rank, world))
        return list(train.schedule(50, train.Recipe(25, 8, 1e-3, flip=flip), 7, first))

    alone = seen(0, 0, 1)  # four epochs
    shared = [seen(0, rank, 4) for rank in range(4)]
    assert [sum((share[step] for share in shared), []) for step in range(25)] == alone
    flat = [item for batch in alone for item in batch]
    epochs = [[index for index, _ in flat[50 * epoch : 50 * (epoch + 1)]] for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 4 and epochs[0] != epochs[1]
    assert {flip for _, flip in flat} == {False, True}
    assert [[(index, False) for index, _ in batch] for batch in alone] == seen(0, 0, 1, flip=False)
    for stop in (1, 13, 19):  # anywhere in an epoch, on any number of ranks
        assert [seen(stop, rank, 2) for rank in range(2)] == [seen(0, rank, 2)[stop:] for rank in range(2)]


def test_interrupted_tokens_go_on_and_those_of_another_tokenizer_are_made_again(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Tokens, "PART", 10)  # of the 27 training pictures: three parts
    job, write, notes = make_job(world, "ar", out=tmp_path), train.write_text, []
    tokenizers = [make_stage(world, "1").semtok, semtok.load_semtok(str(world[1] / "stage1.safetensors"))[0]]

    def make(name, number=0, flip=True):
        return train.Tokens(str(tmp_path / name), tokenizers[number], f"print {number}", job, flip)

    def interrupted(path, text):
        notes.append(text)
        if len(notes) == 2:
            raise KeyboardInterrupt
        write(path, text)

    whole = make("whole.npy")
    monkeypatch.setattr(train, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make("broken.npy")
    resumed = make("broken.npy")
    assert len(notes) == 4 and np.array_equal(resumed.table, whole.table)  # parts 1, 2, again 2, 3
    make("broken.npy")
    assert len(notes) == 4  # whole: nothing is made
    pictures, wrong = semtok.to_signed(world[2].memory), 0
    for flip, shown in ((False, pictures), (True, pictures.flip(-1))):
        bits = torch.stack([resumed[index, flip][0] for index in range(27)])
        wrong += (bits != (tokenizers[0].encode(shown) > 0)).sum().item()
    # sums in another order
    assert wrong <= 2 and [resumed[index, True][1] for index in range(27)] == world[2].labels
    assert not np.array_equal(make("broken.npy", 1).table, whole.table) and len(notes) == 7
    assert make("broken.npy", 1, flip=False).table.shape == (27, 1) and len(notes) == 10
    notes[:], kept = notes[:1], np.array(whole.table)
    with pytest.raises(KeyboardInterrupt):  # before the first part of another table is noted
        make("whole.npy", 1)
    assert np.array_equal(make("whole.npy").table, kept)
