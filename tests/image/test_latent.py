"""Latents: the patcher, shards of latents, and equal runs on pixels and on precomputed latents.

The autoencoder is a small one with random weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.numpy import load, save

from data_prep import train_vae
from data_prep.latents import main as precompute
from mmgen.config import Config
from mmgen.config_io import override
from mmgen.data.documents import DecodedImage
from mmgen.data.latents import find_facts
from mmgen.data.loader import Corpus
from mmgen.data.order import Position
from mmgen.data.shards.samples import BadSample
from mmgen.evaluate.features import Pictures
from mmgen.evaluate.report import held_out_losses
from mmgen.generate.decoder import Decoder, Request
from mmgen.image import latent
from mmgen.image.latent import AutoencoderFacts, LatentPatcher
from mmgen.image.patch import cut
from mmgen.sequence.batch import prepare
from mmgen.sequence.tokenizer import Tokenizer
from mmgen.train.checkpoint.read import load_model
from mmgen.train.loop import train
from tests.conftest import awake, picture, png, tiny, write_tar

SMALL = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 3}  # fmt: skip


def autoencoder(folder: Path, seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    AutoencoderKL(**{**SMALL, "scaling_factor": 0.7, "shift_factor": 0.1, **changes}).save_pretrained(folder)
    return folder


def latent_config(tmp: Path, vae: Path, **changes: dict) -> Config:
    """Like `tiny`, but pictures of 8x8 and 12x8 pixels become latents of 3x4x4 and 3x6x4."""
    shard = tmp / "images" / "train-000.tar"
    if not shard.exists():
        shard.parent.mkdir()
        rng = np.random.default_rng(0)
        members: dict[str, bytes] = {}
        for i in range(24):
            members[f"{i:04d}.png"] = png(picture(rng, (8, 8) if i % 3 else (12, 8)))
            members[f"{i:04d}.json"] = json.dumps({"caption": f"picture {i}"}).encode()
        listed = ["two of them", {"image": "9990.a.png"}, "and", {"image": "9990.b.png"}]
        members |= {"9990.a.png": png(picture(rng, (8, 8))), "9990.b.png": png(picture(rng, (12, 8)))}
        members |= {"9990.json": json.dumps(listed).encode(), "9991.txt": b"words alone"}
        write_tar(shard, members)
    patcher = {"kind": "vae", "vae": {"name": str(vae), "channels": 3, "factor": 2}, "patch_size": 2,
               "image_sizes": [[8, 8], [12, 8]]}  # fmt: skip
    config = tiny(tmp, data={"train": [str(shard)], "val": [str(shard)], "row_length": 64}, model={"patcher": patcher})
    return override(config, changes)


def words(config: Config) -> Tokenizer:
    return Tokenizer.of(config)


def precomputed(tmp: Path, config: Config, name: str = "latents", **options: bool) -> Config:
    """The configuration with shards of latents that `data_prep.latents` wrote."""
    (tmp / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    precompute(config=tmp / "config.yaml", out=tmp / name, **options)
    shard = str(tmp / name / "train-000.tar")
    return override(config, {"data": {"train": [shard], "val": [shard]}, "run": {"dir": str(tmp / "run" / name)}})


def losses(config: Config) -> list[dict]:
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in lines]


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return autoencoder(tmp_path / "vae")


def test_latents_are_those_of_diffusers(tmp_path: Path, vae: Path) -> None:
    """Encoding equals a direct call of diffusers with the scaling of its pipelines, and decoding inverts it."""
    config = latent_config(tmp_path, vae)
    patcher = LatentPatcher(config.model.patcher)
    image = picture(np.random.default_rng(1), (12, 8))
    x_NP, grid = patcher.encode(image)
    assert grid == (3, 2)
    assert x_NP.shape == (6, config.model.patcher.patch_length) == (6, 12)

    library = AutoencoderKL.from_pretrained(vae)
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        raw = library.encode(pixels).latent_dist.mode()
        scaled = (raw - 0.1) * 0.7
        shown = library.decode(scaled / 0.7 + 0.1).sample[0].permute(1, 2, 0)
    np.testing.assert_allclose(x_NP, cut(scaled[0].permute(1, 2, 0).numpy(), 2)[0], atol=1e-6)
    wanted = ((shown + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    assert np.abs(np.asarray(patcher.decode(x_NP, grid)).astype(int) - wanted).max() <= 1
    rows, found = patcher.encode_stored(raw[0].numpy())
    assert found == grid
    np.testing.assert_allclose(rows, x_NP, atol=1e-6)


@pytest.mark.parametrize(
    ("written", "mean", "std"),
    [
        ({"scaling_factor": 0.5, "shift_factor": None}, 0.0, 2.0),
        ({"scaling_factor": 0.5, "shift_factor": 0.2}, 0.2, 2.0),
        ({"scaling_factor": 2.0, "latents_mean": [1.0, 2.0, 3.0], "latents_std": [4.0, 4.0, 4.0]}, [1, 2, 3], 2.0),
    ],
)
def test_scaling_comes_from_the_configuration(tmp_path: Path, written: dict, mean: object, std: float) -> None:
    config = latent_config(tmp_path, autoencoder(tmp_path / "other", **written))
    found = LatentPatcher(config.model.patcher).statistics
    np.testing.assert_allclose(found[0], np.broadcast_to(mean, 3))
    np.testing.assert_allclose(found[1], np.broadcast_to(std, 3))


def test_statistics_are_measured_where_none_are_written(tmp_path: Path, vae: Path) -> None:
    """Normalised latents of the training images have mean 0 and std 1, from pixels and from stored latents."""
    written = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(
        json.dumps({k: v for k, v in written.items() if k not in ("scaling_factor", "shift_factor")})
    )
    config = latent_config(tmp_path, vae)
    with pytest.raises(ValueError, match="neither scaling_factor nor latents_mean"):
        _ = LatentPatcher(config.model.patcher).statistics
    known = find_facts(config, words(config))
    batches = epoch(config, known)
    cells = torch.cat([b.x_IP.view(-1, 4, 3).flatten(0, 1) for b in batches]).double()
    np.testing.assert_allclose(cells.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(cells.std(0, correction=0), 1, atol=1e-5)
    stored = find_facts(precomputed(tmp_path, config), words(config))
    np.testing.assert_allclose(stored.mean, known.mean, atol=1e-5)
    np.testing.assert_allclose(stored.std, known.std, atol=1e-5)


def epoch(config: Config, facts: AutoencoderFacts | None = None) -> list:
    """All batches of an epoch, as they enter the model."""
    config = override(config, {"train": {"batch_rows": 64}})
    corpus = Corpus(config.data.train, words(config), config, facts)
    rows = list(corpus.plan.epoch_rows(0))
    return [prepare(raw, corpus.patcher) for raw in corpus.step(0, rows, Position()).micro]


@pytest.mark.parametrize(
    "objective",
    [{"transfusion": {"context": "clean_copy"}}, {"kind": "mar"}, {"kind": "mar", "mar": {"order": "random"}}],
)
def test_batches_online_equal_precomputed(tmp_path: Path, vae: Path, objective: dict) -> None:
    """In rows with mixed copies, orders and sizes, every block has the latents of its own image."""
    config = latent_config(tmp_path, vae, objective=objective)
    one, two = epoch(config), epoch(precomputed(tmp_path, config))
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.x_IP.dtype == b.x_IP.dtype == torch.float32
        assert len(a.x_IP) > 50
        torch.testing.assert_close(a.x_IP, b.x_IP, atol=2e-6, rtol=1e-5)
        assert torch.equal(a.ids_BS, b.ids_BS)
        assert torch.equal(a.cell_I2, b.cell_I2)
        assert all(torch.equal(a.draws[name], b.draws[name]) for name in a.draws)
        assert torch.equal(a.eps_JKP, b.eps_JKP)


@pytest.mark.parametrize("objective", [{}, {"kind": "mar"}])
def test_a_run_online_is_the_run_precomputed(tmp_path: Path, vae: Path, objective: dict) -> None:
    """The losses are equal, the checkpoint has no autoencoder, and the run resumes, draws and reads images."""
    config = latent_config(tmp_path, vae, objective=objective, data={"workers": 1}, train={"steps": 3})
    stored = precomputed(tmp_path, config)
    assert train(config) == train(stored) == 0
    for a, b in zip(losses(config), losses(stored), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    assert {"loss/image", "val_loss/image"} <= {name for line in losses(config) for name in line}

    model, tokenizer = load_model(config.run.dir / "checkpoints" / "latest")
    assert not [name for name in model.state_dict() if "encoder" in name or "decoder" in name or "quant" in name]
    library = AutoencoderKL.from_pretrained(vae)
    assert model.autoencoder.fingerprint == latent.fingerprint(library)
    assert model.autoencoder.std == pytest.approx([1 / 0.7] * 3)
    decoder = Decoder(model, tokenizer, config.sample)
    results = decoder.generate([Request(["one"], "image", 1), Request(["two"], "image", 2, grid=(3, 2))])
    assert [result.images[0].size for result in results] == [(8, 8), (8, 12)]
    assert decoder.generate([Request([results[1].images[0]], "text")])[0].text is not None

    assert train(override(config, {"train": {"steps": 4}})) == 0  # the same settings, without the facts


def test_images_are_decoded_in_batches(tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that finish together are decoded in one call, and each equals the image that is decoded alone."""
    config = latent_config(tmp_path, vae)
    model, tokenizer = awake(config)
    decoder = Decoder(model, tokenizer, config.sample)
    module = decoder.patcher.autoencoder.module
    sizes, decode = [], module.decode
    monkeypatch.setattr(module, "decode", lambda z: sizes.append(len(z)) or decode(z))
    requests = [Request([f"{i}"], "image", i) for i in range(5)]
    together = decoder.generate(requests)
    assert sizes == [5]
    alone = decoder.generate(requests[3:4])[0].images[0]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(together[3].images[0])).max() <= 1


def test_shards_of_latents_keep_the_samples(tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, keys, captions and order are kept, a second call writes nothing, another autoencoder is rejected."""
    import tarfile

    config = latent_config(tmp_path, vae)
    stored = precomputed(tmp_path, config)
    path = Path(stored.data.train[0])
    with tarfile.open(path) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    assert load(found["0000.safetensors"])["latent"].shape == (3, 6, 4)
    assert json.loads(found["0001.json"]) == {"caption": "picture 1"}
    assert json.loads(found["9990.json"])[1] == {"image": "9990.a.safetensors"}
    assert found["9991.txt"] == b"words alone"
    before = path.stat().st_mtime_ns
    precomputed(tmp_path, config)
    assert path.stat().st_mtime_ns == before
    assert "exists" in capsys.readouterr().err
    path.unlink()
    path.with_name(path.name + ".part").write_bytes(b"half a shard")
    precomputed(tmp_path, config)
    with tarfile.open(path) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar.getmembers()} == found
    other = latent_config(tmp_path, autoencoder(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="made with other settings: fingerprint"):
        precomputed(tmp_path, other)
    half = precomputed(tmp_path, config, "half", half=True)
    torch.testing.assert_close(epoch(half)[0].x_IP, epoch(stored)[0].x_IP, atol=2e-3, rtol=2e-3)


def npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_bad_latents_are_bad_samples(tmp_path: Path, vae: Path) -> None:
    """Foreign `.npy` and `.safetensors` files load; arrays that are not finite, misshapen or pickled are bad samples."""
    rng = np.random.default_rng(0)
    good = rng.standard_normal((3, 4, 4)).astype(np.float32)
    nan = good.copy()
    nan[0, 0, 0] = np.nan
    members = {
        "a.npy": npy(good), "b.safetensors": save({"x": good.astype(np.float16)}), "c.npy": npy(nan),
        "d.npy": npy(np.array([{"a": 1}], dtype=object)), "e.npy": npy(good[:2]), "f.npy": npy(good[:, :, :3]),
        "g.npy": npy(np.concatenate([good, good], 2)), "h.npy": npy(good)[:-8],
    }  # fmt: skip
    captioned: dict[str, bytes] = {}
    for name, data in members.items():
        captioned |= {name: data, f"{name.split('.')[0]}.txt": b"x"}
    shard = write_tar(tmp_path / "latents.tar", captioned)
    config = latent_config(tmp_path, vae, data={"train": [str(shard)]})
    corpus = Corpus([str(shard)], words(config), config)
    reasons = {bad.key: bad.reason for bad in corpus.bad}
    usable = []
    for index in range(len(corpus.samples)):
        _, key = corpus.dataset.name(index)
        try:
            (_,) = [s for s in corpus.decoded(0, index).segments if isinstance(s, DecodedImage)]
            usable.append(key)
        except BadSample as error:
            reasons[key] = str(error)
    assert usable == ["a", "b"]
    wanted = {"c": "not finite", "d": "Python objects", "e": "not of 3 channels", "f": "not divisible",
              "g": "8x16 pixels, which model.patcher.image_sizes does not declare", "h": "cannot be read"}  # fmt: skip
    assert wanted.keys() == reasons.keys()
    for key, reason in wanted.items():
        assert reason in reasons[key]


def test_settings_that_do_not_fit_the_autoencoder_are_named(tmp_path: Path, vae: Path) -> None:
    config = latent_config(tmp_path, vae)
    stored = precomputed(tmp_path, config)

    def patcher(**changes: object) -> Config:
        return override(config, {"model": {"patcher": changes}})

    for change, message in (
        ({"vae": {"name": str(tmp_path / "nowhere")}}, "nowhere' cannot be loaded as an AutoencoderKL"),
        ({"vae": {"channels": 4}}, "vae.channels is 4, but that of the autoencoder .* is 3"),
        ({"vae": {"factor": 4}, "patch_size": 1}, "vae.factor is 4, but that of the autoencoder .* is 2"),
        ({"channels": 1}, "patcher.channels is 1, but that of the autoencoder .* is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            train(patcher(**change))
    for change, message in (
        ({"image_sizes": [[10, 8]]}, "10x8 is not divisible by patch_size 2 times 2"),
        ({"vae": {"name": ""}}, "no autoencoder is named"),
        ({"vae": {"mean": [0.0]}}, "mean has 1 numbers for 3 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            patcher(**change)
    other = autoencoder(tmp_path / "other", seed=1)
    facts = AutoencoderFacts("0123", [0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="not those that this model was trained with"):
        LatentPatcher(config.model.patcher, facts=facts).load()
    with pytest.raises(ValueError, match="come from another autoencoder"):
        train(override(stored, {"model": {"patcher": {"vae": {"name": str(other)}}}}))
    pixels = {"kind": "pixels", "patch_size": 4}
    with pytest.raises(ValueError, match="holds latents, but model.patcher.kind is pixels"):
        train(override(stored, {"model": {"patcher": pixels}}))
    with pytest.raises(ValueError, match="name shards of one kind"):
        train(override(stored, {"data": {"train": stored.data.train + config.data.train}}))


def test_a_changed_autoencoder_is_noticed(tmp_path: Path, vae: Path) -> None:
    """With other weights in the folder of the autoencoder, a run does not resume and a model does not draw."""
    config = latent_config(tmp_path, vae, train={"steps": 1, "save_every": 1}, data={"val": []})
    assert train(config) == 0
    autoencoder(vae, seed=5)
    latent._load.cache_clear()
    with pytest.raises(ValueError, match="not those that this model was trained with"):
        train(override(config, {"train": {"steps": 2}}))
    model, tokenizer = load_model(config.run.dir / "checkpoints" / "latest")
    with pytest.raises(ValueError, match="not those that this model was trained with"):
        Decoder(model, tokenizer, config.sample).generate([Request(["a"], "image")])


def test_an_autoencoder_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped and resumed has the weights of an uninterrupted run, and its folder loads."""
    config = latent_config(tmp_path, tmp_path / "made")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    settings = train_vae.Settings(steps=5, batch=8, width=4)

    def run(out: Path | None = None, **changes: float) -> None:
        train_vae.main(config=tmp_path / "config.yaml", out=out, save_every=2, settings=replace(settings, **changes))

    run(tmp_path / "whole")
    learn = train_vae.Trainer.learn

    def stops(self: train_vae.Trainer, *given: object) -> tuple[float, float]:
        if self.step == 3:
            raise KeyboardInterrupt
        return learn(self, *given)

    monkeypatch.setattr(train_vae.Trainer, "learn", stops)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(train_vae.Trainer, "learn", learn)
    with pytest.raises(ValueError, match="started with other settings: lr"):
        run(lr=0.5)
    run()
    one, two = (AutoencoderKL.from_pretrained(tmp_path / name) for name in ("whole", "made"))
    assert latent.fingerprint(one) == latent.fingerprint(two)
    assert len(one.config.latents_mean) == len(one.config.latents_std) == 3
    cells = torch.cat([b.x_IP.view(-1, 4, 3).flatten(0, 1) for b in epoch(config)]).double()
    np.testing.assert_allclose(cells.std(0, correction=0), 1, atol=1e-4)
    fresh = train_vae.build(config, settings)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    assert not torch.equal(fresh.encode(images).latent_dist.mode(), one.encode(images).latent_dist.mode())


def test_latents_in_the_evaluation(tmp_path: Path, vae: Path) -> None:
    """Pictures from shards of latents equal decoded images, and held-out losses are computed."""
    shard, rng, members = tmp_path / "train-000.tar", np.random.default_rng(0), dict[str, bytes]()
    for i in range(6):
        members[f"{i}.png"] = png(picture(rng, (8, 8) if i % 3 else (12, 8)))
        members[f"{i}.json"] = json.dumps({"caption": f"a {i}", "objects": [{"digit": i}]}).encode()
    write_tar(shard, members)
    config = latent_config(tmp_path, vae, data={"train": [str(shard)], "val": [str(shard)]})
    stored = precomputed(tmp_path, config)
    patcher = LatentPatcher(config.model.patcher)
    images, decoded = (Pictures(c.data.train, patcher, []) for c in (config, stored))
    assert [sample.key for sample in images.samples] == [sample.key for sample in decoded.samples]
    for image, shown in zip(images.images, decoded.images, strict=True):
        again = patcher.decode(*patcher.encode(image))
        assert np.abs(np.asarray(again).astype(int) - np.asarray(shown)).max() <= 1
    model, tokenizer = awake(config, torch.float32)
    one, two = (held_out_losses(model, Corpus(c.data.val, tokenizer, c)) for c in (config, stored))
    assert one.val_loss_image == pytest.approx(two.val_loss_image, rel=1e-5)
