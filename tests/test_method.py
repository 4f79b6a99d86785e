"""The method by its settings (Tables 4, 5, 6, 10 to 14), and what it is fed: pictures, schedule, tokens."""

import math
import os
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from test_pipeline import call, make_pictures

import ar
import fid
import mmdit
import semtok
import train

STEPS = ("--steps", 2, "--batch-size", 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of pictures, a run's folder with the stand-ins and stage 1 of two steps, and the pictures."""
    folder = make_pictures(tmp_path_factory.mktemp("method") / "data", 10)
    out = folder.with_name("run")
    for stage in "01":
        result = call("train.py", "--stage", stage, "--data", folder, "--out", out, *STEPS)
        assert result.returncode == 0, result.stderr[-2000:]
    return folder, out, train.Pictures(str(folder), "train", 0, 32)


def make_run(world, stage, *settings, preset="tiny"):
    """What a stage gets, by the command line's own way, in a folder that holds the stand-ins and stage 1."""
    arguments = ["--stage", stage, "--preset", preset, *(["--set", *settings] if settings else [])]
    args = train.parse_arguments(arguments)
    args.out = str(world[1].with_name("new"))  # where nothing has begun
    run, _ = train.open_run(args)
    run.folder, run.train, run.val = str(world[1]), world[2], world[2]
    return run


def make_stage(world, stage, *settings):
    torch.manual_seed(0)
    return train.STAGES[stage](make_run(world, stage, *settings))


def one_step(stage, pictures):
    """Losses of one forward pass, the same for the same weights, and their gradients by parameter."""
    labels = torch.tensor(pictures.labels[:8])
    out = stage(*stage.prepare(pictures.memory[:8], labels, torch.Generator().manual_seed(1), 0))
    out["loss"].backward()
    return out, {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def refined(world, out, settings, *names):
    """The tokenizer of a new run's stage 2, of two steps, with some of the old run's results."""
    out.mkdir()
    for name in names:
        os.symlink(world[1] / name, out / name)
    result = call("train.py", "--stage", "2", "--data", world[0], "--out", out, *STEPS, "--set", *settings)
    assert result.returncode == 0, result.stderr[-2000:]
    return semtok.load_semtok(str(out / "stage2.safetensors"))[0]


# ------------------------------------------------------------------------------------ Tables 4, 6, 10, 11, 12


LEFT_OUT = [  # a term, its weight in the loss, what learns from it alone
    ("distill=0", "distill_loss", "lambda_s", ["w_x.weight"]),
    ("contrast=0", "contrast_loss", "lambda_s", ["w_z.weight", "log_t"]),
    ("perceptual=lpips", "resnet_loss", "lambda_p", []), ("perceptual=resnet", "lpips_loss", "lambda_p", []),
]


@pytest.mark.parametrize("stage, left_out", [("1", LEFT_OUT[0]), ("1", LEFT_OUT[1]), *product("2", LEFT_OUT)])
def test_terms_can_be_left_out(world, stage, left_out):
    (_, term, weight, heads), made = left_out, make_stage(world, stage, left_out[0])
    whole, gradients = one_step(make_stage(world, stage), world[2])
    without, left = one_step(made, world[2])
    gone = {term} if weight == "lambda_p" else set()  # a judge is not asked, nor is its file
    assert whole.keys() - without.keys() == gone and f"{term.removesuffix('_loss')}" not in made.frozen
    assert {name for name in without if not torch.equal(whole[name], without[name])} == {"loss"}
    missing = getattr(train.RECIPES["tiny"][stage], weight) * whole[term].item()
    assert (whole["loss"] - without["loss"]).item() == pytest.approx(missing, abs=1e-5)
    for name in heads:
        assert gradients[f"semtok.{name}"].any() and not left[f"semtok.{name}"].any()


@pytest.mark.parametrize("judge, files", [
    ("lpips", ["vgg16-397923af", "lpips_vgg"]), ("resnet", ["resnet50-0676ba61"]),
])
def test_judges_read_published_files_but_in_tiny(world, judge, files, monkeypatch):
    asked, x = [], torch.rand(2, 3, 32, 32)
    one, same = (make_stage(world, "2").frozen[judge] for _ in range(2))  # in tiny, random twins
    assert train.JUDGES[judge].loss(one, x, x.flip(0)) == train.JUDGES[judge].loss(same, x, x.flip(0)) > 0
    monkeypatch.setattr(train.Run, "weights", lambda _, name: asked.append(name) or "none")
    with pytest.raises(fid.UserError):
        train.JUDGES[judge].load(make_run(world, "2", preset="base"))
    assert asked == files


def test_quantizer(world):
    bsq, lfq = (make_stage(world, "1", f"quantizer={kind}") for kind in ("bsq", "lfq"))
    config = make_stage(world, "1").semtok.config
    assert replace(lfq.semtok.config, quantizer="bsq") == bsq.semtok.config == config
    for (name, a), b in zip(bsq.state_dict().items(), lfq.state_dict().values()):
        assert torch.equal(a, b * 24**0.5 if "token_embedder.weight" in name else b), name
    z = torch.randn(2, 16, 24)
    (on_sphere, _), (corner, u) = bsq.semtok.quantizer(z), lfq.semtok.quantizer(z)
    assert torch.equal(corner, z.sign()) and torch.equal(u, z)
    assert torch.allclose(on_sphere, z.sign() / 24**0.5)
    sizes = [stage.run.ar_config(stage.semtok.config) for stage in (lfq, bsq)]
    assert sizes[0] == replace(sizes[1], spherical=False)


def test_stage_2_from_scratch(world, tmp_path):
    assert refined(world, tmp_path / "run", ["init=scratch", "bits=12"], "standins").config.bits == 12
    assert not (tmp_path / "run" / "stage1.safetensors").exists()
    # it begins where stage 1 would, but for the mask tokens, which stage 1 does not use
    scratch, first = make_stage(world, "2", "init=scratch").semtok, make_stage(world, "1").semtok
    differ = {n for n, p in first.state_dict().items() if not torch.equal(p, scratch.state_dict()[n])}
    assert differ == {"decoder.mask_tokens"}


def test_freeze_encoder(world, tmp_path):
    first, moved = semtok.load_semtok(str(world[1] / "stage1.safetensors"))[0].state_dict(), []
    for frozen in (0, 1):
        settings = [f"freeze_encoder={frozen}"]
        last = refined(world, tmp_path / f"{frozen}", settings, "standins", "stage1.safetensors").state_dict()
        moved.append({name.split(".")[0] for name in first if not torch.equal(first[name], last[name])})
    assert "decoder" in moved[1] and moved[0] - moved[1] == {"encoder"} and not moved[1] - moved[0]


def test_the_temperature_is_clamped_after_the_step_and_keeps_its_gradient(world):
    stage = make_stage(world, "1")
    stage.semtok.log_t.data.fill_(10.0)
    out, gradients = one_step(stage, world[2])
    assert gradients["semtok.log_t"].any() and stage.semtok.log_t.item() == 10
    stage.after_step(out)
    assert stage.semtok.log_t.item() == pytest.approx(math.log(100))


def test_patience_multiplies_what_is_counted_in_steps_and_steps_alone_nothing(world):
    plain, patient, longer = (make_run(world, "2", *changes).recipe("2")
                              for changes in (["steps=90"], ["steps=90", "patience=2"], ["steps=5000"]))
    assert patient == replace(plain, steps=180, warmup=100, gan_start=1800, patience=2)
    assert longer == replace(plain, steps=5000)
    later = make_run(world, "1", "patience=2", "flip=0", "lr=1").recipe("ar")  # these two hold from here on
    assert later == replace(train.RECIPES["tiny"]["ar"], steps=4200, warmup=400, patience=2, flip=False)


def test_weights_of_layers_decay_alone(world):
    stage = make_stage(world, "2")
    names = {id(p): name for name, p in stage.named_parameters() if p.requires_grad}
    for recipe in (stage.recipe, replace(stage.recipe, weight_decay=0.0)):
        groups, found = train.make_optimizer(stage, recipe).param_groups, {}
        for g in groups:
            found |= {names[id(p)]: (g["peak"], g["start"], g["weight_decay"]) for p in g["params"]}
        assert found.keys() == set(names.values())
        assert found["semtok.w_x.weight"] == (recipe.lr, 0, recipe.weight_decay)
        for name in ("w_x.bias", "log_t", "encoder.mask_tokens", "encoder.norm_out.weight"):
            assert found[f"semtok.{name}"] == (recipe.lr, 0, 0)
        joining = recipe.discriminator_lr, recipe.gan_start
        assert found["discriminator.mix.weight"] == (*joining, recipe.weight_decay)
        assert found["discriminator.norms.0.weight"] == (*joining, 0)


# ------------------------------------------------------------------------------------------- Tables 5, 13, 14


def test_group_bits_divide_the_bits_and_size_the_head_alone():
    """And an untrained head of any grouping loses one bit a bit."""
    bitwise, joint = ar.AR_PRESETS["L"], replace(ar.AR_PRESETS["L"], group_bits=9)
    with torch.device("meta"):
        shapes = [{n: p.shape for n, p in ar.MaskedAR(c).named_parameters()} for c in (bitwise, joint)]
    assert {n for n in shapes[0] if shapes[0][n] != shapes[1][n]} == {"head.weight", "head.bias"}
    assert shapes[0]["head.weight"] == (36, 1024) and shapes[1]["head.weight"] == (2 * 2**9, 1024)
    labels, masked, tiny = torch.zeros(4).long(), torch.ones(4, 16).bool(), ar.AR_PRESETS["tiny"]
    for bits, allowed in ((18, {1, 2, 3, 6, 9}), (24, {1, 2, 3, 4, 6, 8, 12}), (7, {1, 7})):
        for group_bits in set(range(bits + 2)) - allowed:
            with pytest.raises(ValueError, match=f"group_bits {group_bits}"):
                replace(tiny, bits=bits, group_bits=group_bits)
        for group_bits in allowed:
            model = ar.MaskedAR(replace(tiny, bits=bits, group_bits=group_bits, depth=1))
            out = model.loss(torch.rand(4, 16, bits) > 0.5, labels, masked, torch.tensor(16.0))
            assert out["nll"].item() == pytest.approx(math.log(2), rel=1e-5)


SEEN = {  # of 16 tokens: which other tokens' codes a token moves
    "causal=0": torch.ones(16, 16, dtype=torch.bool),
    "causal=1": torch.ones(16, 16, dtype=torch.bool).triu(),  # what is not before it
    "form=2d": torch.eye(16, dtype=torch.bool),
}


@pytest.mark.parametrize("setting", SEEN)
def test_what_tokens_see_is_all_that_the_setting_changes(world, setting):
    model, plain = (make_stage(world, "1", each).semtok for each in (setting, "causal=0"))
    assert replace(model.config, causal=False, form="1d") == plain.config
    assert model.state_dict().keys() == plain.state_dict().keys()
    work = []
    for each in (model, plain):
        with FlopCounterMode(display=False) as counter:
            each.quantise(torch.randn(1, 8, 8, 8))
        work.append(counter.get_total_flops())
    assert work[0] == work[1] > 0
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
    assert torch.equal(torch.stack(on_tokens), SEEN[setting])
    assert torch.stack(on_patches).any().item() is (setting == "causal=0")  # nor do the patches pass it on


def test_a_2d_token_belongs_to_its_patch(world):
    model = make_stage(world, "1", "form=2d", "encoder_depth=1").semtok  # in one block, patches do not mix
    latents, moved = torch.randn(1, 8, 8, 8), []
    for part in (model.encoder, model.decoder):
        assert torch.equal(part.z_rope.table, part.x_rope.table)
    with torch.no_grad():
        z = model.encoder(latents)[1]
        for row, column in product(range(0, 8, 2), repeat=2):
            other = latents.clone()
            other[..., row : row + 2, column : column + 2] += 1
            moved.append((model.encoder(other)[1] - z)[0].abs().amax(1) > 1e-6)
    assert torch.equal(torch.stack(moved), torch.eye(16, dtype=torch.bool))
    for impossible in (("tokens=8",), ("causal=1",)):
        with pytest.raises(mmdit.UserError, match="form=2d has a token for each patch: set tokens=16"):
            make_run(world, "1", "form=2d", *impossible)


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
    for options in ({"steps": 3}, {"order": "confidence"}, {"known": (bits, masked)}):
        with pytest.raises(ValueError, match="one a step"):
            model.generate(labels, **options)


# --------------------------------------------------------------------------------------------------- pictures


def read_back(folder, picture, form="png", size=None, **options):
    picture.save(folder / f"a.{form}", **options)
    return fid.read_picture(str(folder / f"a.{form}"), size)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pictures_of_every_mode(tmp_path):
    grey, colour = noise(20, 30), noise(20, 30, 3)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(grey)), np.stack([grey] * 3, -1))
    palette = Image.fromarray(colour // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_back(tmp_path, palette), np.asarray(palette.convert("RGB")))
    share, alpha = grey[..., None] / 255, np.concatenate([colour, grey[..., None]], -1)
    shown = read_back(tmp_path, Image.fromarray(alpha))  # transparency is laid on white
    assert np.abs(shown - (colour * share + 255 * (1 - share))).max() <= 1
    hole = Image.fromarray(colour[..., 0] // 2).convert("P")  # one colour of a palette is see-through
    assert (read_back(tmp_path, hole, transparency=7)[np.asarray(hole) == 7] == 255).all()
    for form, brightest in product(("png", "tif"), (65535, 200)):  # 16 bits become 8, however dark
        values = np.linspace(0, brightest, 600).astype(np.uint16).reshape(20, 30)
        shown = read_back(tmp_path, Image.fromarray(values), form)
        assert np.array_equal(shown[..., 0], (values / 257).round().astype(np.uint8)), (form, brightest)
    for orientation, undo in (  # EXIF turns it
        (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)), (8, lambda p: np.rot90(p)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = read_back(tmp_path, Image.fromarray(colour), exif=exif)
        assert np.array_equal(shown, undo(colour)), orientation


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (128, 192), (20, 50)])
def test_shorter_side_by_boxes_then_bicubic_then_the_centre(tmp_path, height, width):
    pixels = noise(height, width, 3)
    want = pixels.astype(float)
    while min(want.shape[:2]) >= 64:
        want = want.reshape(want.shape[0] // 2, 2, want.shape[1] // 2, 2, 3).mean((1, 3)).round()
    sides = [round(side * 32 / min(want.shape[:2])) for side in want.shape[:2]]
    shown = Image.fromarray(want.astype(np.uint8)).resize(sides[::-1], Image.Resampling.BICUBIC)
    top, left = (sides[0] - 32) // 2, (sides[1] - 32) // 2
    found = read_back(tmp_path, Image.fromarray(pixels), size=32)
    assert np.abs(found - np.asarray(shown, int)[top : top + 32, left : left + 32]).max() <= 2


# -------------------------------------------------------------------------------- classes, batches, tokens


def test_classes_are_listed_without_hidden_folders_and_through_links(tmp_path, capsys):
    folder = make_pictures(tmp_path / "data", 2)
    for path in (".hidden/a.png", "bird/.hidden/b.png", "hollow/notes.txt"):
        (folder / path).parent.mkdir()
        (folder / path).write_bytes(b"none")
    (folder / "linked").symlink_to(make_pictures(tmp_path / "elsewhere", 2) / "fish")
    classes, paths, labels, fingerprint = train.find_pictures(str(folder), "train")
    assert classes == ["bird", "fish", "house", "linked"] and "hollow" in capsys.readouterr().err
    assert paths == [f"{folder}/{name}/001.png" for name in classes] and labels == [0, 1, 2, 3]
    assert fingerprint.startswith("4 files, ")
    assert train.find_pictures(str(folder), "val")[1] == [path.replace("001", "000") for path in paths]


def test_ranks_share_every_epoch_and_resume_in_its_middle(monkeypatch):
    def seen(step, rank, world, flip=True):
        monkeypatch.setattr(train, "ranks", lambda: (rank, world))
        return list(train.batches_from(step, 50, train.Recipe(25, 8, 1e-3, flip=flip), 7))

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


def test_tokens_are_made_once_by_all_ranks_and_again_for_another_tokenizer(world, tmp_path, monkeypatch):
    run, fill, filled = make_run(world, "1"), train.Tokens.fill, []
    run.folder = str(tmp_path)
    first, second = make_stage(world, "1").semtok, semtok.load_semtok(str(world[1] / "stage1.safetensors"))[0]
    monkeypatch.setattr(train.Tokens, "fill", lambda *args: filled.append(args[1]) or fill(*args))
    tokens, again = (train.Tokens(run, first, "one", True) for _ in range(2))
    assert len(filled) == 1 and np.array_equal(tokens.table, again.table)
    pictures, wrong = semtok.to_signed(world[2].memory), 0
    for flip, shown in ((False, pictures), (True, pictures.flip(-1))):
        bits = torch.stack([tokens[index, flip][0] for index in range(27)])
        wrong += (bits != (first.encode(shown) > 0)).sum().item()
    assert wrong <= 2 and [tokens[index, True][1] for index in range(27)] == world[2].labels  # sums' order
    other, single = (train.Tokens(run, second, "two", flip) for flip in (True, False))
    assert len(filled) == 3 and not np.array_equal(other.table, tokens.table)
    assert single.table.shape == (27, 1) and np.array_equal(single.table[:, 0], other.table[:, 0])
    part = str(tmp_path / "shared")  # into which two ranks, here one after the other, write their shares
    with monkeypatch.context() as ranks:
        ranks.setattr(train, "wait_for_all", lambda: None)
        for rank in (0, 1):
            ranks.setattr(train, "ranks", lambda rank=rank: (rank, 2))
            fill(tokens, part, run, first, True)
    shared = np.load(part)
    assert np.array_equal(shared["label"], tokens.table["label"])
    assert np.unpackbits(shared["bits"] ^ tokens.table["bits"]).sum() <= 2
    os.truncate(tokens.table.filename, 500)
    with pytest.raises(mmdit.UserError, match="tokens-.* is damaged .*: delete it"):
        train.Tokens(run, first, "one", True)
