"""Broken files: every reader of weights and pictures succeeds or raises UserError, in little time and memory."""

import io
import json
import random
import resource
import struct
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ar  # noqa: E402
import mmdit  # noqa: E402
import semtok  # noqa: E402

SIZES = replace(
    semtok.PRESETS["tiny"], image_size=16, tokens=4, bits=6, semantic_width=16, encoder_depth=1,
    encoder_width=16, encoder_heads=2, decoder_depth=2, decoder_width=16, decoder_heads=2,
    decoder_dual_depth=1, vae=semtok.VAEConfig((8, 16), 1, 4),
)
AR, SIGLIP = ar.ARConfig(1, 16, 2, tokens=4, bits=6, classes=2), semtok.SigLIPConfig(16, 1, 2, 16, 8, 2)
ABOUT = {"classes": '["a", "b"]', "fingerprint": "f", "tokenizer": "t"}
ABSURD = [
    None, True, -1, 0, 1, 2, 1000, 10**5, 10**9, 2**40, 2**70, 10**400, 0.5, 1e308, float("nan"), "", "x\n", "BOOL", "C64", "F4",
    "F8_E8M0", "F16", [], [1], [10**9] * 3, [2] * 40, [None], {}, {"x": 1}, "[" * 3000, "9" * 5000,
]
SHAPES = [(0, 2**40), (2**40, 0), (), (1,), (7,), (100_000, 16), (16, 100_000), (1, 1, 1, 1), (3_000_000,)]
KINDS = [torch.int64, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn, torch.float64]


def load_sd35(path):
    with torch.device("meta"):
        decoder = semtok.Decoder(SIZES)
    return mmdit.load_sd35(decoder, path)


def whole():
    """Loader -> the tensors and the metadata of a file that it takes."""
    text = {"0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    text = {f"y_embedder.mlp.{name}": torch.zeros(shape) for name, shape in text.items()}
    decoder = {n: t for n, t in semtok.Decoder(SIZES).state_dict().items() if "token" not in n}
    about = [ABOUT | {"format": kind, "config": json.dumps(asdict(config))}
             for kind, config in (("semtok-tokenizer", SIZES), ("semtok-ar", AR))]
    return {
        semtok.load_semtok: (semtok.SemTok(SIZES).state_dict(), about[0]),
        ar.load_ar: (ar.MaskedAR(AR).state_dict(), about[1]),
        semtok.load_vae: (semtok.VAE(SIZES.vae).state_dict(), {"format": "pt"}),
        semtok.load_siglip: (semtok.SigLIP(SIGLIP).state_dict(), {"format": "pt"}),
        load_sd35: (decoder | text, {"format": "pt"}),
    }


def damaged(data, rng):
    """Bytes with one of the usual accidents."""
    data, where = bytearray(data), min(rng.randrange(len(data)), rng.randrange(len(data)))  # rather in front
    kind, many = rng.randrange(5), rng.choice([1, 8, 500])
    if kind == 0:
        del data[where:]
    elif kind < 3:  # a stretch is lost, zero or there twice
        data[where : where + many] = rng.choice([b"", bytes(many), bytes(data[where:][: 2 * many])])
    for place in rng.sample(range(len(data)), min(len(data), many)) if kind > 2 else ():
        data[place] = rng.choice([0, 255, rng.randrange(256), data[place] ^ 1 << rng.randrange(8)])
    return bytes(data)


def edited(table, rng):
    """A JSON table with one entry, at any depth, gone, absurd or new."""
    key = rng.choice([*table, "new"])
    if isinstance(table.get(key), dict) and rng.random() < 0.7:
        return table | {key: edited(table[key], rng)}
    if key == "config" and rng.random() < 0.9:  # a table as text
        return table | {key: json.dumps(edited(json.loads(table[key]), rng))}
    return table | {key: rng.choice(ABSURD)} if rng.random() < 0.8 else {k: table[k] for k in table if k != key}


def broken_weights(tensors, metadata, rng):
    """A safetensors file with damage in its bytes, header, metadata or tensors."""
    kind, tensors = rng.randrange(4), dict(tensors)
    if kind == 0:
        metadata = {key: value if type(value) is str else json.dumps(value) for key, value in edited(metadata, rng).items()}
    if kind == 1:
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        tensors[rng.choice([name, name, name + "\n", "x"])] = rng.choice([torch.zeros(rng.choice(SHAPES)), tensor.to(rng.choice(KINDS))])
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    if kind == 2:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(edited(json.loads(data[8 : 8 + length]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return damaged(data, rng) if kind == 3 else data


def attempt(read, path, told):
    """Success or UserError of one line, in 5 s and half a gigabyte."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(str(path))
    except mmdit.UserError as error:
        assert "\n" not in str(error), told
    except BaseException as error:
        raise AssertionError(f"{told}: {error!r}") from error
    assert time.monotonic() - start < 5, told
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5e5, told


ROUNDS = [60, pytest.param(800, marks=pytest.mark.full)]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_broken_weights(tmp_path, rounds):
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for load, (tensors, metadata) in whole().items():
        about = {"model_type": "siglip", "vision_config": {"num_attention_heads": 2, "image_size": 16}}
        about |= {"num_attention_heads": 2} if load is semtok.load_siglip else {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        config.write_text(json.dumps(about))
        path.write_bytes(save(tensors, metadata))
        load(str(path))
        for seed in range(rounds):
            rng = random.Random(seed)
            path.write_bytes(broken_weights(tensors, metadata, rng) if seed % 5 else save(tensors, metadata))
            text = json.dumps(edited(about, rng)).encode() if seed % 5 == 0 else json.dumps(about).encode()
            config.write_bytes(damaged(text, rng) if seed % 25 == 0 else text)
            attempt(load, path, f"{load.__name__}, seed {seed}")


@pytest.mark.parametrize("rounds", ROUNDS)
def test_broken_pictures(tmp_path, rounds):
    Image.init()
    noise, files = Image.effect_noise((70, 50), 90), {}
    for form in sorted(Image.SAVE):
        for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "F"):
            try:
                noise.convert("L").convert(mode).save(file := io.BytesIO(), form)
                files[form, mode] = file.getvalue()
            except Exception:  # this format does not have this mode
                continue
    assert {"PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"} <= {form for form, _ in files}
    for (form, mode), data in files.items():
        for seed in range(rounds // 8):
            rng = random.Random(seed)
            (tmp_path / "picture.png").write_bytes(damaged(data, rng) if seed else data)
            size = rng.choice([None, 32])
            attempt(lambda path: semtok.read_picture(path, size), tmp_path / "picture.png", f"{form} {mode} {seed}")
