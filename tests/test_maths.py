"""The mathematics of each room against hand-computed and brute-force values."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ar  # noqa: E402
import bsq  # noqa: E402
import mmdit  # noqa: E402
import semtok  # noqa: E402
import train  # noqa: E402

# -------------------------------------------------------------------------------------------------------- BSQ


@pytest.mark.parametrize("d", [1, 18, 32])
def test_index_round_trip(d):
    torch.manual_seed(d)
    bits = torch.rand(500, d) > 0.5
    bits[0], bits[1] = True, False
    index = bsq.bits_to_index(bits)
    assert index.dtype == torch.int64 and index[0] == 2**d - 1 and index[1] == 0
    assert index[2].item() == sum(2**i for i, bit in enumerate(bits[2].tolist()) if bit)  # Eq. 3: least first
    assert torch.equal(bsq.index_to_bits(index, d), bits)
    codes = bsq.bits_to_codes(bits)
    assert torch.equal(bsq.codes_to_bits(codes), bits)
    assert torch.allclose(codes.norm(dim=-1), torch.ones(500), atol=1e-6)


def test_codes_beyond_63_bits_have_no_number_but_are_counted():
    bits = torch.ones(3, 63, dtype=torch.bool)
    assert bsq.bits_to_index(bits).tolist() == [2**63 - 1] * 3
    bits = torch.zeros(4, 80, dtype=torch.bool)
    bits[2, 79] = bits[3, 70] = True
    assert bsq.code_usage(bits)["used"] == 0.75
    with pytest.raises(ValueError, match="80 bits"):
        bsq.bits_to_index(bits)


def test_codes_are_the_nearest_corner_and_never_zero():
    z = torch.randn(64, 5)
    z[0] = 0  # the sign of zero must still be a corner
    z[1, 2] = 0
    codes, u = bsq.BSQ(5)(z)
    assert torch.equal(codes.abs(), torch.full_like(codes, 5**-0.5))
    corners = torch.tensor(list(itertools.product([-1, 1], repeat=5))) * 5**-0.5
    nearest = corners[torch.cdist(u[2:], corners).argmin(1)]
    assert torch.allclose(codes[2:], nearest)


def test_straight_through_gradient_goes_to_the_point_on_the_sphere():
    z = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 6)
    (bsq.BSQ(6)(z)[0] * weight).sum().backward()
    norm = z.detach().norm(dim=-1, keepdim=True)
    u = z.detach() / norm
    by_hand = (weight - u * (u * weight).sum(-1, keepdim=True)) / norm  # the Jacobian of z / |z|
    assert torch.allclose(z.grad, by_hand, atol=1e-5)


@pytest.mark.parametrize("d, group, temperature, spherical", [
    (4, 4, 1.0, True), (6, 3, 2.0, True), (6, 1, 0.5, False), (6, 2, 0.7, True), (6, 6, 0.7, False),
])
def test_entropy_loss_against_enumeration(d, group, temperature, spherical):
    torch.manual_seed(0)
    quantizer = bsq.BSQ(d, group, temperature, spherical)
    _, u = quantizer(torch.randn(3, 11, d))
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    corners *= d**-0.5 if spherical else 1.0
    q = (2 * temperature * u.double().flatten(0, 1) @ corners.T).softmax(-1)  # (33, 2^d), Eq. 4
    token = -(q * q.log()).sum(-1).mean()
    positive = corners > 0
    code = 0.0
    for start in range(0, d, group):  # marginals of each group of bits, from the full table
        for pattern in itertools.product([False, True], repeat=group):
            members = (positive[:, start : start + group] == torch.tensor(pattern)).all(1)
            p = q[:, members].sum(1).mean()
            code = code - p * p.log()
    out = quantizer.entropy_loss(u)
    assert out["token_entropy"].item() == pytest.approx(token.item(), rel=1e-5)
    assert out["code_entropy"].item() == pytest.approx(code.item(), rel=1e-5)
    assert out["entropy_loss"].item() == pytest.approx((token - code).item(), abs=1e-5)


def test_code_usage_counts():
    bits = torch.tensor([[[1, 0, 1], [1, 0, 0]], [[1, 1, 1], [1, 0, 1]]]).bool()
    usage = bsq.code_usage(bits)
    assert usage["used"] == 3 / 4 and usage["dead_bits"] == 1
    assert usage["imbalance"] == pytest.approx((0.5 + 0.25 + 0.25) / 3)


def test_group_size_must_divide():
    with pytest.raises(ValueError, match="do not divide"):
        bsq.BSQ(18, 4)


# ------------------------------------------------------------------------------------------------------ MMDiT


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(64), torch.randn(64)
    table = mmdit.rope_1d(40, 64)
    rotated_q, rotated_k = (mmdit.apply_rope(x.expand(40, 64), table) for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert torch.allclose(scores[0, 0], q @ k, atol=1e-4)
    assert not torch.allclose(scores[0, 1], q @ k, atol=1e-2)


def test_rope_1d_rotates_pairs_by_position_times_frequency():
    x = torch.zeros(4, 8)
    x[:, 1] = 1.0  # channel 1 pairs with channel 5, at frequency 10000^(-1/4) = 0.1
    rotated = mmdit.apply_rope(x, mmdit.rope_1d(4, 8))
    angles = 0.1 * torch.arange(4)
    assert torch.allclose(rotated[:, 1], angles.cos(), atol=1e-6)
    assert torch.allclose(rotated[:, 5], angles.sin(), atol=1e-6)


def test_rope_2d_gives_half_of_the_head_to_rows_and_half_to_columns():
    table = mmdit.rope_2d(3, 5, 16).unflatten(1, (3, 5))
    rows, columns = mmdit.rope_1d(3, 8)[:, :, None], mmdit.rope_1d(5, 8)[:, None]
    for start, low in ((0, 0), (8, 4)):  # both halves of each pair
        by_row, by_column = table[..., start : start + 4], table[..., start + 4 : start + 8]
        assert torch.allclose(by_row, rows[..., low : low + 4].expand_as(by_row))
        assert torch.allclose(by_column, columns[..., low : low + 4].expand_as(by_column))


def test_checkpointed_activations_change_nothing():
    torch.manual_seed(0)
    net = mmdit.MMDiT(2, 32, 2, dual_depth=1, adaln=True)
    torch.nn.init.normal_(net.joint_blocks[0].x_block.adaLN_modulation[1].weight, std=0.2)
    x, context, conditioning = torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32)
    inputs = x, context, mmdit.rope_2d(2, 2, 16), mmdit.rope_1d(3, 16), conditioning
    gradients = []
    for net.checkpoint_activations in (False, True):
        net.zero_grad()
        sum(out.square().sum() for out in net(*inputs)).backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# ----------------------------------------------------------------------------------------------------- SemTok


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tiny():
    torch.manual_seed(0)
    model = semtok.SemTok(semtok.PRESETS["tiny"])
    for parameter in model.parameters():  # nothing that is zero by initialisation may hide an error
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_euler_follows_a_closed_form_velocity():
    target, noise = torch.randn(3, 4), torch.randn(3, 4)

    def velocity(x, t):  # exact when the data is one point: x_v - eps with eps = (x - (1-t) x_v) / t
        return target - (x - (1 - t) * target) / t

    # the paths are straight lines: any number of steps is exact
    for steps, shift in ((1, 1.0), (25, 1.0), (7, 3.0)):
        assert torch.allclose(semtok.euler(velocity, noise, steps, shift), target, atol=1e-4)
    times = []
    semtok.euler(lambda x, t: times.append(t.item()) or torch.zeros_like(x), noise, 4, 3.0)
    assert times == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25)])


def test_stage_one_losses_by_hand():
    model = tiny()
    config = model.config
    latents, noise = torch.randn(2, 3, config.vae.latent_channels, 8, 8)
    x_sig, t = torch.randn(3, config.semantic_width, 4, 4), torch.tensor([0.0, 0.4, 1.0])
    rows = {"latents": latents, "noise": noise, "t": t, "features": x_sig, "positive": torch.arange(3)}
    weights = semtok.LossWeights(lambda_q=0.5, lambda_s=0.25, distill=2.0, contrast=3.0)
    candidates = F.normalize(x_sig.mean((2, 3)), dim=-1)
    out = model.pretraining_losses(**rows, candidates=candidates, weights=weights)
    x, z = model.encoder(latents)
    codes = torch.where(z > 0, 1.0, -1.0) * config.bits**-0.5
    assert torch.equal(out["codes"] > 0, codes > 0)
    mixed = torch.stack([t[i] * noise[i] + (1 - t[i]) * latents[i] for i in range(3)])
    target = latents - noise
    flow = (model.decoder(codes, mixed, t) - target).square().mean().item()
    assert out["flow_loss"].item() == pytest.approx(flow, rel=1e-4)
    features = x_sig.permute(0, 2, 3, 1).reshape(3, 16, -1)
    distill = (model.w_x(x) - features).square().mean().item()
    assert out["distill_loss"].item() == pytest.approx(distill, rel=1e-5)
    u = F.normalize(features.mean(1), dim=-1)
    v = F.normalize(model.w_z(codes.reshape(3, -1)), dim=-1)
    scores = (v @ u.T / 0.07).exp()
    contrast = -torch.stack([(scores[i, i] / scores[i].sum()).log() for i in range(3)]).mean()
    assert out["contrast_loss"].item() == pytest.approx(contrast.item(), rel=1e-4)
    entropy = out["token_entropy"].item() - out["code_entropy"].item()
    total = flow + 0.5 * entropy + 0.25 * (2 * distill + 3 * contrast.item())  # Eq. 6
    assert out["loss"].item() == pytest.approx(total, rel=1e-4)


def test_siglip_grid_is_resized_when_it_differs():
    model = tiny()
    x, codes = torch.randn(2, 16, 64), torch.randn(2, 16, 24)
    even = torch.randn(2, 64, 1, 1)  # each channel the same everywhere: so it is at every size
    small, large = (
        model.alignment_losses(x, codes, even.expand(-1, -1, side, side), torch.arange(2), torch.randn(2, 64))
        for side in (4, 7)
    )
    assert large["distill_loss"].item() == pytest.approx(small["distill_loss"].item(), rel=1e-5)


def test_refiner_ignores_noise_and_the_sampler_does_not():
    model = tiny()
    codes = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert torch.equal(model.refine(codes), model.refine(codes))
    first, again, other = (model.sample(codes, 3, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_every_token_depends_on_every_part_of_the_picture():
    model = tiny()
    latents = torch.randn(1, 8, 8, 8, requires_grad=True)
    _, z = model.encoder(latents)
    for token in (0, 15):
        (gradient,) = torch.autograd.grad(z[0, token].sum(), latents, retain_graph=True)
        assert (gradient.abs().amax((0, 1)) > 0).all()


def test_picture_ranges():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert semtok.to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(semtok.to_uint8(semtok.to_signed(every)), every)


# --------------------------------------------------------------------------------------------------------- AR


def small_ar(**changes):
    torch.manual_seed(0)
    model = ar.MaskedAR(replace(ar.AR_PRESETS["tiny"], **{"tokens": 9, "bits": 6, "depth": 2, **changes}))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("tokens", [1, 2, 24, 100, 256])
@pytest.mark.parametrize("steps", [1, 2, 12, 64, 300])
def test_schedule_fills_every_position_once(tokens, steps):
    counts = ar.fill_counts(tokens, steps)
    assert sum(counts) == tokens and min(counts) >= 1 and len(counts) <= min(tokens, steps)
    left = tokens
    for n, count in enumerate(counts, 1):
        left -= count
        wanted = math.floor(tokens * math.cos(math.pi / 2 * n / steps)) if n < steps else 0
        assert left <= max(wanted, 0) or count == 1  # the cosine, except where a step must fill at least one


def test_schedules():
    with pytest.raises(ValueError, match="at least 1"):
        ar.fill_counts(16, 0)
    with pytest.raises(ValueError, match="'spiral' is none of random, raster and confidence"):
        ar.MaskedAR(ar.AR_PRESETS["tiny"]).generate(torch.tensor([1]), order="spiral")
    assert ar.guidance(6.0, 0.5, "linear") == 3.5 and ar.guidance(6.0, 1.0, "linear") == 6.0
    assert ar.guidance(6.0, 0.1, "constant") == 6.0 and ar.guidance(1.0, 0.7, "linear") == 1.0


def test_top_p_keeps_the_smallest_sufficient_set_per_bit():
    torch.manual_seed(0)
    p = torch.tensor([0.80, 0.60, 0.50, 0.20, 0.74])  # of the value 1
    logits = torch.stack([(1 - p).log(), p.log()], -1).expand(20_000, 5, 2)
    values, confidence = ar.sample_groups(logits, 0.75)
    share = values.float().mean(0)
    assert share[0] == 1 and share[3] == 0  # surer than 0.75: taken outright
    assert torch.allclose(share[[1, 2, 4]], p[[1, 2, 4]], atol=0.02)  # else both values stay, unchanged
    chosen = torch.where(values.bool(), p, 1 - p).log().sum(-1)
    assert torch.allclose(confidence, chosen, atol=1e-4)


def test_top_p_on_larger_groups():
    torch.manual_seed(0)
    p = torch.tensor([0.05, 0.5, 0.3, 0.15])
    values, _ = ar.sample_groups(p.log().expand(20_000, 1, 4), 0.75)
    counts = torch.bincount(values.flatten(), minlength=4) / 20_000
    assert counts[0] == 0 and counts[3] == 0
    assert torch.allclose(counts[1:3], torch.tensor([0.625, 0.375]), atol=0.02)


@pytest.mark.parametrize("order", ["random", "raster", "confidence"])
def test_generation_fills_each_token_once_and_keeps_it(order):
    model, labels = small_ar(), torch.tensor([0, 3, 9])
    before, masked = torch.zeros(3, 9, 6, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool)
    options = {"steps": 4, "cfg": 2.0, "order": order}
    for bits, still in model.generate_steps(labels, **options, generator=seeded(0)):
        assert not (still & ~masked).any()  # nothing is masked again
        assert torch.equal(bits[~masked], before[~masked])  # what was there stays
        before, masked = bits, still
    assert not masked.any()
    again, other = (model.generate(labels, **options, generator=seeded(seed)) for seed in (0, 1))
    assert torch.equal(again, bits) and not torch.equal(other, bits)


def test_raster_order_fills_from_left_to_right():
    options = {"steps": 4, "cfg": 2.0, "order": "raster"}
    known = [(~masked).int().tolist() for _, masked in small_ar().generate_steps(torch.tensor([0, 3]), **options)]
    assert known == [[[1] * n + [0] * (9 - n)] * 2 for n in (1, 3, 6, 9)]  # 9 cos(pi/2 n/4), floored: 8, 6, 3, 0


def test_guided_logits_are_u_plus_g_times_c_minus_u(monkeypatch):
    model, seen, draw = small_ar(), [], ar.sample_groups
    monkeypatch.setattr(ar, "sample_groups", lambda logits, *rest: seen.append(logits) or draw(logits, *rest))
    bits, labels = torch.zeros(2, 9, 6, dtype=torch.bool), torch.tensor([4, 5])
    model.generate(labels, steps=1, cfg=3.0, order="confidence", generator=seeded(0))
    everything = torch.ones(2, 9, dtype=torch.bool)
    conditional = model(bits, labels, everything)
    unconditional = model(bits, torch.full_like(labels, 10), everything)
    assert torch.allclose(seen[0], unconditional + 3.0 * (conditional - unconditional), atol=1e-4)


def test_attention_is_bidirectional():
    model = small_ar()
    bits, labels = torch.rand(1, 9, 6) > 0.5, torch.tensor([2])
    known = torch.zeros(1, 9, dtype=torch.bool)
    base = model(bits, labels, known)
    for position in range(9):
        changed = bits.clone()
        changed[0, position] ^= True
        assert ((model(changed, labels, known) - base).abs().amax((0, 2, 3)) > 1e-6).all()


def test_masked_tokens_are_not_seen_and_loss_is_on_them_alone():
    model = small_ar()
    bits, labels = torch.rand(2, 9, 6) > 0.5, torch.tensor([2, 7])
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[:, 3:7] = True
    hidden_change = bits.clone()
    hidden_change[:, 3:7] ^= True
    assert torch.allclose(model(bits, labels, masked), model(hidden_change, labels, masked), atol=1e-6)
    logits = model(bits, labels, masked).double()
    losses, right = [], []
    for b, k in masked.nonzero().tolist():
        for i in range(6):
            log_p, truth = logits[b, k, i].log_softmax(-1), int(bits[b, k, i])
            losses.append(-(0.99 * log_p[truth] + 0.01 * log_p.mean()).item())
            right.append(int(logits[b, k, i].argmax()) == truth)
    out = model.loss(bits, labels, masked, torch.tensor(4.0), smoothing=0.01)
    assert out["loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert out["accuracy"].item() == pytest.approx(np.mean(right))


def test_grouped_head_predicts_joint_values():
    model = small_ar(group_bits=3)
    bits, labels = torch.rand(2, 9, 6) > 0.5, torch.tensor([2, 7])
    masked = torch.ones(2, 9, dtype=torch.bool)
    logits = model(bits, labels, masked)
    assert logits.shape == (2, 9, 2, 8)
    values = (bits.unflatten(-1, (2, 3)) * torch.tensor([1, 2, 4])).sum(-1)
    nll = -logits.log_softmax(-1).gather(-1, values[..., None]).mean() / 3
    out = model.loss(bits, labels, masked, torch.tensor(9.0), 0.0)
    assert out["nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert model.generate(labels, steps=3, cfg=2.0).shape == (2, 9, 6)


# --------------------------------------------------------------------------------------------------- training


def test_masks_hide_a_uniform_share_and_at_least_one_token():
    model, rng = small_ar(tokens=100), seeded(0)
    masks = model.draw_masks(4000, 0.7, rng)
    ratios = masks.float().mean(1)
    assert ratios.min() >= 0.7 and ratios.max() == 1.0
    assert ratios.mean().item() == pytest.approx(0.855, abs=0.01)  # of ceil(100 r) / 100: half a token more
    assert (masks.float().mean(0) - ratios.mean()).abs().max() < 0.03  # no position is favoured
    counts = small_ar(tokens=16).draw_masks(4000, 0.0, rng).sum(1)
    assert sorted(set(counts.tolist())) == list(range(1, 17))
    assert (counts.bincount(minlength=17)[1:] - 250).abs().max() < 80  # each equally often


def test_drawn_pictures_are_a_function_of_split_seed_and_index():
    first, label = train.draw_shape("train", 0, 13, 32)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8 and label == 3
    assert np.array_equal(first, train.draw_shape("train", 0, 13, 32)[0])
    for other in (("val", 0, 13, 32), ("train", 1, 13, 32), ("train", 0, 23, 32)):
        assert not np.array_equal(first, train.draw_shape(*other)[0])


def test_lecam_and_blur_by_hand():
    # logits 2, -3; running means 1, -0.5
    value = train.lecam_loss(*map(torch.tensor, (2.0, -3.0, 1.0, -0.5)))
    assert value.item() == 2.5**2 + 4.0**2
    # crossed: nothing to hold
    assert train.lecam_loss(*map(torch.tensor, (-1.0, 2.0, 1.0, -0.5))).item() == 0
    net = train.Discriminator(16, 3, 4)
    assert net.blur.sum().item() == pytest.approx(1.0)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 1, 4, 4)


def test_one_backward_pass_gives_each_player_its_own_gradient():
    net, output = train.Discriminator(16, 2, 4), torch.randn(2, 3, 16, 16, requires_grad=True)
    real, recipe = torch.randn(2, 3, 16, 16), train.RECIPES["paper"]["2"]
    job = SimpleNamespace(args=SimpleNamespace(accumulate=1))
    means = {"real_mean": torch.tensor(-0.4), "fake_mean": torch.tensor(0.3)}
    before = {name: mean.clone() for name, mean in means.items()}
    stage = SimpleNamespace(discriminator=net, job=job, recipe=recipe, **means)
    losses = train.Refining.adversarial_losses(stage, real, output)
    (recipe.lambda_gan * losses["gan_loss"] + losses["discriminator_loss"]).backward()
    (generator_only,) = torch.autograd.grad(-recipe.lambda_gan * net(output).mean(), output)
    assert torch.allclose(output.grad, generator_only, atol=1e-6)  # nothing of the discriminator's loss
    on_real, on_fake = net(real), net(output.detach())
    hinge = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
    loss = hinge + recipe.lambda_lecam * train.lecam_loss(on_real.mean(), on_fake.mean(), **before)
    assert losses["discriminator_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, wanted in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters()))):
        assert torch.allclose(parameter.grad, wanted, atol=1e-5)
    assert stage.real_mean.item() == pytest.approx(-0.4 * 0.999 + 0.001 * on_real.mean().item(), rel=1e-5)
