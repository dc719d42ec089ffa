"""ResNets for small images are timm models with an exact twin in plain timm."""

import pytest
import timm
import torch
from helpers import ROOT, TINY, randomized, refusal, run_forked, train_here

import care_hub
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.factory import create_model
from care_hub.models import SMALL, build_backbone, from_plain, to_plain
from care_hub.training.run import rehearse

# Widths unlike timm's num_features, tuples in timm's configuration, tied weights, patch sizes as numbers, ...
DOZEN = [
    "coat_tiny", "efficientvit_m0", "ghostnet_050", "iformer_t", "lcnet_035", "levit_128s",
    "mobilenetv3_small_050", "swiftformer_xs", "test_convnext", "test_mambaout", "test_vit",
    "xcit_nano_12_p8_224",
]  # fmt: skip
ONE_OF_EACH_MODULE = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32",
    "cpubone_nano", "crossvit_tiny_240", "cs3darknet_focus_s", "csatv2", "cspnext_tiny", "davit_tiny",
    "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim_dw", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "gmlp_ti16_224", "halonet_h1",
    "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "iformer_t",
    "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4", "lcnet_035",
    "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s", "lowformer_b0",
    "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge", "nest_tiny", "nextvit_small", "pit_ti_224", "pnasnet5large", "poolformerv2_s12",
    "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1",
    "res2next50", "resnest14d", "resnetv2_18", "rexnet_100", "sam2_hiera_tiny", "samvit_base_patch16_224",
    "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window16_256", "test_byobnet",
    "test_coatnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_resnet",
    "test_vit", "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m",
    "twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224",
    "vitamin_small_224", "volo_d1_224", "xception41p", "xcit_nano_12_p8_224",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_image_stems_have_an_exact_twin_in_plain_timm(name):
    model, stem = randomized(create_model(name)), SMALL[name]
    plain = timm.create_model(stem.plain, num_classes=0, replace_stem_pool=True, **stem.model_args).eval()
    state = model.state_dict()
    plain.load_state_dict(to_plain(state, stem))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            plain(x.repeat_interleave(stem.upsampling, 2).repeat_interleave(stem.upsampling, 3)), model(x)
        )
    back = from_plain(plain.state_dict(), stem)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    with pytest.raises(CareHubError, match="plain timm"):
        from_plain(plain.state_dict() | {"conv1.weight": torch.ones_like(plain.conv1.weight)}, stem)


def test_small_image_models_are_timm_models():
    model = timm.create_model("resnet18_cifar", num_classes=5)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert [f["reduction"] for f in model.feature_info] == [1, 1, 2, 4, 8]
    assert "resnet50_cifar" in care_hub.list_models("*_cifar")
    with pytest.raises(CareHubError, match="did you mean 'resnet18_cifar'"):
        create_model("resnet18_ciffar")


def test_patches_that_do_not_fill_an_image_are_refused():
    assert build_backbone("vit_tiny_patch16_224", 48).patch_embed.img_size == (48, 48)
    with pytest.raises(CareHubError, match="patches of 16 pixels, which do not fill 40; use `image_size=32`"):
        build_backbone("vit_tiny_patch16_224", 40)


def train_save_and_load(name: str, size: int, folder) -> None:
    """A step, an export, and the same features in care_hub and plain timm."""
    torch.manual_seed(0)
    encoder = Encoder.new(name, size, hidden=32, outputs=16)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
    encoder.train()(x)[0, 0].backward()
    optimizer.step()
    encoder.eval().save_pretrained(folder)
    # In one layout, since sums of another order differ by more than 1e-5 in a few networks.
    x = x.contiguous(memory_format=torch.channels_last)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).to(memory_format=torch.channels_last)
    with torch.no_grad():
        features = encoder.features(x)
        assert features.shape == (2, encoder.config.projection.inputs)
        for loaded in (Encoder.from_pretrained(folder).features, plain.eval()):
            torch.testing.assert_close(
                loaded(x), features, rtol=1e-5, atol=1e-5 * features.abs().max().item()
            )


@pytest.mark.parametrize("name", DOZEN)
def test_backbones_of_every_kind_train_save_and_load_the_same_everywhere(name, tmp_path):
    train_save_and_load(name, 64, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_MODULE)
def test_every_module_of_timm_trains_saves_and_loads_the_same_everywhere(name, tmp_path):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    train_save_and_load(name, size, tmp_path)
    rehearse(Encoder.new(name, size), 2)


def test_a_network_that_does_not_take_the_images_is_refused_when_it_is_built():
    with pytest.raises(CareHubError, match=r"^model 'crossvit_tiny_240' does not take images of 64 pixels "):
        Encoder.new("crossvit_tiny_240", 64)
    with pytest.raises(CareHubError, match=r"^model 'resnet18' can't be built with {'depth': 3} "):
        create_model("resnet18", depth=3)


def test_what_would_fail_after_training_is_told_by_a_dry_run(monkeypatch):
    flags = ("--batch-size", "1", "--weight", "0", "--method", "moco", "--dry-run")
    assert "Model 'resnet10_w16_small' can't be trained on 1 image of 32 pixels" in refusal(*flags)
    monkeypatch.setattr("care_hub.encoder.projection_head", lambda config: torch.nn.Linear(config.inputs, 5))
    assert "'projection.safetensors' disagree on the head" in refusal("--dry-run")


def test_a_rehearsal_leaves_no_trace():
    torch.manual_seed(0)
    encoder, state = Encoder.new("resnet10_w16_small"), torch.get_rng_state()
    before = encoder.fingerprint
    rehearse(encoder, 2)
    assert encoder.training and encoder.fingerprint == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.launches
def test_no_process_waits_for_one_whose_rehearsal_failed(tmp_path):
    flags = ("--model", "crossvit_tiny_240", "--image-size", "64")
    words = (ROOT / "train.py", "--save-root", tmp_path, *TINY, *flags)
    done = run_forked(*words, processes=2, ok=False)
    assert "Error: Model 'crossvit_tiny_240' does not take images" in done.stderr


@pytest.mark.launches
def test_strided_convolutions_of_few_channels_do_not_crash(tmp_path):
    train_here(tmp_path, "--model", "fastvit_t8", "--image-size", "128", "--dry-run")
