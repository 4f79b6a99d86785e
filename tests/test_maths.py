"""The mathematics of each room against hand-computed and brute-force values."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    assert bsq.bits_to_index(torch.ones(3, 63).bool()).tolist() == [2**63 - 1] * 3
    bits = torch.zeros(4, 80, dtype=torch.bool)
    bits[2, 79] = bits[3, 70] = True
    assert bsq.code_usage(bits)["used"] == 0.75
    with pytest.raises(ValueError, match="80 bits"):
        bsq.bits_to_index(bits)
    with pytest.raises(ValueError, match="do not divide"):
        bsq.BSQ(18, 4)
    usage = bsq.code_usage(torch.tensor([[[1, 0, 1], [1, 0, 0]], [[1, 1, 1], [1, 0, 1]]]).bool())
    assert usage["used"] == 3 / 4 and usage["dead_bits"] == 1
    assert usage["imbalance"] == pytest.approx((0.5 + 0.25 + 0.25) / 3)


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


@pytest.mark.parametrize("d, group, spherical", [
    (4, 4, True), (6, 3, True), (6, 1, False), (6, 2, True), (6, 6, False),
])
def test_entropy_loss_against_enumeration(d, group, spherical):
    torch.manual_seed(0)
    quantizer = bsq.BSQ(d, group, spherical)
    _, u = quantizer(torch.randn(3, 11, d))
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    corners *= d**-0.5 if spherical else 1.0
    q = (2 * u.double().flatten(0, 1) @ corners.T).softmax(-1)  # (33, 2^d), Eq. 4
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


# ------------------------------------------------------------------------------------------------------ MMDiT


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 64)
    rotated_q, rotated_k = (mmdit.apply_rope(x.expand(40, 64), mmdit.rope_1d(40, 64)) for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert torch.allclose(scores[0, 0], q @ k, atol=1e-4)
    assert not torch.allclose(scores[0, 1], q @ k, atol=1e-2)


def test_rope_rotates_pairs_by_position_times_frequency():
    x = torch.zeros(4, 8)
    x[:, 1] = 1.0  # channel 1 pairs with channel 5, at frequency 10000^(-1/4) = 0.1
    rotated = mmdit.apply_rope(x, mmdit.rope_1d(4, 8))
    angles = 0.1 * torch.arange(4)
    assert torch.allclose(rotated[:, 1], angles.cos(), atol=1e-6)
    assert torch.allclose(rotated[:, 5], angles.sin(), atol=1e-6)
    # in 2D half of the head turns by rows and half by columns
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
    target, noise, times = torch.randn(3, 4), torch.randn(3, 4), []

    def velocity(x, t):  # exact when the data is one point: x_v - eps with eps = (x - (1-t) x_v) / t
        times.append(t.item())
        return target - (x - (1 - t) * target) / t

    for steps in (1, 25, 4):  # the paths are straight lines: any number of steps is exact
        assert torch.allclose(semtok.euler(velocity, noise, steps), target, atol=1e-4)
    assert times[-4:] == [1, 0.75, 0.5, 0.25]


def batch_of_three(config):
    """Latents, features and their pooled candidates, as `frozen_pass` gives them to the losses."""
    latents, features = torch.randn(3, 8, 8, 8), torch.randn(3, config.semantic_width, 4, 4)
    rows = {"latents": latents, "features": features, "positive": torch.arange(3)}
    return rows | {"candidates": F.normalize(features.mean((2, 3)), dim=-1)}


def regularisers_by_hand(model, latents, features, candidates, weights, **_):
    """Eq. 4 and 2 of Eq. 6 and 7: codes, each term, and their weighted sum."""
    x, z = model.encoder(latents)
    codes = torch.where(z > 0, 1.0, -1.0) * 24**-0.5
    p = (4 * 24**-0.5 * F.normalize(z, dim=-1)).sigmoid().flatten(0, 1)  # (tokens, bits)
    token, code = (-(q * q.log() + (1 - q) * (1 - q).log()).sum(-1).mean() for q in (p, p.mean(0)))
    distill = (model.w_x(x) - features.permute(0, 2, 3, 1).reshape(3, 16, -1)).square().mean()
    scores = (F.normalize(model.w_z(codes.reshape(3, -1)), dim=-1) @ candidates.T / 0.07).exp()
    contrast = -torch.stack([(scores[i, i] / scores[i].sum()).log() for i in range(3)]).mean()
    semantic = weights.distill * distill + weights.contrast * contrast
    terms = {"entropy_loss": token - code, "distill_loss": distill, "contrast_loss": contrast}
    return codes, terms, weights.lambda_q * (token - code) + weights.lambda_s * semantic


def assert_terms(out, expected):
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_stage_one_losses_by_hand():
    model, weights = tiny(), semtok.LossWeights(lambda_q=0.5, lambda_s=0.25, distill=2.0, contrast=3.0)
    rows, t = batch_of_three(model.config), torch.tensor([0.0, 0.4, 1.0])
    latents, noise = rows["latents"], torch.randn(3, 8, 8, 8)
    codes, terms, regulariser = regularisers_by_hand(model, **rows, weights=weights)
    noisy = torch.stack([t[i] * noise[i] + (1 - t[i]) * latents[i] for i in range(3)])
    flow = (model.decoder(codes, noisy, t) - (latents - noise)).square().mean()
    out = model.pretraining_losses(**rows, noise=noise, t=t, weights=weights)
    assert_terms(out, terms | {"flow_loss": flow, "loss": flow + regulariser})  # Eq. 6


def players_by_hand(net, output, real, lambda_lecam):
    """The discriminator with running means that LeCAM feels, and both players' losses."""
    net.real_mean.fill_(0.4), net.fake_mean.fill_(-0.3)
    on_real, on_fake = net(real), net(output)
    hinge = 0.5 * ((1 - on_real).clamp_min(0).mean() + (1 + on_fake).clamp_min(0).mean())
    lecam = (on_real.mean() + 0.3).square() + (0.4 - on_fake.mean()).square()
    losses = {"gan_loss": -on_fake.mean(), "discriminator_loss": hinge + lambda_lecam * lecam}
    return losses | {"d_real": on_real.mean(), "d_fake": on_fake.mean()}


def test_refiner_losses_are_eq_7_whole():
    """Pixels, any number of judges, Eq. 4 and 2, both players. A third judge is one more entry in a dict."""
    weights = semtok.RefinerWeights(0.5, 0.25, 2.0, 3.0, lambda_p=0.3, lambda_gan=0.7, lambda_lecam=0.9)
    model, net, pictures = tiny(), semtok.Discriminator(16, 3, 4), torch.rand(3, 3, 32, 32) * 2 - 1
    rows = batch_of_three(model.config)
    codes, terms, regulariser = regularisers_by_hand(model, **rows, weights=weights)
    output = model.vae.decode(model.decoder(codes))
    terms["pixel_loss"] = (output - pictures).square().mean()
    players = players_by_hand(net, output, pictures, 0.9)
    judges = {"far": lambda a, b: (a - b).abs().max(), "dark": lambda a, b: (a.mean() - b.mean()).abs()}
    for third in ({}, {"edge": lambda a, b: (a[..., 1:] - b[..., :-1]).square().mean()}):
        judges |= third
        terms |= {f"{name}_loss": judge(output, pictures) for name, judge in judges.items()}
        whole = terms["pixel_loss"] + regulariser + 0.3 * sum(terms[f"{name}_loss"] for name in judges)
        fed = rows | {"pictures": pictures, "judges": judges, "weights": weights}
        out = model.refiner_losses(**fed)  # before the discriminator joins
        assert_terms(out, terms | {"loss": whole})
        assert not players.keys() & out.keys()
        whole = whole + 0.7 * players["gan_loss"] + players["discriminator_loss"]
        assert_terms(model.refiner_losses(**fed, discriminator=net), terms | players | {"loss": whole})


def test_one_backward_pass_gives_each_player_its_own_gradient():
    torch.manual_seed(0)
    net, output = semtok.Discriminator(16, 2, 4), torch.randn(2, 3, 16, 16, requires_grad=True)
    real, weights = torch.randn(2, 3, 16, 16), list(net.parameters())
    expected = players_by_hand(net, output, real, 0.9)
    for_output = torch.autograd.grad(0.7 * expected["gan_loss"], output, retain_graph=True)
    for_weights = torch.autograd.grad(expected["discriminator_loss"], weights)
    losses = net.losses(output, real, 0.9)
    (0.7 * losses["gan_loss"] + losses["discriminator_loss"]).backward()
    for ours, theirs in zip([output, *weights], [*for_output, *for_weights]):
        assert torch.allclose(ours.grad, theirs, atol=1e-5)
    net.remember(torch.tensor(2.0), torch.tensor(-1.0))
    means = net.real_mean.item(), net.fake_mean.item()
    assert means == pytest.approx((0.4 + 0.001 * (2.0 - 0.4), -0.3 + 0.001 * (-1.0 + 0.3)), rel=1e-6)
    # LeCAM: logits 2, -3 with running means 1, -0.5; crossed ones have nothing to hold
    for logits, penalty in (((2.0, -3.0), 2.5**2 + 4.0**2), ((-1.0, 2.0), 0)):
        assert semtok.lecam_loss(*map(torch.tensor, (*logits, 1.0, -0.5))).item() == penalty
    assert net.blur.sum().item() == pytest.approx(1.0)


def test_siglip_grid_is_resized_when_it_differs():
    model = tiny()
    x, codes = torch.randn(2, 16, 64), torch.randn(2, 16, 24)
    even = torch.randn(2, 64, 1, 1)  # each channel the same everywhere: so it is at every size
    small, large = (
        model.alignment_losses(x, codes, even.expand(-1, -1, side, side), torch.arange(2), torch.randn(2, 64))
        for side in (4, 7)
    )
    assert large["distill_loss"].item() == pytest.approx(small["distill_loss"].item(), rel=1e-5)


def test_refiner_ignores_noise_and_every_token_depends_on_every_part_of_the_picture():
    model = tiny()
    codes = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert torch.equal(model.refine(codes), model.refine(codes))
    first, again, other = (model.sample(codes, 3, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
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


def test_schedule_fills_every_position_once():
    for tokens, steps in itertools.product((1, 2, 24, 100, 256), (1, 2, 12, 64, 300)):
        counts, left = ar.fill_counts(tokens, steps), tokens
        assert sum(counts) == tokens and min(counts) >= 1 and len(counts) <= min(tokens, steps)
        for n, count in enumerate(counts, 1):
            left -= count
            cosine = math.floor(tokens * math.cos(math.pi / 2 * n / steps)) if n < steps else 0
            assert left <= cosine or count == 1  # except where a step must fill at least one
    with pytest.raises(ValueError, match="at least 1"):
        ar.fill_counts(16, 0)
    with pytest.raises(ValueError, match="'spiral' is none of random, raster and confidence"):
        ar.MaskedAR(ar.AR_PRESETS["tiny"]).generate(torch.tensor([1]), order="spiral")
    assert ar.guidance(6.0, 0.5, "linear") == 3.5 and ar.guidance(6.0, 1.0, "linear") == 6.0
    assert ar.guidance(6.0, 0.1, "constant") == 6.0 and ar.guidance(1.0, 0.7, "linear") == 1.0


def test_top_p_keeps_the_smallest_sufficient_set_per_bit_or_group():
    torch.manual_seed(0)
    p = torch.tensor([0.80, 0.60, 0.50, 0.20, 0.74])  # of the value 1
    logits = torch.stack([(1 - p).log(), p.log()], -1).expand(20_000, 5, 2)
    values, confidence = ar.sample_groups(logits, 0.75)
    share = values.float().mean(0)
    assert share[0] == 1 and share[3] == 0  # surer than 0.75: taken outright
    assert torch.allclose(share[[1, 2, 4]], p[[1, 2, 4]], atol=0.02)  # else both values stay, unchanged
    chosen = torch.where(values.bool(), p, 1 - p).log().sum(-1)
    assert torch.allclose(confidence, chosen, atol=1e-4)
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
    known = [(~masked).int() for _, masked in model.generate_steps(labels, **options, generator=seeded(0))]
    assert [k.sum(1).tolist() for k in known] == [[n] * 3 for n in (1, 3, 6, 9)]  # 9 - 8, 6, 3, 0
    in_order = all(torch.equal(k, k.sort(1, descending=True).values) for k in known)
    assert in_order == (order == "raster")  # from left to right


@pytest.mark.parametrize("order", ["random", "raster", "confidence"])
def test_known_tokens_stay_and_the_others_are_drawn_as_if_by_then(order, monkeypatch):
    model, labels, scales, guidance = small_ar(), torch.tensor([0, 3]), [], ar.guidance
    monkeypatch.setattr(ar, "guidance", lambda *given: scales.append(given[1]) or guidance(*given))
    start = torch.rand(2, 9, 6, generator=seeded(5)) > 0.5
    masked = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()  # four each
    options = {"steps": 2, "cfg": 2.0, "order": order, "generator": seeded(0)}
    steps = [*model.generate_steps(labels, known=(start, masked), **options)]
    assert [int(still[0].sum()) for _, still in steps] == [2, 0]
    assert scales == [7 / 9, 1.0]  # the shares that are known then
    bits = steps[-1][0]
    assert torch.equal(bits[~masked], start[~masked]) and not torch.equal(bits, start)
    masked[0, 1] = False
    with pytest.raises(ValueError, match=r"in each row, not \[3, 4\]"):
        model.generate(labels, known=(start, masked), **options)


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
    model, labels, known = small_ar(), torch.tensor([2]), torch.zeros(1, 9, dtype=torch.bool)
    bits = torch.rand(1, 9, 6) > 0.5
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
