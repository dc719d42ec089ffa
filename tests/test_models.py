"""ResNets for small images are timm models with an exact twin in plain timm."""

import pytest
import timm
import torch
from helpers import randomized

import care_hub
from care_hub.errors import CareHubError
from care_hub.factory import create_model
from care_hub.models import SMALL, build_backbone, from_plain, to_plain


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
