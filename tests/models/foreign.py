"""The same FocalNet as timm and as Hugging Face write it, and models small enough to run."""

import timm.models.focalnet
import torch
from timm.models._features import FeatureListNet
from torch import nn
from transformers import FocalNetBackbone, FocalNetConfig, FocalNetForImageClassification

from focalnet_kernels.models import FocalNet

# every option that changes names, shapes or results
SMALL = {
    "plain": {},
    "conv_postln_layerscale": {
        "use_conv_embed": True,
        "use_postln": True,
        "use_layerscale": True,
        "focal_levels": (3, 2, 1),
        "focal_windows": (3, 5, 3),
    },
    "postln_in_modulation": {"use_postln": True, "use_layerscale": True, "use_postln_in_modulation": True},
    "layerscale_normalized": {"use_layerscale": True, "normalize_modulator": True, "mlp_ratio": 2.0},
}


def small_config(**options) -> dict:
    """Constructor arguments of a three-stage model of width 8."""
    config = {"depths": (1, 2, 1), "focal_levels": (2, 2, 2), "focal_windows": (3, 3, 3)}
    return config | {"embed_dim": 8, "num_classes": 5, "drop_path_rate": 0.0} | options


def randomized(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, no parameter at a value that hides mistakes (LayerScale's 1e-4, biases 0)."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return model.eval()


def small_model(**options) -> FocalNet:
    return randomized(FocalNet(**small_config(**options)))


def timm_model(config: dict) -> nn.Module:
    """timm's FocalNet for the authors' arguments."""
    model = timm.models.focalnet.FocalNet(
        use_overlap_down=config.get("use_conv_embed", False),
        use_post_norm=config.get("use_postln", False),
        use_post_norm_in_modulation=config.get("use_postln_in_modulation", False),
        layerscale_value=config.get("layerscale_value", 1e-4) if config.get("use_layerscale") else None,
        **_same(config, "depths", "focal_levels", "focal_windows", "embed_dim", "num_classes", "mlp_ratio"),
        **_same(config, "normalize_modulator", "drop_path_rate"),
    )
    patch_size = config.get("patch_size", 4)
    if patch_size != 4:  # timm has no such argument
        model.stem.proj = nn.Conv2d(3, config["embed_dim"], patch_size, patch_size)
    return model.eval()


def huggingface_config(config: dict) -> FocalNetConfig:
    """Hugging Face's configuration for the authors' arguments."""
    return FocalNetConfig(
        image_size=config.get("img_size", 224),
        num_labels=config["num_classes"],
        use_post_layernorm=config.get("use_postln", False),
        use_post_layernorm_in_modulation=config.get("use_postln_in_modulation", False),
        **_same(config, "depths", "focal_levels", "focal_windows", "embed_dim", "mlp_ratio", "patch_size"),
        **_same(config, "use_conv_embed", "use_layerscale", "normalize_modulator", "drop_path_rate"),
    )


def huggingface_model(config: dict) -> nn.Module:
    """Hugging Face's FocalNet with its classifier, for the authors' arguments."""
    return FocalNetForImageClassification(huggingface_config(config)).eval()


def timm_backbone(config: dict, out_indices: tuple[int, ...]) -> nn.Module:
    """timm's FocalNet as `features_only` wraps it."""
    return FeatureListNet(timm_model(config), out_indices, flatten_sequential=True).eval()


def huggingface_backbone(config: dict, out_indices: tuple[int, ...]) -> nn.Module:
    """Hugging Face's backbone."""
    foreign = huggingface_config(config)
    foreign.hidden_sizes = [config["embed_dim"] * 2**stage for stage in range(len(config["depths"]))]
    foreign.out_features = [f"stage{i + 1}" for i in out_indices]
    return FocalNetBackbone(foreign).eval()


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)


def _same(config: dict, *names: str) -> dict:
    return {name: config[name] for name in names if name in config}
