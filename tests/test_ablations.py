"""The flags of the paper's ablations, each changing what it names and nothing else; the pictures; the caches."""

import json
import math
import os
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import call, make_pictures, same_tensors, sentence

import ar
import mmdit
import semtok
import train

STEPS = ("--steps", 2, "--batch-size", 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of pictures, a run's folder with the stand-ins and stage 1 of two steps, and the pictures as read."""
    folder = make_pictures(tmp_path_factory.mktemp("ablations") / "data", 10)
    out = folder.with_name("run")
    for stage in ("0", "1"):
        result = call("train.py", "--stage", stage, "--data", folder, "--out", out, *STEPS)
        assert result.returncode == 0, result.stderr[-2000:]
    return folder, out, train.open_pictures(str(folder), "train", 0, 32, 0)


def make_job(world, *flags, out=None):
    """What a stage gets, by the command line's own way."""
    folder, base, pictures = world
    arguments = ["--data", folder, "--out", out or base, *STEPS, "--workers", 0, *flags]
    return train.Job(train.parse_arguments([*map(str, arguments)]), torch.device("cpu"), pictures, pictures)


def make_stage(world, stage, *flags, out=None):
    torch.manual_seed(0)
    return train.STAGE_CLASSES[stage](make_job(world, "--stage", stage, *flags, out=out))


def one_step(stage, pictures):
    """Losses of one forward pass, the same for the same weights, and their gradients by parameter."""
    batch = (pictures.pictures[:8], None)
    latents, x_sig, shown = stage.features(batch)
    rng = torch.Generator().manual_seed(1)
    noise, t = torch.randn(latents.shape, generator=rng), torch.rand(8, generator=rng)
    out = stage(latents, x_sig, *((noise, t) if isinstance(stage, train.Pretraining) else (shown, False)))
    out["loss"].backward()
    return out, {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def copy_run(world, target, *names):
    """A new run's folder with some of the old one's results."""
    target.mkdir()
    for name in names:
        os.symlink(world[1] / name, target / name)
    return target


def metadata(path):
    return mmdit.TensorFiles(str(path)).metadata


# -------------------------------------------------------------------------------------------------- Table 4, 10, 11, 12


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("term, parts", [  # what learns from the term alone: its head, and what in the encoder only feeds it
    ("distill", ("semtok.w_x.", "semtok.encoder.joint_blocks.1.x_block.")), ("contrast", ("semtok.w_z.", "semtok.log_t")),
])
def test_terms_of_the_alignment_can_be_left_out(world, stage, term, parts):
    whole, gradients = one_step(make_stage(world, stage), world[2])
    without, left = one_step(make_stage(world, stage, f"--no-{term}"), world[2])
    assert whole.keys() == without.keys()
    assert {n for n in whole if not torch.equal(torch.as_tensor(whole[n]), torch.as_tensor(without[n]))} == {"loss", f"{term}_weight"}
    weight = train.RECIPES["tiny"][stage].semantic
    assert (whole[f"{term}_weight"].item(), without[f"{term}_weight"].item()) == (pytest.approx(weight), 0)
    assert (whole["loss"] - without["loss"]).item() == pytest.approx(weight * whole[term].item(), abs=1e-6)
    silent = {n for n, g in left.items() if not g.any()} - {n for n, g in gradients.items() if not g.any()}
    assert all(n.startswith(parts) for n in silent) and all(any(n.startswith(p) for n in silent) for p in parts)


def test_log_and_checkpoint_say_which_terms_were_left_out(world, tmp_path):
    out = copy_run(world, tmp_path / "run", "standins")
    arguments = ("--stage", "1", "--data", world[0], "--out", out, "--no-distill", *STEPS)
    assert call("train.py", *arguments).returncode == 0
    entry = json.loads(open(out / "log.jsonl").readline())
    assert (entry["distill_weight"], entry["contrast_weight"]) == (0, pytest.approx(0.05)) and entry["distill"] > 0
    assert json.loads(metadata(out / "stage1.safetensors")["settings"]) == {"no_distill": True}
    assert json.loads(metadata(world[1] / "stage1.safetensors")["settings"]) == {}
    # neither a result nor a training state is taken for one of another experiment
    other = ("--stage", "1", "--data", world[0], "--out", out, *STEPS)
    sentence(call("train.py", *other), "was made with --no-distill", "no flag of the kind", "--overwrite")
    sentence(call("train.py", *other, "--resume"), "state-1", "was made with --no-distill")
    again = call("train.py", *arguments)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_quantizer(world):
    bsq, lfq = (make_stage(world, "1", "--quantizer", kind) for kind in ("bsq", "lfq"))
    assert replace(lfq.semtok.config, quantizer="bsq") == bsq.semtok.config == make_stage(world, "1").semtok.config
    assert all(torch.equal(a, b) for a, b in zip(bsq.state_dict().values(), lfq.state_dict().values()))
    z = torch.randn(2, 16, 24)
    (on_sphere, _), (corner, u) = bsq.semtok.quantizer(z), lfq.semtok.quantizer(z)
    assert torch.equal(corner, z.sign()) and torch.equal(u, z) and torch.allclose(on_sphere, z.sign() / 24**0.5)
    sizes = train.ar_config(lfq.job.args, lfq.semtok.config)
    assert sizes == replace(train.ar_config(bsq.job.args, bsq.semtok.config), spherical=False)


@pytest.mark.parametrize("choice, terms", [("lpips", {"lpips"}), ("resnet", {"resnet"}), ("both", {"lpips", "resnet"})])
def test_perceptual_terms(world, choice, terms):
    stage = make_stage(world, "2", "--perceptual", choice)
    assert stage.frozen.keys() == terms | {"siglip"}
    out, _ = one_step(stage, world[2])
    whole, _ = one_step(make_stage(world, "2"), world[2])
    assert out.keys() - whole.keys() == set() and whole.keys() - out.keys() == {"lpips", "resnet"} - terms
    assert all(torch.equal(torch.as_tensor(out[n]), torch.as_tensor(whole[n])) for n in out if n != "loss")
    missing = sum(train.RECIPES["tiny"]["2"].perceptual * whole[name] for name in {"lpips", "resnet"} - terms)
    assert (whole["loss"] - out["loss"] - missing).abs().item() < 1e-6


@pytest.mark.parametrize("choice, needed", [("lpips", {"vgg", "lpips"}), ("resnet", {"resnet"}), ("both", {"vgg", "lpips", "resnet"})])
def test_perceptual_terms_ask_for_their_files_alone(choice, needed):
    args = train.parse_arguments(["--stage", "2", "--preset", "paper", "--perceptual", choice])
    asked = {flag for flag in train.WEIGHTS for text in train.missing_files(args, "2") if text.startswith(f"--{flag} ")}
    assert asked == needed | {"siglip"}
    rows = train.networks(train.planned(train.parse_arguments(["--stage", "2", "--perceptual", choice])))
    assert {"LPIPS' VGG16", "ResNet-50"} & rows.keys() == {
        "LPIPS' VGG16" if "lpips" in needed else "", "ResNet-50" if "resnet" in needed else ""
    } - {""}


def test_stage_2_from_scratch(world, tmp_path):
    out = copy_run(world, tmp_path / "run", "standins")
    result = call("train.py", "--stage", "2", "--data", world[0], "--out", out, "--from-scratch", "--bits", 12, *STEPS)
    assert result.returncode == 0 and not (out / "stage1.safetensors").exists(), result.stderr[-2000:]
    assert "python train.py --stage ar" in result.stdout
    model, about = semtok.load_semtok(str(out / "stage2.safetensors"))
    assert model.config.bits == 12 and json.loads(about["settings"]) == {"from_scratch": True, "bits": 12}
    # it begins where stage 1 would, but for the mask tokens, which stage 1 does not use
    scratch, first = make_stage(world, "2", "--from-scratch").semtok, make_stage(world, "1").semtok
    differ = {n for n, p in first.state_dict().items() if not torch.equal(p, scratch.state_dict()[n])}
    assert differ == {"decoder.mask_tokens"}


def test_from_scratch_starts_the_decoder_from_sd35(world, tmp_path):
    base = make_stage(world, "1").semtok
    torch.manual_seed(5)
    kept = ("x_embedder", "t_embedder", "joint_blocks", "final_layer")
    file = {n: torch.randn_like(p) * 0.05 for n, p in base.decoder.named_parameters() if n.startswith(kept)}
    for name, shape in (("0.weight", (64, 32)), ("0.bias", (64,)), ("2.weight", (64, 64)), ("2.bias", (64,))):
        file[f"y_embedder.mlp.{name}"] = torch.randn(shape)
    path = tmp_path / "sd35.safetensors"
    semtok.write_tensors(str(path), {f"model.diffusion_model.{n}": t for n, t in file.items()}, {})
    flags = ("--from-scratch", "--sd35", path, "--vae", world[1] / "standins" / "vae.safetensors")
    decoder = make_stage(world, "2", *flags).semtok.decoder.state_dict()
    assert torch.equal(decoder["final_layer.linear.weight"], -file["final_layer.linear.weight"])
    blocks = [n for n in file if n.startswith("joint_blocks.")]
    assert blocks and all(torch.equal(decoder[n], file[n]) for n in blocks)


def test_freeze_encoder(world, tmp_path):
    first, _ = semtok.load_semtok(str(world[1] / "stage1.safetensors"))
    out = copy_run(world, tmp_path / "run", "standins", "stage1.safetensors")
    result = call("train.py", "--stage", "2", "--data", world[0], "--out", out, "--freeze-encoder", *STEPS)
    assert result.returncode == 0, result.stderr[-2000:]
    last, _ = semtok.load_semtok(str(out / "stage2.safetensors"))
    moved = {n for n, p in first.state_dict().items() if not torch.equal(p, last.state_dict()[n])}
    (_, free), (_, frozen) = (one_step(make_stage(world, "2", *flags), world[2]) for flags in ((), ("--freeze-encoder",)))
    assert {n.split(".")[1] for n in free.keys() - frozen.keys()} == {"encoder"} and not frozen.keys() - free.keys()
    assert "decoder.mask_tokens" in moved and {f"semtok.{n}" for n in moved} <= frozen.keys()
    args = [train.parse_arguments(["--stage", "2", *flags]) for flags in ((), ("--freeze-encoder",))]
    free, frozen = (
        {n: any(p.requires_grad for m in modules for p in m.parameters()) for n, modules in train.networks(train.planned(a)).items()}
        for a in args
    )
    assert {n for n in free if free[n] != frozen[n]} == {"encoder"}


# ------------------------------------------------------------------------------------------------------------- Table 13


def test_bit_groups_size_the_head_alone():
    args = [train.parse_arguments(["--stage", "ar", "--preset", "paper", "--bit-groups", str(n)]) for n in (18, 2)]
    bitwise, joint = (train.ar_config(a, semtok.PRESETS["paper"]) for a in args)
    assert bitwise == train.ar_config(train.parse_arguments(["--stage", "ar", "--preset", "paper"]), semtok.PRESETS["paper"])
    assert joint == replace(bitwise, group_bits=9)
    with torch.device("meta"):
        shapes = [{n: p.shape for n, p in ar.MaskedAR(config).named_parameters()} for config in (bitwise, joint)]
    assert {n for n in shapes[0] if shapes[0][n] != shapes[1][n]} == {"head.weight", "head.bias"}
    assert shapes[0]["head.weight"] == (36, 1024) and shapes[1]["head.weight"] == (2 * 2**9, 1024)


@pytest.mark.parametrize("bits, allowed", [(18, {2, 3, 6, 9, 18}), (24, {2, 3, 4, 6, 8, 12, 24}), (32, {4, 8, 16, 32}), (7, {1, 7})])
def test_bit_groups_divide_the_bits_into_softmaxes_that_fit(bits, allowed):
    found = set()
    for groups in range(1, bits + 3):
        args = train.parse_arguments(["--stage", "ar", "--bit-groups", str(groups)])
        try:
            assert train.ar_config(args, replace(semtok.PRESETS["tiny"], bits=bits)).group_bits == bits // groups
            found.add(groups)
        except mmdit.UserError as error:
            assert f"--bit-groups {groups} " in str(error) and f"choose {', '.join(map(str, sorted(allowed)))}" in str(error)
    assert found == allowed


def test_bit_groups_are_refused_before_anything_is_made(world, tmp_path):
    sentence(call("train.py", "--stage", "all", "--data", world[0], "--out", tmp_path / "x", "--bit-groups", 5), "24 bits")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("groups", [24, 8, 2])
def test_untrained_heads_of_any_grouping_give_one_bit_of_loss_a_bit(groups):
    config = replace(ar.AR_PRESETS["tiny"], group_bits=24 // groups)
    bits = torch.rand(4, 16, 24) > 0.5
    out = ar.MaskedAR(config).loss(bits, torch.zeros(4, dtype=torch.long), torch.ones(4, 16, dtype=torch.bool))
    assert out["nll"].item() == pytest.approx(math.log(2), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- Table 5


def changed_by(function, tensor, places):
    """For each place of tensor (places, ...), which rows of function's result (rows, ...) a change there moves."""
    with torch.no_grad():
        base, moved = function(), []
        for place in range(places):
            kept = tensor[place].clone()
            tensor[place] += torch.randn_like(kept)  # a constant would be lost in the first norm
            moved.append((function() - base).abs().flatten(1).amax(1) > 1e-6)
            tensor[place] = kept
    return torch.stack(moved)


@pytest.mark.parametrize("order", ["raster", "global"])
def test_raster_makes_the_token_stream_causal_and_nothing_else(world, order):
    model = make_stage(world, "1", "--order", order).semtok
    assert replace(model.config, causal=False) == make_stage(world, "1").semtok.config
    assert model.state_dict().keys() == make_stage(world, "1").semtok.state_dict().keys()
    encoder, latents = model.encoder, torch.randn(1, 8, 8, 8)
    on_tokens = changed_by(lambda: encoder(latents)[1][0], encoder.mask_tokens, 16)
    on_patches = changed_by(lambda: encoder(latents)[0][0], encoder.mask_tokens, 16)
    by_patches = changed_by(lambda: encoder(latents)[1][0], latents[0].permute(1, 2, 0), 8)  # rows of the picture
    assert by_patches.all()  # every token sees the whole picture
    if order == "raster":  # token j moves token i only when j <= i, and no later token reaches it through the picture
        assert torch.equal(on_tokens, torch.ones(16, 16, dtype=torch.bool).triu()) and not on_patches.any()
    else:
        assert on_tokens.all() and on_patches.all()


def next_token_model():
    torch.manual_seed(3)
    model = ar.MaskedAR(ar.ARConfig(depth=2, width=64, heads=1, tokens=7, bits=6, classes=3, group_bits=2, causal=True))
    for layer in (model.head, model.modulation[1], model.final_modulation[1]):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model.eval()


def test_next_token_model_sees_the_class_and_the_past():
    model, labels, everything = next_token_model(), torch.tensor([1]), torch.ones(1, 7, dtype=torch.bool)
    bits = torch.rand(7, 6) > 0.5
    reach = []
    base = model(bits[None], labels, everything)[0]
    for place in range(7):
        other = bits.clone()
        other[place] ^= True
        reach.append((model(other[None], labels, everything)[0] - base).abs().flatten(1).amax(1) > 1e-6)
    assert torch.equal(torch.stack(reach), torch.ones(7, 7, dtype=torch.bool).triu(1))  # token j moves what follows it
    assert ((model(bits[None], labels + 1, everything)[0] - base).abs().flatten(1).amax(1) > 1e-6).all()
    assert not any("mask_embedding" in name for name, _ in model.named_parameters())


def test_next_token_loss_is_the_likelihood_of_the_sequence():
    model, bits, labels = next_token_model(), torch.rand(2, 7, 6) > 0.5, torch.tensor([0, 2])
    total = 0.0
    for length in range(1, 8):  # each token from its prefix alone
        logits = model(bits[:, :length], labels, torch.ones(2, length, dtype=torch.bool))[:, -1]
        values = (bits[:, length - 1].unflatten(-1, (3, 2)) * torch.tensor([1, 2])).sum(-1)
        total -= logits.log_softmax(-1).gather(-1, values[..., None]).sum().item()
    out = model.loss(bits, labels, torch.ones(2, 7, dtype=torch.bool), smoothing=0.0)
    assert out["nll"].item() == pytest.approx(total / (2 * 7 * 6), rel=1e-5)


def test_next_token_sampling_goes_from_left_to_right():
    model, labels = next_token_model(), torch.tensor([0, 2])
    for n, (bits, masked) in enumerate(model.generate_steps(labels, cfg=3.0, top_p=1e-6)):
        assert torch.equal(masked, (torch.arange(7) > n).expand(2, -1))
    assert n == 6
    both = [model(bits, each, masked) for each in (labels, torch.full_like(labels, 3))]
    scale = 1 + 2.0 * (torch.arange(7) + 1) / 7  # linear in the share predicted
    logits = both[1] + scale[:, None, None] * (both[0] - both[1])
    greedy = ar.index_to_bits(logits.argmax(-1), 2).flatten(-2)
    assert torch.equal(bits, greedy)  # prefix by prefix, it is what one pass over the finished sequence says
    for options in ({"steps": 3}, {"order": "confidence"}):
        with pytest.raises(ValueError, match="7 steps"):
            model.generate(labels, **options)


@pytest.mark.parametrize("flag, tokenizer, expected", [
    (None, False, False), (None, True, True), ("raster", False, True), ("global", True, False),
])
def test_the_transformer_follows_its_tokenizer_unless_told(flag, tokenizer, expected):
    args = train.parse_arguments(["--stage", "ar", *(("--order", flag) if flag else ())])
    assert train.ar_config(args, replace(semtok.PRESETS["tiny"], causal=tokenizer)).causal is expected


def test_a_whole_run_of_ablations_describes_itself(world, tmp_path):
    """Flags given once to --stage all go where they belong; sample.py needs none of them."""
    out = copy_run(world, tmp_path / "run", "standins")
    flags = ("--order", "raster", "--quantizer", "lfq", "--bit-groups", 8, "--no-contrast", "--perceptual", "resnet", "--cache")
    result = call("train.py", "--stage", "all", "--data", world[0], "--out", out, *flags, *STEPS)
    assert result.returncode == 0, result.stderr[-3000:]
    said = {name: json.loads(metadata(out / f"{name}.safetensors")["settings"]) for name in ("stage1", "stage2", "ar")}
    assert said == {
        "stage1": {"order": "raster", "quantizer": "lfq", "no_contrast": True},
        "stage2": {"no_contrast": True, "perceptual": "resnet"}, "ar": {"order": "raster", "bit_groups": 8},
    }
    tokenizer, model = semtok.load_semtok(str(out / "stage2.safetensors"))[0], ar.load_ar(str(out / "ar.safetensors"))[0]
    assert tokenizer.config.causal and tokenizer.config.quantizer == "lfq" and tokenizer.encoder.mask is not None
    assert model.config.causal and not model.config.spherical and model.config.group_bits == 3
    made = call("sample.py", "--class", 1, "--run", out, "--n", 2)
    assert made.returncode == 0 and Image.open(made.stdout.strip()).size == (2 * 96, 96 + 18), made.stderr
    sentence(call("sample.py", "--class", 1, "--run", out, "--steps", 4), "predicts the next token", "16 steps")
    sentence(call("sample.py", "--class", 1, "--run", out, "--order", "random"), "predicts the next token")
    sentence(call("sample.py", "--class", 1, "--run", out, "--compile"), "predicts the next token", "--compile")


@pytest.mark.parametrize("stage, flags, words", [
    ("0", "--no-distill", "stage 1 and 2"), ("ar", "--no-contrast", "stage 1 and 2"), ("2", "--order raster", "stage 1 and ar"),
    ("2", "--quantizer lfq", "to 2 with --from-scratch"), ("2", "--bits 12", "to 2 with --from-scratch"),
    ("ar", "--quantizer bsq", "stage 1"), ("1", "--perceptual lpips", "stage 2"), ("1", "--from-scratch", "stage 2"),
    ("1", "--freeze-encoder", "stage 2"), ("2", "--bit-groups 2", "stage ar"), ("1", "--ar-size XL --preset paper", "stage ar"),
    ("ar", "--cache", "stage 1 and 2"), ("ar", "--ar-size XL", "--preset paper"), ("2", "--from-scratch --freeze-encoder", "exclude"),
    ("1", "--quantizer vq", "invalid choice"), ("ar", "--bit-groups 0", "above 0"),
])
def test_flags_that_change_nothing_are_refused(stage, flags, words, tmp_path):
    sentence(call("train.py", "--stage", stage, "--out", tmp_path / "x", *flags.split()), words)
    assert not (tmp_path / "x").exists()


def test_commands_that_are_proposed_carry_the_flags(world):
    args = train.parse_arguments(["--stage", "1", "--no-distill", "--order", "raster", "--bits", "12"])
    assert train.command(args, "1") == "python train.py --stage 1 --no-distill --order raster --bits 12"
    assert train.command(args, "2") == "python train.py --stage 2 --no-distill"
    assert train.command(args, "ar") == "python train.py --stage ar --order raster"


# ------------------------------------------------------------------------------------------------------------- pictures


def read_back(picture, path, **options):
    picture.save(path, **options)
    return semtok.read_picture(str(path)).permute(1, 2, 0).numpy()


def test_pictures_of_every_mode(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (20, 30), dtype=np.uint8), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(read_back(Image.fromarray(grey), tmp_path / "l.png"), np.stack([grey] * 3, -1))
    assert np.array_equal(read_back(Image.fromarray(colour), tmp_path / "rgb.png"), colour)
    inks = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    by_ink = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(read_back(Image.frombytes("CMYK", (30, 20), inks.tobytes()), tmp_path / "cmyk.tif") - by_ink).max() <= 1
    palette = Image.fromarray(colour // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_back(palette, tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    alpha = np.concatenate([colour, grey[..., None]], -1)
    share = grey[..., None] / 255  # transparency is laid on white
    assert np.abs(read_back(Image.fromarray(alpha), tmp_path / "rgba.png") - (colour * share + 255 * (1 - share))).max() <= 1
    both = Image.merge("LA", [Image.fromarray(colour[..., 0]), Image.fromarray(grey)])
    assert np.abs(read_back(both, tmp_path / "la.png")[..., 0] - (colour[..., 0] * share[..., 0] + 255 * (1 - share[..., 0]))).max() <= 1
    hidden = Image.fromarray(colour[..., 0] // 2).convert("P")  # one colour of a palette is see-through
    shown = read_back(hidden, tmp_path / "hole.png", transparency=7)
    assert (shown[np.asarray(hidden) == 7] == 255).all() and (np.asarray(hidden) == 7).any()


@pytest.mark.parametrize("brightest", [65535, 200])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_become_eight_however_dark(tmp_path, kind, brightest):
    values = np.linspace(0, brightest, 600).astype(np.uint16).reshape(20, 30)
    shown = read_back(Image.fromarray(values), tmp_path / f"deep.{kind}")
    assert np.array_equal(shown[..., 0], (values / 257).round().astype(np.uint8))


@pytest.mark.parametrize("orientation, undo", [
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.transpose(1, 0, 2)), (6, lambda p: np.rot90(p, -1)), (7, lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
    (8, lambda p: np.rot90(p)),
])
def test_exif_rotation(tmp_path, orientation, undo):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_back(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif), undo(pixels))


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (150, 97), (33, 200), (20, 50), (131, 260)])
def test_shorter_side_by_boxes_then_bicubic_then_the_centre(tmp_path, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = pixels.astype(float)
    while min(want.shape[:2]) >= 64:  # a box: each pixel the mean of those whose centres it covers
        for axis in (0, 1):
            side = want.shape[axis]
            edges, centres = np.linspace(0, side, side // 2 + 1), np.arange(side) + 0.5
            cover = ((centres > edges[:-1, None]) & (centres <= edges[1:, None])).astype(float)
            want = np.moveaxis(np.tensordot(cover / cover.sum(1, keepdims=True), want, (1, axis)), 0, axis)
        want = want.round()
    scale = 32 / min(want.shape[:2])
    sides = [round(side * scale) for side in want.shape[:2]]
    shown = np.asarray(Image.fromarray(want.astype(np.uint8)).resize(sides[::-1], Image.Resampling.BICUBIC), int)
    top, left = (sides[0] - 32) // 2, (sides[1] - 32) // 2
    found = semtok.read_picture(str(tmp_path / "a.png"), 32).permute(1, 2, 0).numpy()
    assert found.shape == (32, 32, 3) and np.abs(found - shown[top : top + 32, left : left + 32]).max() <= 2


def test_ranks_share_every_epoch_and_resume_in_its_middle(monkeypatch):
    def seen(first, last, rank, count):
        monkeypatch.setattr(train, "ranks", lambda: (rank, count))
        return list(train.Schedule(50, 8, 7, first, last))

    alone = seen(0, 25, 0, 1)  # four epochs
    shared = [seen(0, 25, rank, 4) for rank in range(4)]
    assert [sum((share[step] for share in shared), []) for step in range(25)] == alone
    flat = [item for batch in alone for item in batch]
    for epoch in range(4):
        assert sorted(index for index, _ in flat[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    for stop in (1, 5, 13, 19):  # anywhere in an epoch, on any number of ranks
        assert [seen(stop, 25, rank, 2) for rank in range(2)] == [seen(0, 25, rank, 2)[stop:] for rank in range(2)]


def test_a_folder_too_large_for_memory_is_read_by_workers(world, tmp_path, monkeypatch):
    """The same weights, bit for bit, with pictures kept in memory and with pictures read by two processes as they come."""
    out = copy_run(world, tmp_path / "run", "standins")
    monkeypatch.setattr(train, "MEMORY", 0)
    arguments = ["--stage", "1", "--data", world[0], "--out", out, *STEPS, "--workers", 2]
    assert train.command_line([*map(str, arguments)]) == 0
    same_tensors(world[1] / "stage1.safetensors", out / "stage1.safetensors")


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(train, "PART", 10)  # of the 27 training pictures: three parts


def cached_stage(world, out, *flags, stage="1"):
    if not out.exists():
        copy_run(world, out, "standins", "stage1.safetensors")
    return make_stage(world, stage, "--cache", *flags, out=out)


def test_cached_features_are_those_of_the_step(world, tmp_path, small_parts):
    stage, plain = cached_stage(world, tmp_path / "run"), make_stage(world, "1")
    dataset = stage.open_dataset()
    assert len(dataset) == 27 and len(list((tmp_path / "run" / "features").iterdir())) == 3
    items = [(0, False), (0, True), (13, True), (26, False)]
    loaded = [torch.utils.data.default_collate([d[item] for item in items]) for d in (dataset, plain.open_dataset())]
    parts = [one.features(batch) for batch, one in zip(loaded, (stage, plain))]
    for cached, computed in zip(*parts):
        assert cached.dtype == torch.float32 and torch.allclose(cached, computed, atol=1e-5)
    assert [rows.shape for rows in dataset[0, True][2:]] == [(8, 8, 8), (64, 4, 4)]
    # stage 2 finds the same cache and makes nothing
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features").iterdir()}
    cached_stage(world, tmp_path / "run", stage="2").open_dataset()
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features").iterdir()}


def test_large_caches_hold_latents_in_half_precision(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EXACT_CACHE", 0)
    stage = cached_stage(world, tmp_path / "run")
    picture, _, latents = stage.open_dataset()[4, True]
    exact = stage.semtok.vae.encode(semtok.to_signed(picture[None]))[0]
    assert latents.dtype == torch.float16
    error = (latents.float() - exact).abs() / exact.abs().clamp_min(2**-14)  # below that float16 is coarser
    assert 0 < error.max() <= 2**-11 + 1e-5


def test_interrupted_caching_goes_on(world, tmp_path, small_parts, monkeypatch):
    whole = cached_stage(world, tmp_path / "whole").open_dataset()
    write, written = train.write_tensors, []

    def interrupted(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(train, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_stage(world, tmp_path / "run").open_dataset()
    assert sorted(os.listdir(tmp_path / "run" / "features")) == ["part-00000.safetensors", "part-00001.safetensors"]
    damaged = tmp_path / "run" / "features" / "part-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = []
    monkeypatch.setattr(train, "write_tensors", lambda path, *rest: again.append(os.path.basename(path)) or write(path, *rest))
    resumed = cached_stage(world, tmp_path / "run").open_dataset()
    assert again == ["part-00000.safetensors", "part-00002.safetensors"]
    for item in ((index, flip) for index in range(27) for flip in (False, True)):
        assert all(torch.equal(one, other) for one, other in zip(resumed[item][2:], whole[item][2:]))


def test_caching_holds_one_part_at_a_time(world, tmp_path, small_parts, monkeypatch):
    write, before, sizes = train.write_tensors, [], []

    def watched(path, tensors, *rest):
        assert all(reference() is None for reference in before[:-2])  # the loop still names the last part's two tensors
        sizes.append(len(tensors["latents"]))
        before.extend(weakref.ref(tensor) for tensor in tensors.values())
        write(path, tensors, *rest)

    monkeypatch.setattr(train, "write_tensors", watched)
    cached_stage(world, tmp_path / "run").open_dataset()
    assert sizes == [10, 10, 7]


def test_caches_are_mapped_not_read(tmp_path, monkeypatch):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("memory in use is read from Linux's /proc")
    path = tmp_path / "features" / "part-00000.safetensors"
    pictures = train.InMemory(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), [0] * 8, ["one"])
    about = {"format": "semtok-cache", "pictures": pictures.fingerprint(), "vae": "a"}
    train.write_tensors(str(path), {"latents": torch.zeros(8, 2, 2**20)}, about)  # 64 MiB
    job = train.Job(train.parse_arguments(["--stage", "1"]), torch.device("cpu"), pictures, pictures)
    start = resident()
    cache = train.Cache(str(path.parent), job, {"vae": "a"}, None)
    assert cache[3, True]["latents"].shape == (2**20,) and resident() - start < 8 * 2**20


def test_the_plan_of_a_cached_run_spares_the_encoder_of_the_vae():
    def runs(*flags):
        stage = train.planned(train.parse_arguments(["--stage", "1", *flags]))
        parts = train.measure_step(stage, 4).parts
        return {name: sum(parts[module][0] for module in modules) > 0 for name, modules in train.networks(stage).items()}

    plain, cached = runs(), runs("--cache")
    assert plain["VAE encoder"] and not cached["VAE encoder"] and plain | {"VAE encoder": False} == cached


@pytest.mark.parametrize("what", ["vae", "siglip", "pictures"])
def test_stale_caches_are_refused_and_made_again_on_request(world, tmp_path, small_parts, what):
    cached_stage(world, tmp_path / "run").open_dataset()
    parts = sorted((tmp_path / "run" / "features").iterdir())
    times, flags = [part.stat().st_mtime_ns for part in parts], []
    if what == "pictures":  # one pixel of one of them
        pictures = world[2].pictures.clone()
        pictures[13, 0, 0, 0] ^= 1
        world = *world[:2], train.InMemory(pictures, world[2].labels, world[2].classes)
    else:
        file = world[1] / "standins" / ("vae.safetensors" if what == "vae" else "siglip/model.safetensors")
        source = mmdit.TensorFiles(str(file))
        tensors = {name: source.get(name).clone() for name in source.shapes}
        tensors["encoder.conv_in.bias" if what == "vae" else "vision_model.post_layernorm.bias"][0] += 0.1
        semtok.write_tensors(str(tmp_path / what / "model.safetensors"), tensors, source.metadata)
        (tmp_path / what / "config.json").write_text('{"num_attention_heads": 2}')
        flags = [f"--{what}", tmp_path / what / "model.safetensors"]
    with pytest.raises(mmdit.UserError, match=f"features is stale, its {what} being others than now.*--overwrite"):
        cached_stage(world, tmp_path / "run", *flags).open_dataset()
    assert times == [part.stat().st_mtime_ns for part in parts]
    cached_stage(world, tmp_path / "run", *flags, "--overwrite").open_dataset()
    assert all(part.stat().st_mtime_ns > time for part, time in zip(parts, times))


def test_large_folders_are_known_by_names_sizes_and_times(world, tmp_path):
    data = make_pictures(tmp_path / "data", 3)
    source = train.PictureFolder(str(data), "train", 32)
    first = source.fingerprint()
    assert first == train.PictureFolder(str(data), "train", 32).fingerprint()
    os.symlink(tmp_path / "nowhere.png", data / "bird" / "zz.png")  # damaged pictures are skipped, not stumbled over
    linked = train.PictureFolder(str(data), "train", 32).fingerprint()
    os.utime(data / "bird" / "002.png", ns=(1, 1))
    touched = train.PictureFolder(str(data), "train", 32).fingerprint()
    assert len({first, linked, touched, train.PictureFolder(str(data), "train", 64).fingerprint()}) == 4


def tokens_of(config, world, out):
    torch.manual_seed(0)
    tokenizer = semtok.SemTok(config, semtok.load_vae(str(world[1] / "standins" / "vae.safetensors"))).eval()
    return tokenizer, train.tokenise(tokenizer, "1234", make_job(world, "--stage", "ar", out=out))


def test_tokens_of_imagenet_take_one_and_a_half_gigabytes(world, tmp_path):
    _, tokens = tokens_of(replace(semtok.PRESETS["tiny"], tokens=256, bits=18), world, tmp_path / "run")
    per_picture = sum(rows[0].numel() * rows.element_size() for rows in tokens.cache.parts[0].values())
    assert per_picture == 2 * 256 * 18 / 8 + 2 * 4  # both flips, eight bits a byte, and a label each
    assert 1_281_167 * per_picture == pytest.approx(1.5e9, rel=0.02)
    file = (tmp_path / "run" / "tokens" / "part-00000.safetensors").stat().st_size
    assert file - 27 * per_picture < 1024  # the header, once for each 1024 pictures


def test_tokens_are_those_of_both_flips_and_know_their_tokenizer(world, tmp_path, small_parts):
    tokenizer, tokens = tokens_of(semtok.PRESETS["tiny"], world, tmp_path / "run")
    pictures = semtok.to_signed(world[2].pictures)
    right = total = 0
    for flip, shown in ((False, pictures), (True, pictures.flip(-1))):
        bits = torch.stack([tokens[index, flip][0] for index in range(27)])
        right += (bits == (tokenizer.encode(shown) > 0)).sum().item()
        total += bits.numel()
    assert right >= total - 2 and [tokens[index, True][1] for index in range(27)] == world[2].labels  # sums in another order
    job = make_job(world, "--stage", "ar", out=tmp_path / "run")
    with pytest.raises(mmdit.UserError, match="tokens is stale, its tokenizer"):
        train.tokenise(tokenizer, "5678", job)
