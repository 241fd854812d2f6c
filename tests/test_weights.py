"""Weights: from a Hub on loopback, through the real client, from local files, and from bytes kept in an object."""

import json
import logging
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import Repository, running
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file

import sthisto
from sthisto import encoders
from sthisto.encoders import ENCODERS, _weights

TINY = {
    "architecture": "test_vit",
    "num_classes": 0,
    "model_args": {"img_size": 64, "reg_tokens": 2, "init_values": 1.0},
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "mean": [0.7, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "num_classes": 0,
        "classifier": "head",
        "license": "mit",
    },
}


@pytest.fixture(scope="session")
def tiny():
    """The tiny ViT with random weights."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, **TINY["model_args"]).eval()


@pytest.fixture(scope="session")
def weights(tiny):
    """Bytes of its safetensors file."""
    return save(tiny.state_dict())


@pytest.fixture
def hub(weights, tmp_path, monkeypatch):
    """A Hub with a public and a gated repository, which the client of this process asks; an empty cache, no token."""
    files = {"config.json": json.dumps(TINY).encode(), "model.safetensors": weights, "README.md": b"# Tiny"}
    with running() as server:
        server.repositories["lab/tiny"] = Repository(dict(files))
        server.repositories["lab/gated"] = Repository(
            dict(files), license="cc-by-nc-nd-4.0", gated=True, allowed={"hf_good"}
        )
        point(monkeypatch, server.url, tmp_path)
        yield server


def point(monkeypatch, url, home):
    """What HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE do before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def patches(n=3, side=64):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def in_memory(network, mean, std):
    """Features of the patches by the network alone."""
    colors = (torch.tensor(patches()).permute(0, 3, 1, 2) / 255 - color(mean)) / color(std)
    with torch.no_grad():
        return network(colors).numpy()


def color(values):
    return torch.tensor(values).view(3, 1, 1)


# The Hub


def test_a_public_repository_is_downloaded_and_known(hub, tiny, weights):
    encoder = encoders.load("hf-hub:lab/tiny")
    expected = in_memory(tiny, TINY["pretrained_cfg"]["mean"], TINY["pretrained_cfg"]["std"])
    np.testing.assert_allclose(encoder(patches()), expected, atol=1e-5)
    assert (encoder.input_size, encoder.patch_um, encoder.dim, encoder.stride) == (64, 32.0, 64, 16)
    about = encoder.provenance
    assert about["repo_id"] == "lab/tiny"
    assert about["revision"] == hub.repositories["lab/tiny"].commit
    assert (about["file"], about["sha256"]) == ("model.safetensors", sha256(weights).hexdigest())
    assert (about["license"], about["gated"]) == ("apache-2.0", False)


@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_a_revision_is_resolved_to_its_commit(hub, revision):
    commit = hub.repositories["lab/tiny"].commit
    asked = commit if revision == "commit" else revision
    assert encoders.load("hf-hub:lab/tiny", revision=asked).provenance["revision"] == commit
    assert encoders.load(f"hf-hub:lab/tiny@{asked}").provenance["revision"] == commit


def test_an_entry_of_the_registry_comes_from_its_repository(hub, monkeypatch, caplog):
    small = replace(ENCODERS["kaiko-s16"], architecture="test_vit", params={"reg_tokens": 2}, input_size=64)
    monkeypatch.setitem(ENCODERS, "kaiko-s16", small)
    hub.repositories[small.weights] = hub.repositories["lab/tiny"]
    caplog.set_level(logging.INFO, "sthisto")
    encoder = encoders.load("kaiko-s16")
    assert (encoder.name, encoder.provenance["repo_id"]) == ("kaiko-s16", small.weights)
    assert json.loads(encoder.provenance["params"]) == TINY["model_args"]  # what the registry leaves open
    np.testing.assert_allclose(encoder.provenance["mean"], 0.5)  # as it was trained, whatever the copy says
    assert "the repository's config.json has [0.7, 0.5, 0.6]" in caplog.text


def test_a_name_of_timms_comes_from_timms_repository(hub):
    network = timm.create_model("test_vit")
    hub.repositories["timm/test_vit.r160_in1k"] = Repository({"model.safetensors": save(network.state_dict())})
    encoder = encoders.load("test_vit")
    assert (encoder.input_size, encoder.dim) == (160, 64)
    assert encoder.provenance["repo_id"] == "timm/test_vit.r160_in1k"
    assert encoder.provenance["license"] == "apache-2.0"


def test_safetensors_are_preferred_and_pickles_read_as_tensors_alone(hub, tiny, tmp_path):
    torch.save({"state_dict": {f"module.{name}": value for name, value in tiny.state_dict().items()}}, tmp_path / "w")
    pickled = (tmp_path / "w").read_bytes()
    repository = hub.repositories["lab/tiny"]
    repository.files["pytorch_model.bin"] = pickled
    first = encoders.load("hf-hub:lab/tiny")
    assert first.provenance["file"] == "model.safetensors"
    del repository.files["model.safetensors"]
    second = encoders.load("hf-hub:lab/tiny")
    assert second.provenance["file"] == "pytorch_model.bin"
    np.testing.assert_array_equal(first(patches()), second(patches()))


def test_gated_without_a_token(hub):
    with pytest.raises(PermissionError) as caught:
        encoders.load("hf-hub:lab/gated")
    said = str(caught.value)
    for part in (
        "'lab/gated'",
        "no token is set",
        f"{hub.url}/lab/gated",
        "hf auth login",
        "HF_TOKEN",
        "h-optimus-0",
    ):
        assert part in said
    assert "Open to everyone are: handcrafted, h-optimus-0, midnight, kaiko-b8" in said
    assert "virchow2" not in said.split("Open")[1]


@pytest.mark.parametrize(("token", "repo"), [("hf_other", "gated"), ("hf_expired", "gated"), ("hf_expired", "tiny")])
def test_a_refused_token_is_told_and_not_shown(hub, monkeypatch, caplog, token, repo):
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PermissionError, match="the token in use is refused") as caught:
        encoders.load(f"hf-hub:lab/{repo}")
    whole = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert hub.url in whole
    assert token not in whole


def test_gated_with_a_good_token(hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    caplog.set_level(logging.DEBUG)
    encoder = encoders.load("hf-hub:lab/gated")
    assert (encoder.provenance["gated"], encoder.provenance["license"]) == (True, "cc-by-nc-nd-4.0")
    assert "hf_good" not in repr(encoder.provenance) + caplog.text


def test_an_unknown_repository_and_an_unknown_revision(hub):
    with pytest.raises(FileNotFoundError, match="no repository 'lab/unicorn' at http"):
        encoders.load("hf-hub:lab/unicorn")
    with pytest.raises(FileNotFoundError, match="'lab/tiny' has no revision 'v9'"):
        encoders.load("hf-hub:lab/tiny", revision="v9")
    with pytest.raises(ValueError, match="'lab/tiny/more' is no repository of the Hub"):
        encoders.load("hf-hub:lab/tiny/more")


def test_a_repository_without_weights_or_without_an_architecture(hub):
    files = hub.repositories["lab/tiny"].files
    hub.repositories["lab/bare"] = Repository({"README.md": b""})
    hub.repositories["lab/mute"] = Repository({"model.safetensors": files["model.safetensors"]})
    with pytest.raises(FileNotFoundError, match=r"'lab/bare' on the Hub has no single file of weights .*README.md"):
        encoders.load("hf-hub:lab/bare")
    with pytest.raises(ValueError, match=r"no config.json that names its architecture"):
        encoders.load("hf-hub:lab/mute")


def test_a_download_that_is_cut_goes_on_where_it_was(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)  # the file is smaller than one of the usual 10 MB
    hub.cuts = 1
    encoder = encoders.load("hf-hub:lab/tiny")
    assert encoder.provenance["sha256"] == hub.repositories["lab/tiny"].digest("model.safetensors")
    half = len(hub.repositories["lab/tiny"].files["model.safetensors"]) // 2
    [again] = [asked for _, _, asked in hub.asked if asked]
    assert half - (1 << 12) < int(again.removeprefix("bytes=").rstrip("-")) <= half


def test_a_download_that_is_cut_for_good_is_told_and_the_next_try_is_whole(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cuts = 1000
    with pytest.raises(ConnectionError, match=r"download of 'lab/tiny' from http.* was cut.*Load again"):
        encoders.load("hf-hub:lab/tiny")
    hub.cuts = 0
    encoder = encoders.load("hf-hub:lab/tiny")
    assert encoder.provenance["sha256"] == hub.repositories["lab/tiny"].digest("model.safetensors")


def test_a_wrong_checksum_is_refused(hub, weights):
    wrong = sha256(b"other").hexdigest()
    hub.repositories["lab/tiny"].stated["model.safetensors"] = wrong
    with pytest.raises(ValueError, match=f"is damaged: its SHA-256 is {sha256(weights).hexdigest()}.*{wrong}.*Delete"):
        encoders.load("hf-hub:lab/tiny")


def test_a_file_damaged_in_the_cache_is_refused_online_and_offline(hub, monkeypatch):
    path = _weights.from_hub("lab/tiny").path.resolve()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        encoders.load("hf-hub:lab/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is damaged"):
        encoders.load("hf-hub:lab/tiny")


def test_offline_with_a_cache_and_without(hub, monkeypatch):
    online = encoders.load("hf-hub:lab/tiny")
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = encoders.load("hf-hub:lab/tiny")
    assert len(hub.asked) == asked
    np.testing.assert_array_equal(offline(patches()), online(patches()))
    same = {name: offline.provenance[name] for name in ("revision", "file", "sha256")}
    assert same == {name: online.provenance[name] for name in same}
    with pytest.raises(
        FileNotFoundError, match=r"HF_HUB_OFFLINE is set, and the cache .* has no weights of 'lab/gated'"
    ):
        encoders.load("hf-hub:lab/gated")
    with pytest.raises(FileNotFoundError, match="at revision 'v1'"):
        encoders.load("hf-hub:lab/tiny", revision="v1")


def test_a_hub_that_does_not_answer(hub, monkeypatch, caplog, tmp_path):
    online = encoders.load("hf-hub:lab/tiny")
    caplog.set_level(logging.INFO, "sthisto")
    point(monkeypatch, "http://127.0.0.1:9", tmp_path)  # discard: nothing listens there
    np.testing.assert_array_equal(encoders.load("hf-hub:lab/tiny")(patches()), online(patches()))
    assert "127.0.0.1:9 does not answer: weights of 'lab/tiny' from the cache, commit" in caplog.text
    with pytest.raises(ConnectionError, match=r"does not answer, and the cache .* has no weights of 'lab/gated'"):
        encoders.load("hf-hub:lab/gated")


CLIENT = """
import json, sys, numpy as np, timm, torch, sthisto
patches = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
encoder = sthisto.encoders.load("hf-hub:lab/gated")
told = {"ours": encoder(patches).tolist(), "about": {k: v for k, v in encoder.provenance.items() if isinstance(v, str)}}
if "timm" in sys.argv:
    network = timm.create_model("hf-hub:lab/gated", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    colors = torch.tensor(patches).permute(0, 3, 1, 2) / 255
    colors = (colors - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    told["timm"] = network(colors).tolist()
print(json.dumps(told))
"""


def test_the_clients_in_a_process_of_their_own(hub, tmp_path):
    """Through HF_ENDPOINT, as users have it: timm's own download gives the same features; then offline."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_good", "OMP_NUM_THREADS": "1"}
    online = client(own, "timm")
    np.testing.assert_allclose(online["ours"], online["timm"], atol=1e-5)
    assert online["about"]["revision"] == hub.repositories["lab/gated"].commit
    hub.shutdown()
    offline = client({**own, "HF_HUB_OFFLINE": "1"})
    assert offline["ours"] == online["ours"]


def client(environment, *options):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLIENT, *options],
        env={**os.environ, **environment, "PYTHONPATH": str(Path(sthisto.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hf_good" not in done.stdout + done.stderr
    return json.loads(done.stdout)


# Local files


@pytest.fixture
def folder(tmp_path, weights):
    """A local copy of the repository."""
    place = tmp_path / "tiny"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(TINY))
    (place / "model.safetensors").write_bytes(weights)
    return place


def test_a_local_folder_stands_for_the_repository(folder, hub, weights):
    local = encoders.load("hf-hub:lab/tiny", weights=folder)
    assert hub.asked == []
    assert (local.provenance["repo_id"], local.provenance["revision"]) == ("", "")
    assert local.provenance["file"] == str(folder / "model.safetensors")
    assert local.provenance["sha256"] == sha256(weights).hexdigest()
    np.testing.assert_array_equal(local(patches()), encoders.load("hf-hub:lab/tiny")(patches()))


def test_a_local_file_beside_a_name_of_timms(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("test_vit").eval()  # with its classifier, which the features do not need
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    encoder = encoders.load("test_vit", weights=str(tmp_path / "own.safetensors"))
    colors = encoder._colors(patches(2, 160))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(colors), pre_logits=True)
    np.testing.assert_allclose(encoder(patches(2, 160)), expected, atol=1e-5)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights='nowhere.bin': no such file or folder"):
        encoders.load("uni", weights="nowhere.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no single file of weights"):
        encoders.load("uni", weights=tmp_path / "empty")
    with pytest.raises(ValueError, match="revision='v1' is of the Hub, and weights= is a local file"):
        encoders.load("uni", weights=folder, revision="v1")


def test_weights_of_another_architecture_name_keys_and_file(folder):
    file = folder / "model.safetensors"
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole message is looked at
        encoders.load("kaiko-s16", weights=file)
    said = str(caught.value)
    assert str(file) in said
    assert "72 missing: blocks.6.norm1.weight, blocks.6.norm1.bias" in said
    assert "13 unexpected: blocks.0.ls1.gamma, blocks.0.ls2.gamma" in said
    assert "of another shape: cls_token (1, 1, 64) instead of (1, 1, 384)" in said


def test_a_damaged_file_and_one_with_code_are_refused(tmp_path, weights):
    (tmp_path / "half.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "half.bin").write_bytes(b"PK\x03\x04 nothing")
    torch.save({"cls_token": Path}, tmp_path / "code.bin")
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    for name in ("half.safetensors", "half.bin", "code.bin"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as weights: it is damaged, or holds more"):
            encoders.load("kaiko-s16", weights=tmp_path / name)
    with pytest.raises(ValueError, match="holds no table of tensors by name, but list"):
        encoders.load("kaiko-s16", weights=tmp_path / "list.bin")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin", "slide_encoder.pth"], "pytorch_model.bin"),
        (["uni.safetensors", "pytorch_model.bin"], "uni.safetensors"),
        (["a.pth", "b.pth", "c.bin"], "c.bin"),
    ],
)
def test_which_file_of_a_folder_is_read(names, chosen):
    assert _weights.choose(names, "here") == chosen


def test_bytes_are_given_back_and_damage_is_seen(tiny):
    kept = _weights.to_bytes(tiny.state_dict())
    digest = sha256(kept).hexdigest()
    back = _weights.from_bytes(kept, digest)
    assert all(torch.equal(back[name], value) for name, value in tiny.state_dict().items())
    with pytest.raises(ValueError, match="the kept weights are damaged"):
        _weights.from_bytes(kept[:-1] + b"\x00\x01"[:1], digest[::-1])


def test_kept_bytes_are_a_safetensors_file(tiny, tmp_path):
    (tmp_path / "kept.safetensors").write_bytes(_weights.to_bytes(tiny.state_dict()))
    assert set(load_file(tmp_path / "kept.safetensors")) == set(tiny.state_dict())
