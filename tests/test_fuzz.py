"""Broken files: their readers succeed or raise UserError, in little time and memory."""

import contextlib
import io
import json
import random
import resource
import struct
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ar  # noqa: E402
import fid  # noqa: E402
import mmdit  # noqa: E402
import sample  # noqa: E402
import semtok  # noqa: E402
import train  # noqa: E402

ROUNDS = pytest.mark.parametrize("rounds", [50, pytest.param(800, marks=pytest.mark.full)])
SIZES = replace(
    semtok.PRESETS["tiny"], image_size=16, tokens=4, bits=6, encoder_depth=1, encoder_width=16,
    encoder_heads=2, decoder_depth=1, decoder_width=16, decoder_heads=2, decoder_dual_depth=1,
    vae=semtok.VAEConfig((8, 16), 1, 4),
)
AR, SIGLIP = ar.ARConfig(1, 16, 2, tokens=4, bits=6, classes=2), semtok.SigLIPConfig(16, 1, 2, 16, 8, 2)
ABSURD = [
    None, True, -1, 0, 1, 2, 1000, 10**5, 10**9, 2**40, 2**70, 10**400, 0.5, 1e308, float("nan"), "", "x\n",
    "F4", "C64", "F8_E8M0", [], [1], [10**9] * 3, [2] * 40, [None], {}, {"x": 1}, "[" * 3000, "9" * 5000,
]
SHAPES = [(0, 2**40), (2**40, 0), (), (1,), (100_000, 16), (16, 100_000), (1, 1, 1, 1), (3_000_000,)]
BESIDE = {"model_type": "siglip", "scaling_factor": 1.5305, "shift_factor": 0.0609}  # config.json
BESIDE |= {"vision_config": {"num_attention_heads": 2, "image_size": 16}}


def load_sd35(path):
    with torch.device("meta"):
        decoder = semtok.Decoder(SIZES)
    mmdit.load_sd35(decoder, path)


def whole():
    """(loader, tensors, metadata) of a file of each kind that we read."""
    for load, form, model in (
        (semtok.load_semtok, "semtok-tokenizer", semtok.SemTok(SIZES)),
        (ar.load_ar, "semtok-ar", ar.MaskedAR(AR)),
        (semtok.load_vae, "", semtok.VAE(SIZES.vae)), (semtok.load_siglip, "", semtok.SigLIP(SIGLIP)),
        (load_sd35, "", semtok.Decoder(SIZES)),
    ):
        about = {"format": form, "config": json.dumps(asdict(model.config)) if form else ""}
        tensors = {n: t for n, t in model.state_dict().items() if load is not load_sd35 or "token" not in n}
        if load is load_sd35:
            shapes = {"0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
            tensors |= {f"y_embedder.mlp.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        yield load, tensors, about | {"classes": '["a", "b"]', "fingerprint": "f", "parent": "t"}


def damaged(data, rng):
    """Bytes with one of the usual accidents."""
    data, where = bytearray(data), min(rng.randrange(len(data)), rng.randrange(len(data)))  # rather in front
    kind, many = rng.randrange(5), rng.choice([1, 8, 500])
    if kind < 4:  # the rest is lost, or a stretch is lost, zero or there twice
        new = [b"", b"", bytes(many), bytes(data[where:][: 2 * many])][kind]
        data[where : where + (many if kind else len(data))] = new
    for place in rng.sample(range(len(data)), min(len(data), many)) if kind == 4 else ():
        data[place] = rng.choice([0, 255, rng.randrange(256), data[place] ^ 1 << rng.randrange(8)])
    return bytes(data)


def edited(table, rng):
    """A JSON table with one entry, at any depth, gone, absurd or new."""
    key = rng.choice([*table, "new"])
    if isinstance(table.get(key), dict) and rng.random() < 0.7:
        return table | {key: edited(table[key], rng)}
    if key == "config" and table[key] and rng.random() < 0.9:  # a table as text
        return table | {key: json.dumps(edited(json.loads(table[key]), rng))}
    rest = {name: value for name, value in table.items() if name != key}
    return rest | {key: rng.choice(ABSURD)} if rng.random() < 0.8 else rest


def broken_weights(tensors, metadata, rng):
    """A safetensors file with damage in its metadata, tensors, header or bytes."""
    kind, name = rng.randrange(4), rng.choice(sorted(tensors))
    if kind == 0:
        metadata = edited(metadata, rng)
        metadata = {key: text if type(text) is str else json.dumps(text) for key, text in metadata.items()}
    if kind == 1:
        other = rng.choice([torch.zeros(rng.choice(SHAPES)), tensors[name].bool(), tensors[name].cfloat()])
        tensors = tensors | {rng.choice([name, name, name + "\n"]): other}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    if kind == 2:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(edited(json.loads(data[8 : 8 + length]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return damaged(data, rng) if kind == 3 else data


def attempt(read, *arguments):
    """Success or a UserError of one line, in 5 s of work and half a gigabyte -> what was read, or None."""
    before, start, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), None
    try:
        found = read(*arguments)
    except (mmdit.UserError, fid.UserError) as error:
        assert "\n" not in str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.process_time() - start < 5 and grown < 5e5
    return found


@ROUNDS
@pytest.mark.filterwarnings("ignore")
def test_broken_weights(tmp_path, rounds):
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for load, tensors, metadata in whole():
        path.write_bytes(save(tensors, metadata))
        config.write_text(json.dumps(BESIDE))
        load(str(path))  # as it is, each is taken
        for seed in range(rounds):
            print(load.__name__, seed)
            rng, beside = random.Random(seed), seed % 5 == 0  # is the damage in config.json?
            path.write_bytes(save(tensors, metadata) if beside else broken_weights(tensors, metadata, rng))
            text = json.dumps(edited(BESIDE, rng) if beside else BESIDE).encode()
            config.write_bytes(damaged(text, rng) if seed % 25 == 0 else text)
            attempt(load, str(path))


@ROUNDS
@pytest.mark.filterwarnings("ignore")
def test_broken_pictures(tmp_path, rounds):
    Image.init()
    noise, files, path = Image.effect_noise((70, 50), 90), {}, tmp_path / "picture.png"
    for form in sorted(Image.SAVE):
        for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "F"):
            with contextlib.suppress(Exception):  # formats that do not have this mode
                noise.convert(mode).save(file := io.BytesIO(), form)
                files[form, mode] = file.getvalue()
    assert {"PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "DDS"} <= {form for form, _ in files}
    for (form, mode), data in files.items():
        for seed in range(rounds // 8):
            print(form, mode, seed)
            rng = random.Random(seed)
            path.write_bytes(damaged(data, rng) if seed and data else data)
            attempt(fid.read_picture, str(path), rng.choice([None, 32]))


@ROUNDS
@pytest.mark.filterwarnings("ignore")
def test_broken_states(tmp_path, rounds):
    """Damage in a shard or in state.json, or a state of other tensors: the one before, or a sentence."""
    state = {"weights/a": torch.ones(3, 4), "ema/a": torch.ones(3, 4), "buffers/b": torch.ones(1)}
    for step in (1, 2):
        train.save_state(str(tmp_path), step, state, {"parent": "", "skipped": 2})
    shard, table = (next(tmp_path.glob(f"step-0000002/*.{end}")) for end in ("safetensors", "json"))
    good, about = shard.read_bytes(), json.loads(table.read_text())
    for seed in range(rounds):
        rng, tensors = random.Random(seed), {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        kind, name = seed % 4, rng.choice(sorted(state))
        others = state | {name: rng.choice([torch.zeros(300, 300), torch.zeros(2), state[name].char()])}
        others = {n: tensor for n, tensor in others.items() if kind == 2 or n != name}
        shard.write_bytes([damaged(good, rng), good, save(others), save(others)][kind])
        told = edited(about, rng) if kind == 1 else about | {"bytes": {shard.name: shard.stat().st_size}}
        table.write_text(json.dumps(told if kind else about))
        facts = attempt(train.load_state, str(tmp_path), tensors)
        assert facts is None or facts["step"] in (1, 2)
        assert all(tensors[name].shape == tensor.shape for name, tensor in state.items())


@ROUNDS
def test_broken_settings(tmp_path, rounds):
    """settings.json, damaged or with an absurd entry, of a run whose first stage has begun."""
    (tmp_path / "stage1.safetensors").touch()
    changes = {"set": {"1": {"lr": "0.1"}, "ar": {"flip": "0"}, "sizes": {"bits": "16"}}}
    for seed in range(4 * rounds):
        rng = random.Random(seed)
        table = train.NEW_RUN | changes | rng.choice([{}, {"preset": "paper", "ar_size": "L", "data": "x"}])
        text = json.dumps(edited(table, rng) if seed % 4 else table).encode()
        (tmp_path / "settings.json").write_bytes(text if seed % 4 else damaged(text, rng))
        words = ["--stage", rng.choice(["1", "2", "ar", "all"]), "--out", str(tmp_path), "--lr", "1"]
        attempt(train.open_run, train.parse_arguments(words))


@ROUNDS
def test_words_thrown_together_on_a_command_line(tmp_path, rounds, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    values = ["", "0", "-1", "1e400", "nan", "2**64", "9" * 400, "x\ny", "\udcff", "file", "none", "cuda:9"]
    for name in train.setting_names("ar"):
        values += [f"{name}={value}" for value in ("", "0", "-1", "nan", "9" * 12)]
    both = "steps batch-size seed device compile "
    flags = {
        train: both + "data stage set lr workers accumulate weights overwrite preset ar-size",
        sample: both + "run n cfg cfg-schedule top-p order npz image class labels reconstruct progress out",
    }
    for seed in range(4 * rounds):
        rng, (command, options) = random.Random(seed), list(flags.items())[seed % 2]
        stage = rng.choice([*train.STAGES, "all"])
        words = ["--run=none"] if command is sample else ["--data=none", f"--stage={stage}"]
        for _ in range(rng.randrange(1, 4)):
            words += ["--" + rng.choice(options.split()), rng.choice(values)][: rng.choice([1, 2, 2, 2])]
        start = time.process_time()
        try:
            code = command.command_line(words)
        except SystemExit as stop:
            code = stop.code
        said, name = capfd.readouterr().err, command.__name__
        assert code == 2 and said.count("\n") == 1 and said.startswith(f"{name}.py: "), (words, said)
        assert time.process_time() - start < 20
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "runs", "none"}
    assert Path("file").read_text() == "in the way"
