"""A detector goes to a repository of the hub and comes back, through a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading

import pytest
import torch
import yaml

import detector
from detector.commands import weights
from detector.commands.evaluate import evaluate_checkpoint
from detector.config import ConfigError
from detector.export.hub import push
from tests.weights.server import Handler, Server

hub = pytest.importorskip("huggingface_hub")
COMMIT = "0" * 40


class Hub(Handler):
    """Takes commits of small files into `server.files`, where the downloads read them."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.partition("?")[0]
        if refused := self.server.ways.get(path):
            return refused[0](self, content)
        answer: dict = {"url": f"{self.server.url}/ours/shapes", "id": "ours/shapes", "errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            answer = {"files": modes}
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            lines = [json.loads(line) for line in content.splitlines()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
            for revision in (found[2], COMMIT):
                entries = [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in files]
                self.server.files[f"/api/models/{found[1]}/tree/{revision}"] = json.dumps(entries).encode()
                for name, data in files.items():
                    self.server.files[f"/{found[1]}/resolve/{revision}/{name}"] = data
            told = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.server.files[f"/api/models/{found[1]}"] = json.dumps(told).encode()  # before huggingface_hub 2
            answer = {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}",
            }
        self.reply(200, answer)

    def reply(self, code: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Server() as server:
        server.RequestHandlerClass = Hub
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_there_and_back(server, run, shapes_tiny, call, tmp_path, monkeypatch):
    """What comes back predicts and evaluates as what went; the card says what it is; nothing is left behind."""
    folder = run("schedule.max_iterations=2", "schedule.warmup=0")
    checkpoint = folder / "last.pt"
    code, _, errors = call(lambda: weights.main(["export", str(checkpoint), "hf://ours/shapes"]))
    assert (code, errors.count("error")) == (0, 0), errors
    sent = {path.rpartition("/")[2]: data for path, data in server.files.items() if "/resolve/main/" in path}
    assert set(sent) == {"model.safetensors", "config.yaml", "README.md", "detections.jpg"}
    assert not any(data.startswith((b"PK", b"\x80")) for data in sent.values())  # neither torch's zip nor a pickle
    card = sent["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "image-segmentation" and head["library_name"] == "two-stage-detector"
    measured = json.loads((folder / "metrics.json").read_text())
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "box AP", "value": round(measured["bbox"]["AP"], 4)}
    assert "ellipse, triangle, rectangle, star, ring" in card and "detections.jpg" in card
    assert re.search(r"\| box \| [\d.]+ \| [\d.]+ to [\d.]+ \|", card), card
    assert "24 training images, 8 validation images" in card
    assert yaml.safe_load(sent["config.yaml"])["model"]["num_classes"] is not None

    photo = sorted((shapes_tiny / "val").iterdir())[0]
    expected = detector.load(checkpoint).predict(photo, 0)
    for address in ("hf://ours/shapes", "hf://ours/shapes/model.safetensors", f"hf://ours/shapes@{COMMIT}"):
        found = detector.load(address).predict(photo, 0)
        assert len(found.boxes) and all(torch.equal(a, b) for a, b in zip(expected, found) if a is not None)
    monkeypatch.chdir(tmp_path)
    again = evaluate_checkpoint("hf://ours/shapes", device="cpu", workers=0)
    assert again["bbox"]["AP"] == pytest.approx(measured["bbox"]["AP"])
    assert (tmp_path / "eval_ours-shapes" / "metrics.json").is_file() and not (tmp_path / "hf:").exists()

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "config.yaml").unlink()  # a checkpoint alone: no interval, no picture
    push(checkpoint, "hf://ours/alone")
    assert b"not measured" in server.files["/ours/alone/resolve/main/README.md"]
    assert "/ours/alone/resolve/main/detections.jpg" not in server.files


def test_what_is_refused(server, checkpoint, call, monkeypatch):
    for address in ("hf://ours", "hf://ours/shapes/model.safetensors"):
        with pytest.raises(ValueError, match=r"expected hf://owner/repository\[@branch\]"):
            push(checkpoint, address)
    server.ways["/api/repos/create"] = [lambda handler, _: handler.reply(401, {"error": "Invalid token"})]
    code, _, errors = call(lambda: weights.main(["export", str(checkpoint), "hf://ours/shapes"]))
    assert code == 2 and errors.startswith("error: hf://ours/shapes: ") and errors.count("\n") == 1
    assert not server.files  # nothing half uploaded
    names = [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in ("README.md", "pytorch_model.bin")]
    server.files["/api/models/ours/pickles/tree/main"] = json.dumps(names).encode()
    told = {"id": "ours/pickles", "sha": COMMIT, "siblings": [{"rfilename": name["path"]} for name in names]}
    server.files["/api/models/ours/pickles"] = json.dumps(told).encode()
    with pytest.raises(ConfigError, match=r"its weights are pickles \(pytorch_model.bin\)") as error:
        detector.load("hf://ours/pickles")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"from the hub only \.safetensors are loaded; `detector weights get hf://"):
        detector.load("hf://ours/pickles/pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf://ours/shapes needs huggingface_hub: pip install"):
        push(checkpoint, "hf://ours/shapes")
