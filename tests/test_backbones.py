"""timm's networks as task nets and as frozen featurizers: stems, sizes, grey images, and weights that fit or do not."""

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from dgal_bench.config.compose import compose
from dgal_bench.config.schema import check_backbone
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.seeding import isolated
from dgal_bench.models.backbones import Backbone, BackboneSpec, load_weights, patch_size
from dgal_bench.models.nets import build_net, check_fits, cost, initial_weights
from dgal_bench.models.task import TaskModule


def net_config(*overrides, dataset="digits"):
    choices = {"dataset": dataset, "representation": "default", "profile": "paper", "strategy": "random"}
    return compose(choices, overrides).net


def spec(model="resnet18", shape=(3, 32, 32), **settings):
    return BackboneSpec(model, shape, **settings)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 21, 30)])
@pytest.mark.parametrize(
    "kind", ["cnn", "mlp", "resnet18", pytest.param("vit_small", marks=pytest.mark.slow), "mobilenetv3_small_050"]
)
def test_every_kind_of_net_gives_logits_and_50_features(kind, shape):
    overrides = ["net.input_size=24"] if shape[1] != shape[2] else []
    net = build_net(shape, 7, net_config(f"net.kind={kind}", "net.kernels=[5,5]", "net.pools=[true,true]", *overrides))
    logits, features = net.eval()(torch.rand(3, *shape))
    assert (logits.shape, features.shape) == ((3, 7), (3, 50))
    assert features.min() >= 0
    assert torch.equal(logits, net.classify(features))
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("dataset", "shape", "pretrained", "backbone"),
    [
        ("emnist", (1, 28, 28), True, 11.2e6),
        ("svhn", (3, 32, 32), False, 23.5e6),
        ("cifar10", (3, 32, 32), True, 23.5e6),
        ("cifar100", (3, 32, 32), True, 21.7e6),
        ("mini_imagenet", (3, 84, 84), True, 21.7e6),
    ],
)
def test_the_nets_of_table_1(dataset, shape, pretrained, backbone):
    config = net_config(dataset=dataset)
    assert config.pretrained == pretrained
    spec = BackboneSpec(config.kind, shape, pretrained=pretrained)
    assert spec.size == ((224, 224) if pretrained else shape[1:])
    n_classes = compose({"dataset": dataset, "representation": "default", "profile": "paper", "strategy": "random"})
    assert n_classes.dataset.n_classes in (10, 26, 100)
    with torch.device("meta"):  # without values
        parameters = sum(p.numel() for p in Backbone(BackboneSpec(config.kind, shape)).parameters())
    assert parameters == pytest.approx(backbone, rel=0.02)


def test_small_images_from_scratch_get_a_small_stem():
    small, large = Backbone(spec()).net, Backbone(spec(shape=(3, 84, 84))).net
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert Backbone(spec(stem="standard")).net.conv1.stride == (2, 2)
    assert Backbone(spec(shape=(3, 84, 84), stem="small")).net.conv1.stride == (1, 1)
    # four times as many places in the last block: 4x4 instead of 1x1
    assert small.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 512, 4, 4)


@pytest.mark.slow
def test_a_small_vit_has_at_least_eight_patches_a_side():
    assert [patch_size((side, side)) for side in (32, 28, 64, 48, 17, 224)] == [4, 2, 8, 6, 1, 28]
    assert patch_size((24, 36)) == 3
    assert Backbone(spec("vit_small")).net.pos_embed.shape == (1, 8 * 8 + 1, 384)
    assert Backbone(spec("vit_small", (3, 84, 84))).net.pos_embed.shape == (1, 12 * 12 + 1, 384)
    assert Backbone(spec("vit_small", input_size=224)).net.pos_embed.shape == (1, 14 * 14 + 1, 384)


def test_grey_is_the_same_as_three_equal_channels():
    with isolated(0, "grey"):
        backbone = Backbone(spec(shape=(1, 32, 32))).eval()
    grey = torch.rand(4, 1, 32, 32)
    assert torch.equal(backbone(grey), backbone(grey.repeat(1, 3, 1, 1)))


def test_images_are_resized_to_the_size_of_the_network_and_left_alone_at_it():
    backbone = Backbone(spec(input_size=64)).eval()
    seen = []
    backbone.net.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone(torch.full((2, 3, 32, 32), 0.25))
    exact = torch.rand(2, 3, 64, 64)
    backbone(exact)
    assert torch.allclose(seen[0], torch.full((2, 3, 64, 64), 0.25))
    assert torch.equal(seen[1], exact)


def weights_file(tmp_path, model="resnet18", kind="safetensors", **settings):
    """A checkpoint as people have them: the whole network with its 1,000 classes."""
    torch.manual_seed(5)
    net = timm.create_model(timm_name(model), pretrained=False, **settings)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    path = tmp_path / f"{model}.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, path)
    return path, net.state_dict()


def timm_name(model):
    return {"vit_small": "vit_small_patch16_224"}.get(model, model)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.slow
def test_local_weights_are_those_of_the_file_in_every_round_the_same(tmp_path, kind):
    path, state = weights_file(tmp_path, kind=kind)
    config = net_config("net.kind=resnet18", f"net.checkpoint_path={path}", "net.input_size=32")
    weights = initial_weights((1, 28, 28), config)
    for round_ in (0, 1):
        with isolated(0, "weights", round_):
            net = build_net((1, 28, 28), 10, config, weights)
        loaded = net.body.net.state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    assert not torch.equal(net.classify.weight, build_net((1, 28, 28), 10, config, weights).classify.weight)
    assert set(state) - set(loaded) == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_weights_have_a_hash_of_their_content(tmp_path):
    path, _ = weights_file(tmp_path)
    first = load_weights(spec(checkpoint_path=str(path)))
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(path.read_bytes())
    assert load_weights(spec(checkpoint_path=str(copy))).sha256 == first.sha256
    other, _ = weights_file(tmp_path / "..", kind="pth")
    assert load_weights(spec(checkpoint_path=str(other))).sha256 == first.sha256  # the format makes no difference
    state = safetensors.torch.load_file(path)
    state["layer1.0.conv1.weight"][0, 0, 0, 0] += 1
    safetensors.torch.save_file(state, copy)
    assert load_weights(spec(checkpoint_path=str(copy))).sha256 != first.sha256
    assert load_weights(spec()) is None


@pytest.mark.slow
def test_position_embeddings_of_a_vit_are_resampled_to_the_input_size(tmp_path):
    path, state = weights_file(tmp_path, "vit_small")
    same = load_weights(spec("vit_small", checkpoint_path=str(path)))
    half = load_weights(spec("vit_small", checkpoint_path=str(path), input_size=112))
    assert torch.equal(same.state["pos_embed"], state["pos_embed"])
    assert half.state["pos_embed"].shape == (1, 7 * 7 + 1, 384)
    assert torch.equal(half.state["pos_embed"][:, 0], state["pos_embed"][:, 0])  # the class token's stays
    assert torch.equal(half.state["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])
    # a smooth field: resampled, its mean stays
    grid = state["pos_embed"][:, 1:]
    assert half.state["pos_embed"][:, 1:].mean() == pytest.approx(float(grid.mean()), abs=2e-3)


def test_pretrained_networks_get_their_own_input_size_and_stem(tmp_path):
    path, _ = weights_file(tmp_path)
    one = spec(checkpoint_path=str(path))
    assert (one.size, one.small) == ((224, 224), False)
    assert spec(checkpoint_path=str(path), input_size=32).small is False
    backbone = Backbone(one, load_weights(one)).eval()
    assert backbone(torch.rand(1, 3, 32, 32)).shape == (1, 512)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p.write_bytes(b"not a checkpoint"), ConfigError, "cannot be read as weights alone"),
        (lambda p: p.write_bytes(b""), ConfigError, "cannot be read as weights alone"),
        (lambda p: torch.save({"a": print}, p), ConfigError, "cannot be read as weights alone"),
        (lambda p: torch.save({"epoch": 3}, p), ConfigError, "is no state dict: it must map names to tensors"),
        (lambda p: torch.save({}, p), ConfigError, "is no state dict"),
        (lambda p: torch.save([1, 2], p), ConfigError, "checkpoint_path="),
        (lambda p: None, DataError, "is no file: name a .safetensors or .pth"),
    ],
    ids=["rubbish", "empty", "pickled code", "no tensors", "nothing", "list", "missing"],
)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_that_holds_no_weights_is_one_line(tmp_path, make, error, message, kind):
    path = tmp_path / f"weights.{kind}"
    make(path)
    if kind == "safetensors" and path.exists():
        message = "checkpoint_path="
    with pytest.raises(error) as caught:
        load_weights(spec(checkpoint_path=str(path)))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_says_what_does_not_fit(tmp_path):
    path, _ = weights_file(tmp_path, "resnet34")
    with pytest.raises(ConfigError, match=r"checkpoint_path=.*resnet34.safetensors does not fit resnet18: .*layer\d"):
        load_weights(spec(checkpoint_path=str(path)))
    with pytest.raises(ConfigError, match="does not fit vit_small"):
        load_weights(spec("vit_small", checkpoint_path=str(path)))
    with pytest.raises(ConfigError, match="does not fit resnet50"):
        load_weights(spec("resnet50", checkpoint_path=str(path)))


def test_without_a_network_one_line_names_both_ways_out(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_weights(spec(pretrained=True))
    assert "the weights of resnet18 cannot be had from timm's hub here" in str(caught.value)
    assert "checkpoint_path=FILE" in str(caught.value)
    assert "pretrained=false" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "near"), [("resnet81", "resnet18"), ("vit_smal", "vit_small"), ("efficientnetb0", "efficientnet_b0")]
)
def test_an_unknown_network_names_the_nearest(name, near):
    with pytest.raises(ConfigError) as caught:
        check_backbone("net.kind", name)
    assert f"unknown net.kind '{name}'; did you mean " in str(caught.value)
    assert f"'{near}'" in str(caught.value)
    check_backbone("net.kind", near)


def test_an_unknown_tag_names_those_that_there_are():
    check_backbone("net.kind", "resnet18.a1_in1k")
    with pytest.raises(ConfigError, match=r"net.kind=resnet18.a1_in2k: timm has no such weights of resnet18; did you"):
        check_backbone("net.kind", "resnet18.a1_in2k")
    for name in ("cnn", "mlp"):  # networks of ours have no features to freeze
        with pytest.raises(ConfigError, match=f"unknown representation.model '{name}'"):
            check_backbone("representation.model", name)


def test_input_size_resizes_in_front_of_our_own_networks_too():
    for kind in ("cnn", "mlp"):
        small = build_net((1, 28, 28), 10, net_config(f"net.kind={kind}"))
        resized = build_net((1, 28, 28), 10, net_config(f"net.kind={kind}", "net.input_size=32"))
        native = build_net((1, 32, 32), 10, net_config(f"net.kind={kind}"))
        flops = [cost(net, shape)["flops_per_image"] for net, shape in (
            (small, (1, 28, 28)), (resized, (1, 28, 28)), (native, (1, 32, 32)),
        )]  # fmt: skip
        assert flops[0] < flops[1] == flops[2]


@pytest.mark.slow
def test_what_does_not_fit_a_network_is_one_line():
    with pytest.raises(ConfigError, match=r"resnet18 takes images of 1 or 3 channels, not 64: use net.kind=mlp"):
        build_net((64, 1, 1), 3, net_config("net.kind=resnet18"))
    with pytest.raises(ConfigError, match=r"leave nothing of a 1x1 image: .*net.kind=mlp for embeddings"):
        build_net((64, 1, 1), 3, net_config())
    with pytest.raises(ConfigError, match=r"net.stem=small is for ResNets and ViTs, not for mobilenetv3_small_050"):
        build_net((3, 32, 32), 3, net_config("net.kind=mobilenetv3_small_050", "net.stem=small"))
    with pytest.raises(ConfigError, match=r"vit_small: patches of 16x16 do not tile 30x30 pixels: set net.input_size"):
        build_net((3, 30, 30), 3, net_config("net.kind=vit_small", "net.stem=standard"))
    with pytest.raises(ConfigError, match=r"net.stem=small gives resnet18 another first layer, for which there are no"):
        initial_weights((3, 32, 32), net_config("net.kind=resnet18", "net.stem=small", "net.pretrained=true"))
    check_fits(build_net((3, 32, 32), 3, config := net_config("net.kind=mixer_s16_224")), (3, 32, 32), config)
    with pytest.raises(ConfigError, match=r"inception_v3 cannot take images of 32x32 pixels .*raise net.input_size"):
        check_fits(build_net((3, 32, 32), 3, config := net_config("net.kind=inception_v3")), (3, 32, 32), config)
    with pytest.raises(ConfigError, match=r"net.input_size=32 is for images, and these are embeddings"):
        build_net((64, 1, 1), 3, net_config("net.kind=mlp", "net.input_size=32"))
    for setting in ("net.pretrained=true", "net.checkpoint_path=x.pth"):
        with pytest.raises(ConfigError, match=r"net.kind=cnn has no published weights"):
            initial_weights((1, 8, 8), net_config(setting))


def test_the_optimiser_follows_the_network_unless_it_is_named():
    def training(*overrides, dataset="svhn"):
        choices = {"dataset": dataset, "representation": "default", "profile": "paper", "strategy": "random"}
        one = compose(choices, overrides).training
        return one.optimizer, one.lr, one.momentum, one.weight_decay

    assert training() == ("sgd", 1e-3, 0.9, 5e-4)
    assert training(dataset="cifar10") == ("adam", 1e-3, 0.0, 0.0)
    assert training("net.pretrained=false", dataset="cifar10") == ("sgd", 1e-3, 0.9, 5e-4)
    assert training("net.checkpoint_path=weights.pth") == ("adam", 1e-3, 0.0, 0.0)
    assert training("training.optimizer=adam", "training.weight_decay=0.1") == ("adam", 1e-3, 0.0, 0.1)
    assert training("net.pretrained=1") == training("net.pretrained=yes") == ("adam", 1e-3, 0.0, 0.0)
    assert training("training.optimizer=sgd", dataset="cifar10") == ("sgd", 1e-3, 0.9, 5e-4)


@pytest.mark.parametrize("kind", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_layout_changes_no_answer_and_amp_hardly_any(kind):
    shape, images = (3, 32, 32), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = {}
    for layout in ("true", "false"):
        for amp in ("true", "false"):
            config = net_config(f"net.kind={kind}", f"net.channels_last={layout}", f"net.amp={amp}", dataset="svhn")
            with isolated(0, "weights"):
                net = build_net(shape, 10, config)
            last = net.body if kind == "resnet18" else net.body[0]
            first = next(p for p in last.parameters() if p.dim() == 4)
            assert first.is_contiguous(memory_format=torch.channels_last) == (layout == "true")
            module = TaskModule(net, 10, None, config.amp).eval()
            with torch.inference_mode():
                answers[layout, amp] = module(images)
            assert all(part.dtype == torch.float32 for part in answers[layout, amp])
    exact = answers["true", "false"]
    for (_, amp), found in answers.items():
        tolerance = 5e-2 if amp == "true" else 1e-4
        assert torch.allclose(found[0], exact[0], atol=tolerance, rtol=tolerance)
    assert not torch.equal(answers["true", "true"][0], exact[0])


def test_flops_of_a_resnet_are_those_of_its_paper():
    """He et al., Table 1: 1.8e9 multiply-adds at 224 pixels; cost works in training mode and with one image."""
    net = build_net((3, 224, 224), 1000, net_config("net.kind=resnet18"))
    assert cost(net.train(), (3, 224, 224))["flops_per_image"] == pytest.approx(2 * 1.82e9, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["false", "true"])
@pytest.mark.parametrize("kind", ["cnn", "resnet18", "vit_small"])
def test_a_net_answers_on_the_gpu_as_on_the_cpu(kind, amp):
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with isolated(0, "weights"):
        net = build_net((3, 32, 32), 10, net_config(f"net.kind={kind}", dataset="svhn"))
    module = TaskModule(net, 10, None, amp == "true").eval()
    with torch.inference_mode():
        truth = module(images)
        found = module.to("cuda")(images.to("cuda"))
    tolerance = 5e-2 if amp == "true" else 1e-3
    for there, here in zip(found, truth, strict=True):
        assert torch.allclose(there.cpu(), here, atol=tolerance, rtol=tolerance)
