"""`model.weights` and `model.backbone.weights`: settings come along, what the user set stays, misfits are refused."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights, resnet18, resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from detector.config import CONFIGS, ConfigError, build, check
from detector.weights import Start
from detector.weights.presets import RGB_MEAN


def composed(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=none", "model=faster_rcnn", *overrides])
    check(cfg)
    return cfg


def test_settings_come_along_but_for_those_that_were_chosen(tmp_path):
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    file = f"model.weights={tmp_path / 'weights.pth'}"
    cfg = composed(file, "+model.rpn.min_size=2.0", "+model.box_head.min_size=1.0")
    start = build(cfg.weights, "weights")
    weights = start.read(cfg, chosen={"model.rpn.min_size", "model.weights"})
    assert cfg.model.weights is None
    assert cfg.model.rpn.anchor_rounding is True and cfg.model.box_head.roi.aligned is False
    assert cfg.model.rpn.min_size == 2.0 and cfg.model.box_head.min_size == 0.01
    check(cfg)
    model = build(cfg.model, "model", num_classes=3)
    start.load(model, weights)
    assert torch.equal(model.neck.lateral[0][0].weight, theirs.backbone.fpn.inner_blocks[0][0].weight)
    # another RoI method keeps its own settings
    cfg = composed(file, "roi=pool")
    Start().read(cfg)
    assert "aligned" not in cfg.model.box_head.roi


def test_a_backbone_of_caffe_changes_how_images_are_normalised(tmp_path):
    torch.save(resnet50().state_dict(), tmp_path / "resnet50_msra.pth")
    cfg = composed(f"model.weights={tmp_path / 'resnet50_msra.pth'}")
    weights = Start(source="mmdet").read(cfg)
    assert cfg.model.channel_order == "bgr" and list(cfg.model.pixel_std) == [1, 1, 1]
    assert cfg.model.backbone.stride_in_1x1 is True
    assert all(key.startswith("backbone.") for key in weights.model.state_dict)


def test_without_a_file_nothing_changes():
    cfg = composed()
    before = cfg.copy()
    assert not any(Start().read(cfg))
    assert cfg == before


def started(cfg, num_classes: int = 3):
    """The model that a run of the config starts from."""
    torch.manual_seed(0)
    start = build(cfg.weights, "weights")
    weights = start.read(cfg)
    model = build(cfg.model, "model", num_classes=num_classes)
    start.load(model, weights)
    return model


BODIES = [
    "model=faster_rcnn_c4",
    "backbone@model.backbone=resnet50_bn",
    "backbone@model.backbone=resnet50_dconv_v2",
    "backbone@model.backbone=timm model.backbone.name=resnet18",
]


@pytest.mark.parametrize("body", BODIES)
def test_a_backbone_s_weights_fill_the_body_and_draw_nothing(body, tmp_path, monkeypatch):
    if "timm" in body:
        timm, name = pytest.importorskip("timm"), "pretrained"
        theirs = timm.create_model("resnet18", features_only=True).state_dict()
        create = timm.create_model

        def offline(*args, pretrained=False, **settings):
            model = create(*args, **settings)
            if pretrained:
                model.load_state_dict(theirs)
            return model

        monkeypatch.setattr(timm, "create_model", offline)
        wanted = {f"model.{key}": value for key, value in theirs.items()}
        with pytest.raises(
            ConfigError, match="'imagenet': expected 'pretrained', which takes timm's, or the path of a"
        ):
            started(composed(*body.split(), "model.backbone.weights=imagenet"))
    else:
        name = str(tmp_path / "resnet50.pth")
        wanted = resnet50().state_dict()
        torch.save(wanted, name)
    fresh = started(composed(*body.split(), "model.backbone.weights=null")).state_dict()
    after = torch.random.get_rng_state()
    model = started(composed(*body.split(), f"model.backbone.weights={name}"))
    assert torch.equal(torch.random.get_rng_state(), after)  # what is drawn later stays the same, too
    filled = {f"backbone.{key}": value for key, value in wanted.items()}
    if "c4" in body:  # stage 5 is the head's
        filled = {key.replace("backbone.layer4.", "box_head.trunk.layer4."): value for key, value in filled.items()}
    state = model.state_dict()
    assert sum(key in filled for key in state) > 100
    for key, value in state.items():
        assert torch.equal(value, filled.get(key, fresh[key])), key


@pytest.mark.parametrize(
    ("body", "name", "suffix"),
    [
        ("timm", "resnet18", ".safetensors"),
        ("timm", "tf_efficientnet_lite0", ".pth"),
        ("vit", "vit_tiny_patch16_224", ".pth"),
    ],
)
def test_a_file_of_timm_s_classifier_fills_a_body_of_timm_s(body, name, suffix, tmp_path, caplog):
    """Where the hub cannot be reached: what `timm` publishes, put there by hand."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name).state_dict()
    (torch.save if suffix == ".pth" else save_file)(theirs, tmp_path / f"theirs{suffix}")
    options = [f"backbone@model.backbone={body}", f"model.backbone.name={name}"]
    if body == "vit":
        options += ["neck@model.neck=simple_pyramid", "model.backbone.window=null"]
    fresh = started(composed(*options, "model.backbone.weights=null")).backbone.state_dict()
    model = started(composed(*options, f"model.backbone.weights={tmp_path / f'theirs{suffix}'}"))
    state = {key.removeprefix("model."): value for key, value in model.backbone.state_dict().items()}
    assert {*state} == {key.removeprefix("model.") for key in fresh}
    ours = {key.replace(".", "_"): value for key, value in state.items()}
    learnt = {key.replace(".", "_"): value for key, value in theirs.items() if not key.startswith(("fc", "head"))}
    if body == "vit":
        learnt["pos_embed"] = learnt["pos_embed"][:, 1:]  # without the class token's
    assert len(ours) > 100 and {*ours} <= {*learnt} and "Unexpected" not in caplog.text
    assert all(torch.equal(value, learnt[key]) for key, value in ours.items())
    other = timm.create_model("resnet34").state_dict()
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"^model\.backbone\.weights = .*other\.pth: "):
        started(composed(*options, f"model.backbone.weights={tmp_path / 'other.pth'}"))


def test_pixels_are_those_of_timm_s_training_unless_chosen(tmp_path, caplog):
    pytest.importorskip("timm")
    half, pixels = [127.5, 127.5, 127.5], "model.pixel_mean=[127.5,127.5,127.5] model.pixel_std=[127.5,127.5,127.5]"
    body = ["backbone@model.backbone=timm", "model.backbone.name=tf_efficientnet_lite0"]

    def read(*overrides: str, chosen=()):
        cfg = composed(*body, *overrides)
        Start().read(cfg, chosen)
        return cfg.model

    with caplog.at_level("INFO"):
        model = read("model.backbone.weights=pretrained")
        assert list(model.pixel_mean) == list(model.pixel_std) == half and pixels in caplog.text
        model = read("model.backbone.weights=pretrained", "model.pixel_mean=[1,2,3]", chosen=["model.pixel_mean"])
        assert list(model.pixel_mean) == [1, 2, 3] and list(model.pixel_std) == half
        caplog.clear()
        model = read(f"model.backbone.weights={tmp_path / 'file.pth'}")  # of whose training nothing is known
        assert list(model.pixel_mean) == RGB_MEAN and f"{pixels}; add it if those of this file were" in caplog.text
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            compose("train", [*body, *pixels.split()])  # as it advises
        caplog.clear()
        read("model.backbone.name=convnext_tiny.fb_in1k", "model.backbone.weights=pretrained")
        assert "were trained" not in caplog.text  # with ImageNet's, as all models expect


def test_torchvision_s_weights_by_name(monkeypatch):
    theirs = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, *args, **kwargs: theirs)
    model = started(composed("backbone@model.backbone=resnet18", "model.backbone.weights=IMAGENET1K_V1"))
    assert torch.equal(model.backbone.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])
    cases = {
        (
            "resnet18",
            "IMAGENET1K_V7",
        ): "'IMAGENET1K_V7': those of resnet18 are IMAGENET1K_V1, DEFAULT; or give the path of a file",
        ("resnet10_half", "IMAGENET1K_V1"): "'IMAGENET1K_V1': it has none of a resnet10; or give",
        ("resnet18", "missing.pth"): "model.backbone.weights = missing.pth: weights file missing.pth does not exist",
    }
    for (body, name), message in cases.items():
        with pytest.raises(ConfigError, match=message):
            started(composed(f"backbone@model.backbone={body}", f"model.backbone.weights={name}"))
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights = 5: .* takes str \| None here"):
        composed("backbone@model.backbone=resnet18", "model.backbone.weights=5")


def test_without_a_network_the_key_is_named_that_takes_the_file(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    body = "backbone@model.backbone=resnet18"
    with pytest.raises(
        ConfigError, match=r"^model\.backbone\.weights = .*no route.* get the file elsewhere and give its"
    ):
        started(composed(body, "model.backbone.weights=IMAGENET1K_V1"))
    torch.save(resnet18().state_dict(), tmp_path / "resnet18-f37072fd.pth")
    started(composed(body, f"model.backbone.weights={tmp_path / 'resnet18-f37072fd.pth'}"))


def test_a_backbone_s_weights_are_not_read_where_others_fill_it(tmp_path):
    """finetune names ImageNet's weights: no download where model.weights has a whole detector, or a whole backbone."""
    whole = started(composed("backbone@model.backbone=resnet18"))
    files = {"detector.pth": whole.state_dict(), "classifier.pth": resnet18().state_dict()}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        from_it = ["backbone@model.backbone=resnet18", f"model.weights={tmp_path / name}"]
        model = started(composed(*from_it, "model.backbone.weights=missing.pth"))
        key = "layer4.1.conv2.weight"
        assert torch.equal(model.backbone.state_dict()[key], state.get(key, state.get(f"backbone.{key}")))
    part = {key: value for key, value in whole.state_dict().items() if not key.startswith("backbone.layer4.")}
    torch.save(part, tmp_path / "part.pth")
    from_it = ["backbone@model.backbone=resnet18", f"model.weights={tmp_path / 'part.pth'}", "weights.strict=false"]
    with pytest.raises(ConfigError, match=r"missing\.pth does not exist"):
        started(composed(*from_it, "model.backbone.weights=missing.pth"))
    model = started(composed(*from_it, f"model.backbone.weights={tmp_path / 'classifier.pth'}"))
    assert torch.equal(model.backbone.layer4[1].conv2.weight, files["classifier.pth"]["layer4.1.conv2.weight"])
    assert torch.equal(model.backbone.layer3[1].conv2.weight, part["backbone.layer3.1.conv2.weight"])


def test_a_backbone_of_other_weights_is_refused_unless_what_fits_is_enough(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    names = ["backbone@model.backbone=resnet34", f"model.backbone.weights={tmp_path / 'resnet18.pth'}"]
    with pytest.raises(
        ConfigError, match=r"model\.backbone\.weights = .*resnet18\.pth: weights do not fit .*strict=false"
    ):
        started(composed(*names))
    started(composed(*names, "weights.strict=false"))
