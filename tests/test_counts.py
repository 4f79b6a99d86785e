"""Every network has the paper's number of parameters. Counted on the meta device."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ar  # noqa: E402
import mmdit  # noqa: E402
import semtok  # noqa: E402
import train  # noqa: E402


def millions(module):
    """Parameters, in millions."""
    assert all(parameter.numel() for parameter in module.parameters())
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.fixture(scope="module")
def paper():
    """The tokenizer of the paper."""
    with torch.device("meta"):
        return semtok.SemTok(semtok.PRESETS["paper"])


def test_encoder_has_113m(paper):
    assert millions(paper.encoder.joint_blocks) == pytest.approx(113.36, abs=0.01)
    assert round(millions(paper.encoder)) in (113, 114)  # with patch embedder, mask tokens and the last layer


def test_encoder_is_dual_stream_without_adaln(paper):
    names = {name for name, _ in paper.encoder.named_parameters()}
    assert not any("adaLN" in name or "t_embedder" in name for name in names)
    last = paper.encoder.joint_blocks[-1]
    x, context = last.x_block.state_dict(), last.context_block.state_dict()
    assert {n: p.shape for n, p in x.items()} == {n: p.shape for n, p in context.items()}
    assert "attn.proj.weight" in x  # both leave the last block


def test_decoder_has_2231m_after_folding_and_2237m_before(paper):
    decoder = paper.decoder
    blocks = millions(decoder.joint_blocks)
    assert blocks == pytest.approx(2223.7, abs=0.05)
    token_side = millions(decoder.token_embedder) + decoder.mask_tokens.numel() / 1e6
    assert round(millions(decoder) - decoder.mask_tokens.numel() / 1e6) == 2231
    assert token_side < 0.5
    with torch.device("meta"):  # SD3.5's embedder of the pooled text, which loading folds into a bias
        y_embedder = torch.nn.Sequential(torch.nn.Linear(2048, 1536), torch.nn.Linear(1536, 1536))
    before = millions(decoder) - decoder.mask_tokens.numel() / 1e6 + millions(y_embedder)
    assert millions(y_embedder) == pytest.approx(5.5, abs=0.05)
    assert round(before) == 2237 and abs(before - 2236) < 1.1  # the paper says 2236M


def test_decoder_is_the_mmdit_x_of_sd35_medium(paper):
    blocks = paper.decoder.joint_blocks
    assert [block.x_block.dual for block in blocks] == [True] * 13 + [False] * 11
    assert [block.x_block.chunks for block in blocks] == [9] * 13 + [6] * 11
    assert [block.context_block.pre_only for block in blocks] == [False] * 23 + [True]
    assert paper.decoder.x_embedder.proj.weight.shape == (1536, 16, 2, 2)


@pytest.mark.parametrize("size, expected, paper_says", [
    ("L", 317.9, 318), ("XL", 746.0, 746), ("XXL", 1269.0, 1200),
])
def test_ar_has_318m_746m_and_1269m(size, expected, paper_says):
    with torch.device("meta"):
        model = ar.MaskedAR(ar.AR_PRESETS[size])
    found = millions(model)
    assert found == pytest.approx(expected, abs=0.6)
    assert found == pytest.approx(paper_says, rel=0.06 if size == "XXL" else 0.002)  # "1.2B" is rounded
    shared = millions(model.modulation)
    assert shared == pytest.approx(6 * model.config.width**2 / 1e6, rel=0.001)  # one AdaLN for all blocks


def test_vae_has_34_3m_and_49_5m_and_siglip_85_8m(paper):
    vae = paper.vae
    assert millions(vae.encoder) == pytest.approx(34.3, abs=0.05)
    assert millions(vae.decoder) == pytest.approx(49.5, abs=0.05)
    assert millions(vae) == pytest.approx(83.8, abs=0.05)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    with torch.device("meta"):
        tower = semtok.SigLIP(semtok.SigLIPConfig())
    assert millions(tower) == pytest.approx(85.8, abs=0.1)  # without the pooling head


def test_choices_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match="250 is no multiple of 16"):
        semtok.SemTokConfig(image_size=250)
    with pytest.raises(mmdit.UserError, match="quantizer=BSQ"):
        train.changed(semtok.SemTokConfig(), {"quantizer": "BSQ"})
    with pytest.raises(KeyError, match="cosine"):
        ar.guidance(3.0, 0.5, "cosine")


def test_recipes_of_the_paper():
    recipes = train.RECIPES["paper"]
    for stage, expected in {
        "1": (200_000, 256, 5e-5, 1e-3), "2": (100_000, 64, 5e-5, 1e-3), "ar": (800_000, 2048, 2e-4, 0.03)
    }.items():
        recipe = recipes[stage]
        assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.weight_decay) == expected
    assert all(recipe.warmup == 10_000 and recipe.ema == 0.9999 for recipe in recipes.values())
    assert (recipes["2"].gan_start, recipes["2"].discriminator_lr) == (20_000, 1e-4)
    assert all((recipes[stage].lambda_q, recipes[stage].lambda_s) == (0.0025, 0.05) for stage in "12")
    assert (recipes["2"].lambda_p, recipes["2"].lambda_gan, recipes["2"].lambda_lecam) == (0.1, 0.1, 0.001)
    generating = recipes["ar"]
    assert (generating.least_masked, generating.class_dropout, generating.smoothing) == (0.7, 0.1, 0.01)
    assert all(r.patience == 1 and r.flip for r in recipes.values())


@pytest.mark.parametrize("build", ["cast to bfloat16", "built in bfloat16"])
def test_rotations_at_the_last_position_lose_nothing_in_bfloat16(build):
    """At the real sizes; the tables are real though the rest is on the meta device. Rounded to bfloat16,
    cosines and sines would be wrong by up to 2^-9; positions and frequencies, by whole turns."""
    try:
        torch.set_default_dtype(torch.bfloat16 if build == "built in bfloat16" else torch.float32)
        with torch.device("meta"):
            config = semtok.PRESETS["paper"]
            models = semtok.Encoder(config), semtok.Decoder(config), ar.MaskedAR(ar.AR_PRESETS["L"])
    finally:
        torch.set_default_dtype(torch.float32)
    for model in models:
        model.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for model in models for p in model.parameters())
    frequencies = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    q = torch.randn(32, dtype=torch.complex128)  # channel i and channel i + 32 of a head of 64
    for rotation in (models[0].z_rope, models[1].z_rope, models[2].rope):
        turned = q * torch.polar(torch.ones_like(frequencies), 255 * frequencies)
        found = mmdit.apply_rope(torch.cat([q.real, q.imag]).float(), rotation.table[:, 255])
        assert (found - torch.cat([turned.real, turned.imag])).abs().max() < 1e-4
    for model in models[:2]:  # row 15, column 15 of the grid; half of the pairs turn by row, half by column
        turned = q * torch.polar(torch.ones_like(frequencies), 15 * frequencies[::2].repeat(2))
        found = mmdit.apply_rope(torch.cat([q.real, q.imag]).float(), model.x_rope.table[:, 255])
        assert (found - torch.cat([turned.real, turned.imag])).abs().max() < 1e-4
