"""The loaders and networks against the reference libraries and against formulations written here.

Random weights are written by diffusers, transformers, torchvision and lpips, read by our loaders, and the
OUTPUTS are compared in float32. What has no library to compare with (discriminator, AR blocks) is computed a
second time in plain loops. `-m full` runs the real sizes. The libraries: tests/requirements.txt.
"""

import ast
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ar  # noqa: E402
import bsq  # noqa: E402
import fid  # noqa: E402
import mmdit  # noqa: E402
import semtok  # noqa: E402
from conftest import import_torchvision  # noqa: E402
from mmdit import UserError  # noqa: E402

SUMS = 1e-5  # nothing but the order of sums differs
SAME = 1e-4  # a picture resized by other code


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    """Everything here is a forward pass."""
    with torch.no_grad():
        yield


def library(name):
    """diffusers or transformers, silent; or a skip."""
    import_torchvision()
    module = pytest.importorskip(name)
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


diffusers = pytest.fixture(lambda: library("diffusers"), scope="module", name="diffusers")
transformers = pytest.fixture(lambda: library("transformers"), scope="module", name="transformers")


def agree(ours, theirs, limit, what=""):
    """The largest difference, as a share of the largest value, is under the limit."""
    assert ours.shape == theirs.shape
    error = ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
    assert theirs.double().std() > 1e-3, "the reference's output is constant: nothing was compared"
    assert error < limit, f"{what}: relative error {error:.1e}, allowed {limit:.0e}"


def same(weights, module):
    """The state dict is the module's: its names, and its values to the last bit."""
    expected = module.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def scramble(module, seed=0):
    """Random weights under which every parameter matters: no zero biases, no unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)  # a norm's gain
        else:
            parameter.copy_(0.1 * noise)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def shrink(*layers):
    """Make what leaves these layers so small that the epsilon of the norm behind them shows."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter.mul_(0.01)


def random(*shape, seed=1):
    """A reproducible normal tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count, height, width=None, seed=2):
    """Pictures (count, 3, height, width) in [-1, 1], no two places alike."""
    shape = (count, 3, height, width or height)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def refusal(call, *arguments, needles=()):
    """The UserError of a call: one sentence for a person that says each of the needles."""
    with pytest.raises((UserError, fid.UserError)) as error:
        call(*map(str, arguments))
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".")
    for needle in needles:
        assert str(needle) in text, f"{needle!r} is not in: {text}"
    return text


# ------------------------------------------------------------------------------------------------- pictures


def test_only_raster_files_are_opened(tmp_path):
    (tmp_path / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.png")  # would wait for a writer for ever
    for name in ("postscript.png", "pipe.png", "absent.png", "."):
        refusal(fid.read_picture, tmp_path / name, needles=[tmp_path / name, "a picture"])


@pytest.mark.parametrize("height, width", [(2, 30_000), (20_000_000, 1), (33, 900)])
def test_thin_pictures_are_cut_before_they_are_enlarged(tmp_path, height, width, monkeypatch):
    """Resized as a whole, 2 x 30,000 would take 3 GB at 256."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[max(0, height // 2 - 40) : height // 2 + 40, max(0, width // 2 - 40) : width // 2 + 40] = 200
    Image.fromarray(pixels).save(tmp_path / "thin.png")
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda p, size, *a: sizes.append(size) or resize(p, size, *a))
    found = fid.read_picture(str(tmp_path / "thin.png"), 64)
    assert found.shape == (64, 64, 3) and found.mean() > 195
    assert max(map(math.prod, sizes)) <= 16 * 64 * 64


# -------------------------------------------------------------------------------------------------- the VAE

VAE_CHANNELS = (128, 128, 256, 256)


@pytest.fixture(scope="module")
def vae_files(diffusers, tmp_path_factory):
    """diffusers' AutoencoderKL in SD3.5's form, and a folder with its weights in every layout."""
    levels = len(VAE_CHANNELS)
    reference = scramble(diffusers.AutoencoderKL(
        block_out_channels=VAE_CHANNELS, layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305,
    ))
    folder = tmp_path_factory.mktemp("vae")
    shrink(reference.encoder.conv_in, reference.decoder.conv_in)
    reference.save_pretrained(folder / "model" / "vae")
    save_file(reference.state_dict(), folder / "alone_diffusers.safetensors")
    # The single file by our own table of names; the library's converter judges it below.
    weights, shapes = reference.state_dict(), semtok.VAE(semtok.VAEConfig(VAE_CHANNELS)).state_dict()
    single = {k: weights[semtok._vae_diffusers_name(k, levels)].reshape(v.shape) for k, v in shapes.items()}
    save_file(single, folder / "alone.safetensors")
    rest = ("model.diffusion_model.final_layer.bias", "text_encoders.clip_l.logit_scale", "model_sampling.s")
    rest = {name: torch.zeros(1) for name in rest}
    save_file({f"first_stage_model.{k}": v for k, v in single.items()} | rest, folder / "all.safetensors")
    return reference, folder


def test_our_single_file_vae_is_what_the_library_converts_back(vae_files):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    reference, folder = vae_files
    same(convert_ldm_vae_checkpoint(load_file(folder / "all.safetensors"), dict(reference.config)), reference)


VAE_LAYOUTS = ["model", "model/vae", *(f"{name}.safetensors" for name in ("all", "alone", "alone_diffusers"))]


@pytest.mark.parametrize("layout", VAE_LAYOUTS)
def test_vae_equals_diffusers(vae_files, layout):
    reference, folder = vae_files
    ours = semtok.load_vae(str(folder / layout))
    assert ours.config == semtok.VAEConfig(VAE_CHANNELS, 2, 16)
    x, latents = pictures(2, 40, 64), random(2, 16, 5, 8)
    posterior = reference.encode(x).latent_dist
    agree(ours.encoder(x), posterior.parameters, SUMS, "VAE moments")
    agree(ours.encode(x), (posterior.mode() - 0.0609) * 1.5305, SUMS, "VAE encode")
    agree(ours.decode(latents), reference.decode(latents / 1.5305 + 0.0609).sample, SUMS, "VAE decode")


def test_a_vae_of_the_same_shapes_with_other_constants_is_refused(vae_files, tmp_path):
    """FLUX's VAE: only the config.json beside it tells it from SD3's."""
    shutil.copytree(vae_files[1] / "model/vae", tmp_path / "flux/vae")
    config = tmp_path / "flux/vae/config.json"
    config.write_text(json.dumps({"shift_factor": 0.1159, "scaling_factor": 0.3611}))
    for path in ("flux", "flux/vae", "flux/vae/diffusion_pytorch_model.safetensors"):
        refusal(semtok.load_vae, tmp_path / path, needles=["0.1159", "0.3611", "0.0609", "1.5305", "needed"])
    config.write_text(json.dumps({"num_attention_heads": 12}))  # another model's config says nothing
    semtok.load_vae(str(tmp_path / "flux"), device="meta")


# --------------------------------------------------------------------------------------------------- SigLIP

SIGLIP = {
    "hidden_size": 60, "intermediate_size": 116, "num_hidden_layers": 3, "num_attention_heads": 5,
    "image_size": 48, "patch_size": 8,
}


def siglip_tower(transformers, **sizes):
    """transformers' vision tower without text, all weights random."""
    reference = scramble(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP | sizes)))
    shrink(reference.embeddings)
    return reference


def siglip_agrees(path, reference, side=48):
    """The tower read from `path` gives the reference's patch features. Returns it."""
    ours, x = semtok.load_siglip(str(path)), pictures(2, side)
    theirs = reference(pixel_values=x).last_hidden_state  # (B, grid^2, width), after post_layernorm
    agree(ours(x).flatten(2).transpose(1, 2), theirs, SUMS, "SigLIP features")
    return ours


def test_siglip_vision_files_equal_transformers(transformers, tmp_path):
    """With and without the prefix, as folder, file and shards; pictures of another size with antialias."""
    reference = siglip_tower(transformers)
    reference.save_pretrained(tmp_path / "plain")
    weights = load_file(tmp_path / "plain/model.safetensors")
    assert not any(name.startswith("vision_model.") for name in weights)
    ours = siglip_agrees(tmp_path / "plain", reference)
    assert ours.config == semtok.SigLIPConfig(60, 3, 5, 116, 8, 6)
    siglip_agrees(tmp_path / "plain/model.safetensors", reference)  # its config.json stands beside it
    positions = {"embeddings.position_ids": torch.arange(36)[None]}  # older files keep this buffer too
    shutil.copytree(tmp_path / "plain", tmp_path / "prefix")
    weights = {f"vision_model.{name}": tensor for name, tensor in (weights | positions).items()}
    save_file(weights, tmp_path / "prefix/model.safetensors")
    siglip_agrees(tmp_path / "prefix", reference)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list(tmp_path.glob("shards/*-of-*.safetensors"))) > 2
    siglip_agrees(tmp_path / "shards", reference)

    def resized(channel):  # Pillow's triangle filter, on floats
        return np.asarray(Image.fromarray(channel.numpy()).resize((48, 48), Image.Resampling.BILINEAR))

    x = pictures(2, 112)
    small = torch.tensor(np.stack([[resized(channel) for channel in picture] for picture in x]))
    theirs = reference(pixel_values=small).last_hidden_state
    agree(ours(x).flatten(2).transpose(1, 2), theirs, SAME, "SigLIP, resized")


@pytest.mark.parametrize("vocabulary", [32000, 256000])  # SigLIP; SigLIP 2
def test_siglip_with_text_tower_equals_transformers(transformers, tmp_path, vocabulary):
    text = {"hidden_size": 60, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
            "projection_size": 60, "vocab_size": vocabulary // 100}
    config = transformers.SiglipConfig(vision_config=SIGLIP, text_config=text)
    reference = scramble(transformers.SiglipModel(config))
    reference.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"logit_scale", "logit_bias"} <= names and any(name.startswith("text_model.") for name in names)
    siglip_agrees(tmp_path, reference.vision_model)


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1152, 16)])
def test_siglip_heads_of_published_widths_need_no_config(transformers, tmp_path, width, heads):
    patch, hidden = (14, 4304) if width == 1152 else (16, 256)
    reference = siglip_tower(
        transformers, hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, patch_size=patch,
        image_size=2 * patch, intermediate_size=hidden,
    )
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert siglip_agrees(tmp_path, reference, 2 * patch).config.heads == heads
    for config in (  # the hub's, which lists only what differs from the defaults; other models'
        {"model_type": "siglip", "vision_config": {"image_size": 2 * patch}},
        {"_class_name": "SD3Transformer2DModel", "num_attention_heads": 24, "image_size": 46},
        {"model_type": "clip_vision_model", "num_attention_heads": 24, "image_size": 46},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert siglip_agrees(tmp_path, reference, 2 * patch).config.heads == heads


def test_siglip_pixels_that_no_patch_covers(transformers, tmp_path):
    """As in so400m-patch14-384, whose 27 patches leave 6 of 384 pixels over: pictures keep their 384."""
    reference = siglip_tower(transformers, image_size=46)  # 5 patches of 8
    reference.save_pretrained(tmp_path)
    ours = siglip_agrees(tmp_path, reference, 46)
    assert (ours.config.grid, ours.side) == (5, 46)
    published = siglip_tower(
        transformers, hidden_size=384, num_attention_heads=6, intermediate_size=8, num_hidden_layers=1,
        patch_size=14, image_size=384,
    )
    published.save_pretrained(tmp_path / "published")
    (tmp_path / "published/config.json").unlink()
    assert siglip_agrees(tmp_path / "published", published, 384).side == 384


def test_siglip_of_unknown_width_asks_for_its_config(transformers, tmp_path):
    siglip_tower(transformers).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    refusal(semtok.load_siglip, tmp_path, needles=["60 wide", "config.json"])
    for content in ("<html>Sign in</html>", "[1, 2]", "{"):
        (tmp_path / "config.json").write_text(content)
        refusal(semtok.load_siglip, tmp_path, needles=["config.json is not the JSON"])


# ------------------------------------------------------------------------------------------ SD3.5's decoder

TINY = semtok.PRESETS["tiny"]
CONFIG = replace(
    TINY, tokens=7, bits=10, decoder_depth=4, decoder_width=128, decoder_heads=4, decoder_dual_depth=2,
    vae=replace(TINY.vae, latent_channels=16),
)
NEW = {"token_embedder.weight", "token_embedder.bias", "mask_tokens"}  # what SD3.5 does not have


def sd3_transformer(diffusers, config=CONFIG, **sizes):
    """diffusers' SD3 transformer in SD3.5-Medium's form at a config's sizes; its position table is zero."""
    width, heads = config.decoder_width, config.decoder_heads
    reference = scramble(diffusers.SD3Transformer2DModel(**dict(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=config.decoder_depth,
        attention_head_dim=width // heads, num_attention_heads=heads, joint_attention_dim=40,
        caption_projection_dim=width, pooled_projection_dim=24, pos_embed_max_size=12,
        dual_attention_layers=tuple(range(config.decoder_dual_depth)), qk_norm="rms_norm",
    ) | sizes))
    reference.pos_embed.pos_embed.zero_()
    first = reference.transformer_blocks[0].attn
    shrink(reference.pos_embed.proj, reference.context_embedder, first.to_k, first.add_q_proj)
    return reference


@pytest.fixture(scope="module")
def sd35_files(diffusers, tmp_path_factory):
    """The reference, and a folder with its weights in every layout."""
    reference, folder = sd3_transformer(diffusers), tmp_path_factory.mktemp("sd35")
    reference.save_pretrained(folder / "model" / "transformer")
    weights, single = reference.state_dict(), {"pos_embed": reference.pos_embed.pos_embed.clone()}
    for name in sd35_shapes(CONFIG).keys() - single.keys():  # our own table of names; the library judges it
        keys, make = mmdit._from_diffusers(name, CONFIG.decoder_depth - 1)
        single[name] = make(*(weights[key] for key in keys)).clone()
    others = ("first_stage_model.decoder.conv_in.weight", "text_encoders.clip_l.transformer.text_model.bias",
              "model.model_sampling.sigmas")
    everything = {f"model.diffusion_model.{name}": tensor for name, tensor in single.items()}
    save_file(everything | {name: torch.zeros(3) for name in others}, folder / "sd3.5_medium.safetensors")
    save_file(single, folder / "no_prefix.safetensors")
    return reference, folder


def sd35_shapes(config):
    """The single file's transformer at a config's sizes: name without prefix -> shape."""
    with torch.device("meta"):
        decoder = semtok.Decoder(config)
    width = config.decoder_width
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items() if name not in NEW}
    shapes |= {"y_embedder.mlp.0.weight": (width, 2048), "y_embedder.mlp.2.weight": (width, width)}
    shapes |= {"y_embedder.mlp.0.bias": (width,), "y_embedder.mlp.2.bias": (width,)}
    shapes |= {"context_embedder.weight": (width, 4096), "context_embedder.bias": (width,)}
    return {"pos_embed": (1, 384 * 384, width)} | shapes


def fresh_decoder(path, config=CONFIG):
    """A stage-I decoder just loaded from `path`."""
    with torch.device("meta"):
        decoder = semtok.Decoder(config)
    return mmdit.load_sd35(decoder, str(path))


def unrotated(decoder, grid):
    """Rotation by zero: SD3.5 has none. An oblong grid keeps rows and columns apart."""
    decoder.grid, head_dim = grid, CONFIG.decoder_width // CONFIG.decoder_heads
    for rope, length in ((decoder.x_rope, math.prod(grid)), (decoder.z_rope, CONFIG.tokens)):
        rope.table = torch.stack([torch.ones(length, head_dim), torch.zeros(length, head_dim)])
    return decoder


def shared_context(decoder, reference):
    """Text features for the reference which our decoder takes as codes and embeds in the same way."""
    decoder.token_embedder = reference.context_embedder
    return random(2, CONFIG.tokens, 40, seed=3)


def test_our_single_file_transformer_is_what_the_library_converts_back(sd35_files):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    reference, folder = sd35_files
    single = load_file(folder / "sd3.5_medium.safetensors")
    single = {name: tensor for name, tensor in single.items() if name.startswith("model.diffusion_model.")}
    same(convert_sd3_transformer_checkpoint_to_diffusers(single), reference)


LAYOUTS = ["model", "model/transformer", "sd3.5_medium.safetensors", "no_prefix.safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_decoder_is_minus_the_prior_of_sd35(sd35_files, layout):
    """Times, sign, patch order, halves of AdaLN, folded text embedder at once: x_v - eps = -(eps - x_v)."""
    reference, folder = sd35_files
    decoder = unrotated(fresh_decoder(folder / layout), (3, 5))
    text = shared_context(decoder, reference)
    noisy, t = random(2, 16, 6, 10), torch.tensor([0.13, 0.94])
    theirs = reference(noisy, text, torch.zeros(2, 24), 1000 * t, return_dict=False)[0]  # no pooled text
    agree(decoder(text, noisy, t), -theirs, SUMS, "decoder velocity")


def test_fresh_refiner_starts_as_the_prior_at_time_one_on_little_noise(sd35_files):
    """Stage II's mask tokens start as the pretrained embedder's view of a tenth of a noise sample; t = 1."""
    reference, folder = sd35_files
    config = replace(CONFIG, image_size=48)  # latents of 12 x 12, patches of 2: a 6 x 6 grid
    decoder = unrotated(fresh_decoder(folder / "model", config), (6, 6))
    model = semtok.SemTok(config, decoder=decoder)
    torch.manual_seed(5)
    model.start_refiner()
    torch.manual_seed(5)
    noise = 0.1 * torch.randn(1, 16, 12, 12).expand(2, -1, -1, -1)
    text = shared_context(decoder, reference)
    theirs = reference(noise, text, torch.zeros(2, 24), torch.full((2,), 1000.0), return_dict=False)[0]
    agree(model.refine(text), -theirs, SUMS, "refiner")


def test_all_layouts_give_the_same_decoder(sd35_files, tmp_path):
    """Bit for bit, but for the one bias that is computed: its last bit may differ."""
    reference, folder = sd35_files
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="1MB")
    assert len(list(tmp_path.glob("transformer/*-of-*.safetensors"))) > 2
    first, *others = [fresh_decoder(folder / layout).state_dict() for layout in (*LAYOUTS, tmp_path)]
    for other in others:
        for name in first.keys() - NEW - {"t_embedder.mlp.2.bias"}:
            assert torch.equal(first[name], other[name]), name
        agree(other["t_embedder.mlp.2.bias"], first["t_embedder.mlp.2.bias"], 1e-6)
    assert all(first[name].isfinite().all() for name in NEW) and first["mask_tokens"].std() > 0


def test_a_tokenizer_in_half_precision_is_the_same_function():
    """Cast as a whole, it takes float32 pictures and noise as before; bfloat16 has 8 bits."""
    model = scramble(semtok.SemTok(TINY))
    for block in model.decoder.joint_blocks:  # AdaLN as small as early in training: roundings do not pile up
        for stream in (block.x_block, block.context_block):
            shrink(stream.adaLN_modulation[1])
    x = pictures(2, 32)
    codes = bsq.bits_to_codes(random(2, TINY.tokens, TINY.bits) > 0)
    whole = model.refine(codes), model.sample(codes, 3, generator=torch.Generator().manual_seed(0))
    model.bfloat16()
    half = model.refine(codes), model.sample(codes, 3, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(half, whole):
        agree(ours.float(), theirs, 0.03, "latents in bfloat16")
    assert model.encode(x).shape == codes.shape and model.decode(half[0]).dtype == torch.bfloat16


# ------------------------------------------------- ResNet-50 against torchvision (LPIPS: see test_fid.py)


def test_resnet50_logits_equal_torchvision(tmp_path):
    torchvision = import_torchvision()
    reference, transforms = scramble(torchvision.models.resnet50(weights=None)), torchvision.transforms
    weights = reference.state_dict()
    torch.save(weights, tmp_path / "resnet50.pth")
    save_file(weights, tmp_path / "resnet50.safetensors")
    older = {name: weights[name] for name in weights if "num_batches" not in name}  # files from before 2018
    torch.save(older, tmp_path / "older.pth")
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for file, side in (("resnet50.pth", 224), ("older.pth", 224), ("resnet50.safetensors", 256)):
        ours, x = fid.load_network(semtok.ResNet, tmp_path / file, "ResNet-50"), pictures(2, side)
        small = transforms.functional.resize((x + 1) / 2, [224, 224], antialias=True)  # bilinear
        agree(ours(x), reference(normalise(small)), SUMS if side == 224 else SAME, "ResNet-50 logits")
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    torch.save(weights | {"conv1.weight": torch.tensor(0.0)}, tmp_path / "scalar.pth")
    refusal(lambda path: fid.load_network(semtok.ResNet, path, "a ResNet"), tmp_path / "scalar.pth",
            needles=["is not a ResNet", "conv1.weight"])


# ---------------------------------------------------------------------------------- formulations of our own


def test_discriminator_equals_loops_and_has_the_widths_of_the_paper():
    ours = scramble(semtok.Discriminator(base=128, stages=2, map_size=4))
    weights = ours.state_dict()

    def convolve(y, name, padding):
        return F.conv2d(y, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    x = pictures(2, 36)
    y = F.leaky_relu(convolve(x, "conv_in", 2), 0.1)
    for stage in range(2):
        y = F.pad(convolve(y, f"convs.{stage}", 1), [1, 1, 1, 1])
        side = (y.shape[-1] - 2) // 2
        taps = [tap / 8 for tap in (1, 3, 3, 1)]  # along rows, then along columns
        y = sum(tap * y[:, :, k : k + 2 * side : 2] for k, tap in enumerate(taps))
        y = sum(tap * y[:, :, :, k : k + 2 * side : 2] for k, tap in enumerate(taps))
        y = F.group_norm(y, 32, weights[f"norms.{stage}.weight"], weights[f"norms.{stage}.bias"])
        y = F.leaky_relu(y, 0.1)
    bounds = [(i * 9 // 4, -(-(i + 1) * 9 // 4)) for i in range(4)]  # 9 x 9 to 4 x 4: windows that overlap
    y = torch.stack([y[:, :, a:b, c:d].amax((2, 3)) for a, b in bounds for c, d in bounds], -1)
    theirs = convolve(F.leaky_relu(convolve(y.unflatten(-1, (4, 4)), "mix", 0), 0.1), "conv_out", 2)
    agree(ours(x), theirs, SUMS, "discriminator")
    with torch.device("meta"):
        ours = semtok.Discriminator()
    shapes = [tuple(conv.weight.shape[:2]) for conv in (ours.conv_in, *ours.convs, ours.mix, ours.conv_out)]
    assert shapes == [(128, 3), (128, 128), (256, 128), (512, 256), (1024, 512), (1024, 1024), (1, 1024)]
    assert [norm.num_groups for norm in ours.norms] == [32] * 4 and ours.map_size == 16


def two_ranks(rank, port, folder):
    """What one of two processes makes of the functions over ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    half, weight = random(2, 8, 6)[rank], random(6, 6, seed=3).requires_grad_()
    quantizer = bsq.BSQ(6, 3)
    loss = quantizer.entropy_loss(quantizer(half @ weight)[1])["entropy_loss"]
    loss.backward()
    torch.distributed.all_reduce(weight.grad)
    with torch.no_grad():
        mean = bsq.mean_over_ranks(loss)
    rows = bsq.gather(torch.tensor([[rank]]))
    save_file({"loss": mean, "gradient": weight.grad / 2, "rows": rows}, folder / f"{rank}.safetensors")
    assert bsq.ranks() == (rank, 2)
    torch.distributed.destroy_process_group()


def test_the_entropy_loss_of_two_ranks_is_that_of_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (port, tmp_path), nprocs=2)
    with torch.enable_grad():
        weight, quantizer = random(6, 6, seed=3).requires_grad_(), bsq.BSQ(6, 3)
        loss = quantizer.entropy_loss(quantizer(random(2, 8, 6).flatten(0, 1) @ weight)[1])["entropy_loss"]
        loss.backward()
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
        agree(found["gradient"], weight.grad, SUMS, "gradient")
        assert found["rows"].flatten().tolist() == [0, 1]
    assert bsq.ranks() == (0, 1) and bsq.mean_over_ranks(weight) is weight


def slow_ar_block(weights, x, modulation, heads):
    """A LlamaGen block with shared AdaLN and qk-norm, one head at a time, rotations as complex numbers."""
    def normed(y, name):
        return F.rms_norm(y, y.shape[-1:], weights[f"{name}.weight"], eps=1e-6)

    def rotated(y):  # channels i and i + head_dim/2 are a number, turned by position 10000^(-2i/head_dim)
        half = y.shape[-1] // 2
        angles = torch.arange(y.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        turned = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], -1)

    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + weights["table"]).transpose(0, 1)[:, :, None]
    y = normed(x, "attention_norm") * (1 + scale1) + shift1
    queries, keys, values = (y @ weights["attention.wqkv.weight"].T).chunk(3, -1)
    out = []
    for q, k, v in zip(*(part.chunk(heads, -1) for part in (queries, keys, values))):
        q, k = rotated(normed(q, "attention.q_norm")), rotated(normed(k, "attention.k_norm"))
        out.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)  # every place sees every other
    x = x + gate1 * (torch.cat(out, -1) @ weights["attention.wo.weight"].T)
    y = normed(x, "ffn_norm") * (1 + scale2) + shift2
    gate, up = (y @ weights[f"feed_forward.w{i}.weight"].T for i in (1, 3))
    return x + gate2 * (F.silu(gate) * up @ weights["feed_forward.w2.weight"].T)


@pytest.mark.parametrize("group_bits", [1, 5])
def test_masked_ar_equals_one_written_out(group_bits):
    config = ar.ARConfig(depth=3, width=96, heads=3, tokens=9, bits=10, classes=4, group_bits=group_bits)
    model = scramble(ar.MaskedAR(config))
    shrink(model.token_embedding, model.class_embedding)  # so that the norms' epsilons show
    weights = model.state_dict()
    bits, masked = random(3, 9, 10) > 0, random(3, 9, seed=8) > 0
    labels = torch.tensor([0, 2, 4])  # 4: no class
    codes = torch.where(bits, 1.0, -1.0) / math.sqrt(10)
    known = codes @ weights["token_embedding.weight"].T + weights["token_embedding.bias"]
    tokens = torch.where(masked[..., None], weights["mask_embedding"], known)
    classes = weights["class_embedding.weight"][labels]
    x = torch.cat([classes[:, None], tokens], 1)

    def modulation(name):
        return F.silu(classes) @ weights[f"{name}.1.weight"].T + weights[f"{name}.1.bias"]

    for block in model.blocks:
        x = slow_ar_block(block.state_dict(), x, modulation("modulation").view(3, 6, 96), 3)
    shift, scale = modulation("final_modulation")[:, None].chunk(2, -1)
    x = F.rms_norm(x[:, 1:], (96,), weights["norm.weight"], eps=1e-6) * (1 + scale) + shift
    logits = x @ weights["head.weight"].T + weights["head.bias"]
    agree(model(bits, labels, masked), logits.view(3, 9, 10 // group_bits, 2**group_bits), SUMS, "masked AR")


# ---------------------------------------------------------------------------------------------- wrong files


LOADERS = {"SD3.5-Medium": fresh_decoder, "the VAE of SD3": semtok.load_vae, "SigLIP": semtok.load_siglip}


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("kind, key", {
    "a Stable Diffusion 1, 2 or XL U-Net": "model.diffusion_model.input_blocks.0.0.weight",
    "a SemTok tokenizer": "encoder.joint_blocks.0.x_block.attn.qkv.weight",
    "an unknown file (keys such as fc.bias)": "fc.bias",
}.items())
def test_a_file_of_the_wrong_kind_gets_one_sentence(tmp_path, wanted, kind, key):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(2)}, path)
    refusal(LOADERS[wanted], path, needles=[path, kind, wanted, "needed"])


def test_published_forms_that_resemble_the_right_ones_are_told_apart(diffusers, transformers, tmp_path):
    """What the libraries themselves write for the neighbours of the models that we want."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    naflex = transformers.Siglip2VisionConfig(**small, patch_size=8, num_patches=4)
    text = transformers.SiglipTextConfig(**small, vocab_size=50, projection_size=32)
    clip = transformers.CLIPVisionConfig(**small, patch_size=8, image_size=16)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32), cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )
    narrow = replace(CONFIG, decoder_width=32, decoder_heads=2)
    large = sd3_transformer(diffusers, narrow, dual_attention_layers=(), num_layers=38)
    decoder, vae, siglip = LOADERS
    for kind, wanted, model in (
        ("a diffusers U-Net", decoder, unet),
        ("a FLUX transformer", decoder, flux),
        ("SD3-Medium", decoder, sd3_transformer(diffusers, dual_attention_layers=(), qk_norm=None)),
        ("SD3.5-Large", decoder, large),
        ("scaling_factor 0.18215", vae, diffusers.AutoencoderKL(latent_channels=4)),  # the VAE of SD 1 and 2
        ("no NaFlex", siglip, transformers.Siglip2VisionModel(naflex)),
        ("a text model", siglip, transformers.SiglipTextModel(text)),
        ("a CLIP vision model", siglip, transformers.CLIPVisionModel(clip)),
    ):
        folder = tmp_path / re.sub(r"\W", "", kind)
        model.save_pretrained(folder)
        refusal(LOADERS[wanted], folder, needles=[folder, kind, wanted, "needed"])
    (tmp_path / "scaling_factor018215" / "config.json").unlink()
    text = refusal(semtok.load_vae, tmp_path / "scaling_factor018215")
    assert re.search("unexpected.* post_quant_conv.bias", text)


@pytest.mark.parametrize("wanted", LOADERS)
def test_damaged_and_missing_files_get_one_sentence(sd35_files, tmp_path, wanted, monkeypatch):
    load, file = LOADERS[wanted], tmp_path / "model.safetensors"
    whole = (sd35_files[1] / "sd3.5_medium.safetensors").read_bytes()
    for content, told in (
        (whole[: len(whole) // 2], "truncated"),
        (whole[:100], "truncated"),
        (b"", "truncated"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>" * 9, "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5107104168\n", "git-lfs pointer"),
        (b"PK\x03\x04" + bytes(400), "pickled"),
    ):
        file.write_bytes(content)
        refusal(load, file, needles=[file, told])
    (tmp_path / "empty").mkdir()
    refusal(load, tmp_path / "empty", needles=[tmp_path / "empty", "no .safetensors file"])
    refusal(load, tmp_path / "absent", needles=[tmp_path / "absent", "does not exist"])
    monkeypatch.setattr(os, "access", lambda *_: False)  # who runs the tests may be allowed everything
    refusal(load, file, needles=[file, "may not be read"])


def test_two_copies_in_one_folder_are_not_chosen_between(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({"encoder.conv_in.weight": torch.zeros(2)}, path)
    refusal(semtok.load_vae, tmp_path, needles=[*paths, "both hold encoder.conv_in.weight"])


def test_every_missing_unexpected_and_misshapen_key_is_named(sd35_files, vae_files, transformers, tmp_path):
    siglip_tower(transformers).save_pretrained(tmp_path)
    single, vae = "model.diffusion_model.", "first_stage_model."
    for load, file, prefix, missing, misshapen in (  # a loader, its file, keys that go and get too short
        (fresh_decoder, sd35_files[1] / "sd3.5_medium.safetensors", single, "t_embedder.mlp.0.bias",
         "joint_blocks.1.x_block.attn2.ln_q.weight"),
        (fresh_decoder, sd35_files[1] / "model/transformer/diffusion_pytorch_model.safetensors", "",
         "transformer_blocks.2.attn.add_k_proj.bias", "transformer_blocks.0.attn.to_v.weight"),
        (fresh_decoder, sd35_files[1] / "no_prefix.safetensors", "",
         "joint_blocks.3.context_block.attn.qkv.bias", "y_embedder.mlp.2.weight"),
        (semtok.load_vae, vae_files[1] / "all.safetensors", vae, "decoder.up.2.block.1.conv2.bias",
         "encoder.mid.attn_1.q.weight"),
        (semtok.load_vae, vae_files[1] / "alone_diffusers.safetensors", "", "decoder.conv_norm_out.weight",
         "encoder.mid_block.attentions.0.to_q.weight"),
        (semtok.load_siglip, tmp_path / "model.safetensors", "", "encoder.layers.2.mlp.fc2.bias",
         "post_layernorm.weight"),
    ):
        missing, misshapen, extra = (prefix + name for name in (missing, misshapen, "surplus.layer.weight"))
        weights = load_file(file)
        del weights[missing]
        weights[misshapen] = weights[misshapen][:-1].clone()
        weights |= {extra: torch.zeros(2)}
        (tmp_path / "bad").mkdir(exist_ok=True)
        save_file(weights, tmp_path / "bad/bad.safetensors")
        if load is semtok.load_siglip:
            shutil.copy(tmp_path / "config.json", tmp_path / "bad")
        text = refusal(load, tmp_path / "bad/bad.safetensors")
        for kind, name in (("lacks", missing), ("unexpected", extra), ("misshapen", misshapen)):
            assert re.search(rf"{kind}[^;]*{re.escape(name)}", text), f"{kind} {name} is not in: {text}"
    weights = load_file(vae_files[1] / "alone.safetensors")
    missing = sorted(weights)[20:40]
    save_file({name: weights[name] for name in weights.keys() - set(missing)}, tmp_path / "vae.safetensors")
    text = refusal(semtok.load_vae, tmp_path / "vae.safetensors")
    assert text.endswith(f"lacks {', '.join(missing[:8])} and 12 more")


def test_loading_puts_everything_on_the_wanted_device(sd35_files, vae_files):
    """What the file lacks (token embedder, mask tokens, rotations) goes along; here to the meta device."""
    with torch.device("meta"):
        decoder = semtok.Decoder(CONFIG)
    mmdit.load_sd35(decoder, str(sd35_files[1] / "model"), device="meta")
    vae = semtok.load_vae(str(vae_files[1] / "model"), device="meta")
    assert all(tensor.is_meta for tensor in (*decoder.parameters(), *decoder.buffers(), *vae.parameters()))


def test_loading_holds_one_tensor_of_the_file_at_a_time(sd35_files, monkeypatch):
    """And no parameter is a view that would keep the file mapped."""
    read, seen, alive = mmdit.TensorFiles.get, [], []

    def get(source, name):
        alive.append(sum(reference() is not None for reference in seen))
        tensor = read(source, name)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(mmdit.TensorFiles, "get", get)
    for layout, parts in (("sd3.5_medium.safetensors", 4), ("model", 4)):  # the folded bias is made of four
        decoder = fresh_decoder(sd35_files[1] / layout)
        assert max(alive) <= parts and len(seen) > 100
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in decoder.parameters())
        seen.clear(), alive.clear()


# ---------------------------------------------------------------------------------------------- copying out

CARDS = {  # file -> (packages its card allows, files that stand beside it)
    "bsq.py": ({"torch"}, ()),
    "mmdit.py": ({"torch", "safetensors"}, ()),
    "fid.py": ({"torch", "numpy", "PIL", "safetensors", "scipy", "tqdm"}, ()),
    "semtok.py": ({"torch", "PIL", "safetensors"}, ("bsq.py", "mmdit.py")),
    "ar.py": ({"torch"}, ("bsq.py", "mmdit.py")),
}
CHECKS = {  # what the example's own comments promise
    "bsq.py": "assert codes.shape == (2, 256, 18) and loss.item() < 0",
    "mmdit.py": "assert image.shape == (1, 64, 128)",
    "fid.py": "assert fid.psnr(noisy, pictures).shape == (4,)",
    "semtok.py": "assert codes.shape == (2, 16, 24) and pictures.shape == (2, 3, 32, 32)",
    "ar.py": "assert bits.shape == (3, 16, 24) and bits.dtype == torch.bool",
}


def run(script, *arguments, folder=None):
    """Run a script in a fresh Python that sees neither this folder nor PYTHONPATH."""
    command = [sys.executable, "-I", "-c", script, *map(str, arguments)]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("name", CARDS)
def test_a_copied_file_imports_only_what_its_card_says(name):
    packages, siblings = CARDS[name]
    allowed = packages | {Path(sibling).stem for sibling in siblings} | sys.stdlib_module_names
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {module.split(".")[0] for module in modules} <= allowed, f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_the_oldest_python_reads_every_file(path):
    """README names 3.10. Where that Python is installed, it also compiles them."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    if oldest := shutil.which("python3.10"):
        done = subprocess.run([oldest, "-c", f"compile(open({str(path)!r}).read(), 'it', 'exec')"])
        assert done.returncode == 0 or subprocess.run([oldest, "--version"]).returncode  # a broken one


@pytest.mark.parametrize("name", CARDS)
def test_a_copied_file_runs_its_example_in_an_empty_folder(name, tmp_path):
    for file in (name, *CARDS[name][1]):
        shutil.copy(ROOT / file, tmp_path)
    docstring = ast.get_docstring(ast.parse((tmp_path / name).read_text(encoding="utf-8")))
    blocks = [block for block in re.findall(r"(?:^    .*\n?)+", docstring, re.M) if "import torch" in block]
    assert len(blocks) == 1, "the module's docstring shows one example"
    ours = {path.stem for path in ROOT.glob("*.py")} - {path.stem for path in tmp_path.glob("*.py")}
    script = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    script += f"{textwrap.dedent(blocks[0])}\n{CHECKS[name]}"
    run(script + f"\nassert not set(sys.modules) & {ours!r}\n", folder=tmp_path)


# ------------------------------------------------------------------------------------------- the real sizes


def stream_file(path, shapes):
    """A safetensors file of random bfloat16 tensors, never held in memory."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    noise = bytes((random(1_000_003) * 0.03).bfloat16().view(torch.uint8).numpy())  # it divides no row
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for start in range(0, offset, len(noise)):
            file.write(noise[: offset - start])


FULL = """
import sys
sys.path.insert(0, {root!r})
import torch, ar, bsq, fid, mmdit, semtok

torch.manual_seed(0)
path, photo = sys.argv[1:]
pictures = torch.from_numpy(fid.read_picture(photo, 256)).permute(2, 0, 1)[None]
pictures = semtok.to_signed(pictures).to(torch.bfloat16)
config = semtok.PRESETS["paper"]
with torch.device("meta"):
    decoder = semtok.Decoder(config).to(torch.bfloat16)
mmdit.load_sd35(decoder, path)
vae = semtok.load_vae(path).to(torch.bfloat16)
torch.set_default_dtype(torch.bfloat16)
model = semtok.SemTok(config, vae, decoder).eval()
transformer = ar.MaskedAR(ar.AR_PRESETS["L"]).eval()
torch.set_default_dtype(torch.float32)
everything = [*model.parameters(), *transformer.parameters()]
assert all(p.dtype == torch.bfloat16 and not p.is_meta for p in everything)
with torch.no_grad():
    codes = model.encode(pictures)
    refined = model.refine(codes)
    out = model.decode(refined)
    bits, masked = next(transformer.generate_steps(torch.tensor([207]), steps=64, cfg=6.0))
index = bsq.bits_to_index(bsq.codes_to_bits(codes))
assert refined.shape == (1, 16, 32, 32) and codes.shape == (1, 256, 18)
assert index.unique().numel() > 1 and 0 <= index.min() and index.max() < 2**18
assert out.shape == (1, 3, 256, 256) and out.isfinite().all() and out.float().std() > 0
assert bits.shape == (1, 256, 18) and 0 < (~masked).sum() < 256
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
assert peak < 10e9, peak
"""


@pytest.mark.full
def test_the_real_sizes_carry_one_photo(tmp_path):
    """A random file of SD3.5-Medium's own form and size (5.1 GB) -> models -> one picture there and back."""
    with torch.device("meta"):
        vae = semtok.VAE(semtok.VAEConfig()).state_dict()
    transformer = sd35_shapes(semtok.PRESETS["paper"])
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in transformer.items()}
    shapes |= {f"first_stage_model.{name}": tuple(tensor.shape) for name, tensor in vae.items()}
    if shutil.disk_usage(tmp_path).free < 1.2 * 2 * sum(map(math.prod, shapes.values())):
        pytest.skip("needs 6 GB of disk")
    file, photo = tmp_path / "sd3.5_medium.safetensors", tmp_path / "drawn.png"
    smooth = F.interpolate(torch.rand(1, 3, 7, 9), (300, 400), mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy()).save(photo)
    stream_file(file, shapes)
    try:
        run(FULL.format(root=str(ROOT)), file, photo)
    finally:
        file.unlink()
